// Attention over sorted orders, forward: out_i = sum_j p_ij v_j, p_i = softmax over the keys of all rounds.
//
// One task walks a segment of one head's tiles in one round. A tile computes its logits, their running
// maximum and sum, and the product with the values, and merges them into the row's place in the output,
// which holds sums over the rounds done so far; the last round divides. Rounds follow one another, so a row
// is added to in the order of the rounds whatever the number of threads.

#include "key_panels.h"
#include "threads.h"

namespace reformer {
namespace REFORMER_ISA {
namespace {

// One head's sums over the rounds done so far, by position.
struct Running {
  float* maximum = nullptr;
  float* sum = nullptr;
  float* out = nullptr;  // unnormalised outputs, where the output's own dtype cannot hold them
};

template <typename T>
class ForwardWorker {
  using Op = Operand<T>;

 public:
  ForwardWorker(const AttentionParams& p, const Plan& plan, Arena* arena)
      : p_(p), plan_(plan), rule_(p, plan), panels_(p, plan, arena) {
    logits_stride_ = plan.block_panels * kPanel + kLanes;  // room for sum_from_first_key's last vector
    query_stride_ = plan.d_padded / kNumbers<Op>;
    queries_ = arena->take<Op>(kTileRows * query_stride_);
    logits_ = arena->take<float>(kTileRows * logits_stride_);
    out_ = arena->take<float>(kTileRows * plan.dv_padded);
    met_ = arena->take<int64_t>(kTileGroups * plan.block_panels);
    pieces_ = arena->take<Piece<Op>>(plan.block_panels);
    if (dropout()) factors_ = arena->take<float>(kTileRows * plan.block_panels * kPanel);
    if (p.rule.correct_duplicates) row_codes_ = arena->take<int32_t>(kTileRows * p.R);
  }

  void run_segment(const Head& head, const Running& running, int64_t round, int64_t segment) {
    panels_.enter(head, round * p_.Lk, (round + 1) * p_.Lk, p_.rule.ring);
    for (Ranks ranks = tile_segment(p_, plan_, segment); ranks.first < ranks.last; ranks.first += kTileRows) {
      make_tile(p_, plan_, head, round, ranks, &tile_);
      load_queries(head);
      Block block = next_block(plan_, tile_, INT64_MIN);
      for (; block.from < tile_.last_panel; block = next_block(plan_, tile_, block.to))
        attend_block(head, running, block.from, block.to);
      if (tile_.first_panel == tile_.last_panel) clear_rows();
      merge(head, running);
    }
  }

 private:
  bool dropout() const { return p_.dropout_threshold > 0 || p_.keep_scale != 1.0f; }

  void load_queries(const Head& head) {
    for (int i = 0; i < tile_.rows; ++i) {
      Op* row = queries_ + i * query_stride_;
      if (is_padding_query(head, tile_.position[i]))
        memset(row, 0, static_cast<size_t>(query_stride_) * sizeof(Op));
      else
        load_operands(row_of<const T>(p_.q, head.b, head.h, tile_.position[i]), p_.D, plan_.d_padded, row);
      if (row_codes_)
        memcpy(row_codes_ + i * p_.R, head.codes + tile_.position[i] * p_.R,
               static_cast<size_t>(p_.R) * sizeof(int32_t));
    }
  }

  void clear_rows() {
    for (int i = 0; i < tile_.rows; ++i) maximum_[i] = -kInfinity, sum_[i] = 0.0f;
    memset(out_, 0, static_cast<size_t>(tile_.rows * plan_.dv_padded) * sizeof(float));
  }

  // Folds the keys of panels [from, to) into maximum_, sum_ and out_.
  void attend_block(const Head& head, const Running& running, int64_t from, int64_t to) {
    const bool first = from == tile_.first_panel;
    if (first) clear_rows();
    panels_.require(from, to);
    if (factors_) rule_.write_dropout(head, tile_, panels_, from, to, factors_, plan_.block_panels * kPanel);
    for (int group = 0; group < tile_.groups; ++group) met_count_[group] = 0;
    prefetched_ = 0;
    const int64_t rows_a_step = ceil_div(kTileRows, (to - from) * tile_.groups);
    for (int64_t panel = from; panel < to; ++panel) {
      const Piece<Op> keys{panels_.keys_t(panel), operands<Op>(p_.D)};
      for (int group = 0; group < tile_.groups; ++group) {
        if (to == tile_.last_panel) prefetch(head, running, rows_a_step);
        if (!rule_.may_meet(tile_, group, panel, panels_.panel(panel))) continue;
        const int row = group * kGroupRows, met = met_count_[group]++;
        met_[group * plan_.block_panels + met] = panel;
        multiply_group<false>(group_rows(tile_, group), queries_ + row * query_stride_, query_stride_,
                              Pieces<Op>{&keys, 1, kPanel}, kPanel,
                              logits_ + row * logits_stride_ + met * kPanel, logits_stride_, false);
      }
    }
    for (int group = 0; group < tile_.groups; ++group) {
      if (met_count_[group] == 0) continue;
      const int row = group * kGroupRows, rows = group_rows(tile_, group);
      rule_.with_compare([&](auto compare) { probabilities<decltype(compare)::value>(group, from, first); });
      for (int m = 0; m < met_count_[group]; ++m)
        pieces_[m] = Piece<Op>{panels_.values(met_[group * plan_.block_panels + m]), operands<Op>(kPanel)};
      multiply_group<false>(rows, reinterpret_cast<const Op*>(logits_ + row * logits_stride_), logits_stride_,
                            Pieces<Op>{pieces_, met_count_[group], plan_.dv_padded}, plan_.dv_padded,
                            out_ + row * plan_.dv_padded, plan_.dv_padded, !first);
    }
  }

  // Asks for the rows that the next tile will gather, a few of its `kTileRows` at a time, in step with the
  // products: asked for all at once they would only wait for one another.
  REFORMER_INLINE_MEMBER void prefetch(const Head& head, const Running& running, int64_t rows) {
    for (const int64_t end = min_of<int64_t>(prefetched_ + rows, kTileRows); prefetched_ < end;
         ++prefetched_) {
      panels_.prefetch(prefetched_);
      const int64_t rank = tile_.first_rank + kTileRows + prefetched_;
      if (rank >= p_.L) continue;
      const int64_t position = head.order[tile_.round * p_.L + rank];
      if (p_.k.data)  // shared query-keys are asked for as keys
        prefetch_row(row_of<const T>(p_.q, head.b, head.h, position), p_.D * static_cast<int64_t>(sizeof(T)));
      if (tile_.round == 0) continue;
      prefetch_row(running_out(head, running, position), p_.Dv * static_cast<int64_t>(sizeof(float)));
      __builtin_prefetch(running.maximum + position);
      __builtin_prefetch(running.sum + position);
    }
  }

  // Turns a group's logits of the panels it meets into probabilities relative to each row's maximum, as
  // operands in the same memory, and updates maxima and sums.
  template <PairRule::Compare kCompare>
  void probabilities(int group, int64_t from, bool first) {
    const int64_t* met = met_ + group * plan_.block_panels;
    const int count = met_count_[group], begin = group * kGroupRows, end = begin + group_rows(tile_, group);
    vfloat largest[kGroupRows];
    for (vfloat& lanes : largest) lanes = splat(-kInfinity);
    for (int m = 0; m < count; ++m) {
      const Panel& keys = panels_.panel(met[m]);
      const bool simple = rule_.positions_decide(tile_, group, met[m], keys);
      for (int i = begin; i < end; ++i) {
        float* logit = logits_ + i * logits_stride_ + m * kPanel;
#pragma GCC unroll 2
        for (int half = 0; half < kPanel; half += kLanes) {
          vfloat s = load(logit + half);
          if (kIsPaired<Op>) s *= load(keys.factor + half);
          if (!simple) s += load(keys.bias + half);
          s = select(rule_.template visible<kCompare>(tile_, i, met[m], keys, half, simple), s,
                     splat(-kInfinity));
          store(logit + half, s);
          largest[i - begin] = vmax(s, largest[i - begin]);
        }
      }
    }
    // Row after row in steps, so that their horizontal sums and maxima wait side by side.
    float maxima[kGroupRows];
    vfloat sums[kGroupRows];
    for (int i = begin; i < end; ++i)
      maxima[i - begin] = max_of(maximum_[i], max_of_lanes(largest[i - begin]));
    for (int i = begin; i < end; ++i) {
      float* row = logits_ + i * logits_stride_;
      const float maximum = maxima[i - begin], shift = maximum == -kInfinity ? 0.0f : maximum;
      vfloat lanes{};
      for (int64_t k = 0; k < count * kPanel; k += kLanes) {
        vfloat p = exp2_of(load(row + k) - shift);
        if (row_codes_)
          p *= rule_.inverse_count(row_codes_ + i * p_.R, panels_.codes(met[k / kPanel]),
                                   static_cast<int>(k % kPanel), tile_.round);
        store(row + k, p);
        lanes += p;
      }
      sums[i - begin] = lanes;
    }
    for (int i = begin; i < end; ++i) {
      float* row = logits_ + i * logits_stride_;
      const float old = maximum_[i], maximum = maxima[i - begin];
      // Panels that no row may see, such as padding, are left out: then lanes are not counted from the first
      // key.
      const bool gapless = met[count - 1] - met[0] + 1 == count;
      float sum = p_.rule.rank_window && gapless ? sum_from_first_key(i, met[0], count, row)
                                                   : sum_of_lanes(sums[i - begin]);
      if (maximum == -kInfinity && sees_any<kCompare>(group, i)) sum = __builtin_nanf("");
      if (factors_)
        for (int m = 0; m < count; ++m) {
          const float* factors = factors_ + (i * plan_.block_panels + met[m] - from) * kPanel;
          for (int k = 0; k < kPanel; k += kLanes)
            store(row + m * kPanel + k, load(row + m * kPanel + k) * load(factors + k));
        }
      if constexpr (kIsPaired<Op>) {
        for (int64_t k = 0; k < count * kPanel; k += 2 * kLanes)  // an odd panel out has a neighbour unread
          store_pairs(row + k / 2, pairs_of_neighbours(load(row + k), load(row + k + kLanes)));
      }
      if (first) {
        sum_[i] = sum;
      } else {
        const float rescale = old == -kInfinity ? 0.0f : exp2_of(old - maximum);
        sum_[i] = sum_[i] * rescale + sum;
        float* out = out_ + i * plan_.dv_padded;
        for (int64_t k = 0; k < plan_.dv_padded; k += kLanes) store(out + k, load(out + k) * rescale);
      }
      maximum_[i] = maximum;
    }
  }

  // Whether a row that has no logit above -inf has keys at all: if it has, its logits overflowed, and a row
  // that nothing is known of must not pass for an empty one.
  template <PairRule::Compare kCompare>
  bool sees_any(int group, int i) const {
    const int64_t* met = met_ + group * plan_.block_panels;
    vint any{};
    for (int m = 0; m < met_count_[group]; ++m)
      for (int half = 0; half < kPanel; half += kLanes)
        any |= rule_.template visible<kCompare>(tile_, i, met[m], panels_.panel(met[m]), half, false);
    int32_t found = 0;
    for (int lane = 0; lane < kLanes; ++lane) found |= any[lane];
    return found != 0;
  }

  // The sum of row i's probabilities over `count` panels from panel `low` on, with lanes counted from the
  // row's first key. In a bucket window the order of addition is then the same wherever in a tile the row
  // lies: appended tokens, which move whole buckets, change no bit of earlier rows.
  float sum_from_first_key(int i, int64_t low, int64_t count, float* row) const {
    store(row + count * kPanel, vfloat{});
    const int64_t begin = max_of<int64_t>(tile_.low[i] - low * kPanel, 0);
    const int64_t end = min_of<int64_t>(tile_.high[i] - low * kPanel, count * kPanel);
    vfloat sum{};
    for (int64_t k = begin; k < end; k += kLanes) sum += load(row + k);
    return sum_of_lanes(sum);
  }

  // Merges the tile into the sums over rounds; in the last round, divides.
  void merge(const Head& head, const Running& running) {
    const bool first = tile_.round == 0, last = tile_.round == p_.R - 1;
    for (int i = 0; i < tile_.rows; ++i) {
      const int64_t position = tile_.position[i];
      float* out = out_ + i * plan_.dv_padded;
      float maximum = maximum_[i], sum = sum_[i];
      if (!first) {
        const float old = running.maximum[position];
        const float* old_out = running_out(head, running, position);
        const float old_sum = running.sum[position];
        if (old_sum != 0.0f) {  // NaN counts as something: a row that met NaN must not pass for an empty one
          const float top = max_of(old, maximum);
          const float keep = exp2_of(old - top), add = sum == 0.0f ? 0.0f : exp2_of(maximum - top);
          sum = old_sum * keep + sum * add;
          int64_t k = 0;
          for (; k + kLanes <= p_.Dv; k += kLanes)
            store(out + k, load(old_out + k) * keep + load(out + k) * add);
          for (; k < p_.Dv; ++k) out[k] = old_out[k] * keep + out[k] * add;
          maximum = top;
        }
      }
      if (last) {
        finish(head, position, maximum, sum, out);
        continue;
      }
      running.maximum[position] = maximum;
      running.sum[position] = sum;
      store_row(out, p_.Dv, 1.0f, running_out(head, running, position));
    }
  }

  void finish(const Head& head, int64_t position, float maximum, float sum, float* out) {
    float lse = maximum * kLn2 + __builtin_logf(sum), scale = 1.0f / sum;
    if (lse == kSelfOnlyLse) lse = __builtin_nextafterf(lse, 0.0f);  // the mark of a row that saw only itself
    if (sum == 0.0f) {                                               // nothing to attend to
      const bool itself = p_.rule.exclude_self && !is_padding_query(head, position);
      if (itself) load_row(row_of<const T>(p_.v, head.b, head.h, position), p_.Dv, plan_.dv_padded, out);
      lse = itself ? kSelfOnlyLse : -kInfinity;
      scale = itself ? 1.0f : 0.0f;
    }
    p_.lse[head.index * p_.L + position] = lse;
    store_row(out, p_.Dv, scale, row_of<T>(p_.out, head.b, head.h, position));
  }

  float* running_out(const Head& head, const Running& running, int64_t position) const {
    if constexpr (kIsFloat<T>) {
      (void)running;
      return row_of<float>(p_.out, head.b, head.h, position);
    } else {
      return running.out + position * p_.Dv;
    }
  }

  const AttentionParams& p_;
  const Plan& plan_;
  PairRule rule_;
  KeyPanels<T, false> panels_;
  Tile tile_;
  int64_t query_stride_ = 0, logits_stride_ = 0, prefetched_ = 0;
  Op* queries_ = nullptr;
  float *logits_ = nullptr, *out_ = nullptr, *factors_ = nullptr;
  int64_t* met_ = nullptr;  // (kTileGroups, block_panels): panels of the block that a group meets,
  int met_count_[kTileGroups];
  Piece<Op>* pieces_ = nullptr;  // and their values
  int32_t* row_codes_ = nullptr;
  float maximum_[kTileRows], sum_[kTileRows];
};

template <typename T>
struct Workspace {
  const AttentionParams& p;
  HeadTables tables;
  float *maximum = nullptr, *sum = nullptr, *out = nullptr;  // (heads, L, ...): see Running
  uint8_t* seen = nullptr;                                   // (heads, R, L)
  char* workers = nullptr;
  size_t worker_bytes = 0;

  Workspace(const AttentionParams& params, const Plan& plan, Arena* arena)
      : p(params), tables(p, plan, arena) {
    if (p.R > 1) {
      maximum = arena->take<float>(plan.heads * p.L);
      sum = arena->take<float>(plan.heads * p.L);
      if (!kIsFloat<T>) out = arena->take<float>(plan.heads * p.L * p.Dv);
    }
    seen = arena->take<uint8_t>(plan.heads * p.R * max_of(p.L, p.Lk));
    Arena one;
    ForwardWorker<T>(p, plan, &one);
    worker_bytes = one.used;
    workers = arena->take<char>(static_cast<int64_t>(worker_bytes) * p.threads);
  }

  Running running(int64_t slot) const {
    Running one;
    if (maximum) one.maximum = maximum + slot * p.L;
    if (sum) one.sum = sum + slot * p.L;
    if (out) one.out = out + slot * p.L * p.Dv;
    return one;
  }
};

template <typename T>
Status forward(const AttentionParams& p) {
  const Plan plan = make_plan(p);
  Arena arena{static_cast<char*>(p.workspace), 0};
  const Workspace<T> workspace(p, plan, &arena);
  Status status = Status::kOk;
#pragma omp parallel num_threads(p.threads)
  {
    Arena own{workspace.workers + static_cast<size_t>(thread_index()) * workspace.worker_bytes, 0};
    ForwardWorker<T> worker(p, plan, &own);
    for (int64_t first = 0; first < p.B * p.H; first += plan.heads) {
      const int64_t heads = min_of(plan.heads, p.B * p.H - first);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t task = 0; task < heads * plan.segments; ++task) {
        const Head head = workspace.tables.head(p, first, task / plan.segments);
        const int64_t begin = task % plan.segments * plan.segment_tiles * kTileRows;
        if (!head.inverse_norms) continue;
        for (int64_t i = begin; i < min_of(begin + plan.segment_tiles * kTileRows, p.L); ++i)
          head.inverse_norms[i] = inverse_norm<T>(p, head, i);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < heads * p.R; ++task) {
        const Head head = workspace.tables.head(p, first, task / p.R);
        const Status found =
            prepare_layout(p, plan, head, task % p.R, workspace.seen + task * max_of(p.L, p.Lk));
        if (found != Status::kOk) {
#pragma omp atomic write
          status = found;
        }
      }
      // The barrier at the end of the loop above makes `status` one value for all threads.
      if (status != Status::kOk) break;
      for (int64_t round = 0; round < p.R; ++round) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < heads * plan.segments; ++task) {
          const int64_t slot = task / plan.segments;
          worker.run_segment(workspace.tables.head(p, first, slot), workspace.running(slot), round,
                             task % plan.segments);
        }
      }
    }
  }
  return status;
}

template <typename T>
size_t workspace_bytes(const AttentionParams& p) {
  const Plan plan = make_plan(p);
  Arena arena;
  const Workspace<T> workspace(p, plan, &arena);
  return arena.used;
}

}  // namespace

size_t attention_forward_workspace_bytes(const AttentionParams& p) {
  return with_element(p.dtype, [&](auto element) { return workspace_bytes<decltype(element)>(p); });
}

Status attention_forward(const AttentionParams& p) {
  if (p.B * p.H == 0 || p.L == 0) return Status::kOk;
  return with_element(p.dtype, [&](auto element) { return forward<decltype(element)>(p); });
}

}  // namespace REFORMER_ISA
}  // namespace reformer
