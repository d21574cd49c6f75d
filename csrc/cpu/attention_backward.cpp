// Attention over sorted orders, backward. With p_ij = exp(s_ij - lse_i) / N_ij from the merged log-sum-exp
// and delta_i = out_i . dout_i - dlse_i, every round's part is exact on its own:
//
//   dv_j += p_ij m_ij dout_i          ds_ij = p_ij (m_ij dout_i . v_j - delta_i)
//   dq_i += ds_ij k_j                 dk_j += ds_ij q_i                       (m: dropout factor)
//
// Tasks are segments of one head's sorted queries in one round. Even segments run first, then odd ones, then
// the tiles whose keys cross into another round, so that no two tasks at work add to one row, and additions
// to a row come in an order that does not depend on the number of threads. Key normalisation is undone once a
// token, after the last round.

#include "gradient_rows.h"
#include "key_panels.h"
#include "threads.h"

namespace reformer {
namespace REFORMER_ISA {
namespace {

// Of a probability before it is divided by the number of times that its pair is met; more is rounding.
constexpr float kLargestExponent = 64.0f;

template <typename T>
class BackwardWorker {
  using Op = Operand<T>;
  static constexpr bool kPaired = kIsPaired<Op>;

 public:
  BackwardWorker(const AttentionParams& p, const AttentionGradients& g, const Plan& plan, Arena* arena)
      : p_(p), g_(g), plan_(plan), rule_(p, plan), panels_(p, plan, arena) {
    stride_ = plan.block_panels * kPanel;
    queries_ = arena->take<Op>(kTileRows * query_stride());
    grad_outs_ = arena->take<Op>(kTileRows * value_stride());
    paired_queries_ = kPaired ? arena->take<Op>(operands<Op>(kTileRows) * plan.d_padded) : queries_;
    paired_grad_outs_ = kPaired ? arena->take<Op>(operands<Op>(kTileRows) * plan.dv_padded) : grad_outs_;
    grad_queries_ = arena->take<float>(kTileRows * plan.d_padded);
    probabilities_ = arena->take<float>(kTileRows * kPanel);
    grad_probabilities_ = arena->take<float>(kTileRows * kPanel);
    grad_logits_ = arena->take<Op>(kTileRows * logits_stride());
    met_ = arena->take<int64_t>(kTileGroups * plan.block_panels);
    pieces_ = arena->take<Piece<Op>>(max_of<int64_t>(plan.block_panels, kTileGroups));
    if (dropout()) factors_ = arena->take<float>(kTileRows * stride_);
    if (p.rule.correct_duplicates) row_codes_ = arena->take<int32_t>(kTileRows * p.R);
  }

  enum class Part { kInner, kCrossing };

  void run_segment(const Head& head, const Sums& sums, int64_t round, int64_t segment, Part part) {
    const bool crossing = part == Part::kCrossing;
    panels_.enter(head, round * p_.Lk, (round + 1) * p_.Lk, crossing);
    panels_.grad_k_rows = sums.grad_k;
    panels_.grad_v_rows = sums.grad_v;
    panels_.grad_k_stride = sums.grad_k_stride;
    panels_.grad_v_stride = sums.grad_v_stride;
    Ranks ranks = key_segment(p_, plan_, head, round, segment);
    for (; ranks.first < ranks.last; ranks.first += kTileRows) {
      make_tile(p_, plan_, head, round, ranks, &tile_);
      if (tile_.crosses != crossing) continue;
      load_tile(head, sums);
      Block block = next_block(plan_, tile_, INT64_MIN);
      for (; block.from < tile_.last_panel; block = next_block(plan_, tile_, block.to))
        differentiate_block(head, sums, block.from, block.to);
      store_grad_queries(sums);
    }
    panels_.flush();
  }

 private:
  bool dropout() const { return p_.dropout_threshold > 0 || p_.keep_scale != 1.0f; }

  void load_tile(const Head& head, const Sums& sums) {
    for (int i = 0; i < tile_.rows; ++i) {
      const int64_t position = tile_.position[i];
      Op* query = queries_ + i * query_stride();
      if (is_padding_query(head, position))
        memset(query, 0, static_cast<size_t>(query_stride()) * sizeof(Op));
      else
        load_operands(row_of<const T>(p_.q, head.b, head.h, position), p_.D, plan_.d_padded, query);
      load_operands(row_of<const T>(g_.grad_out, head.b, head.h, position), p_.Dv, plan_.dv_padded,
                    grad_outs_ + i * value_stride());
      lse_[i] = p_.lse[head.index * p_.L + position] * kLog2E;
      delta_[i] = sums.delta[position];
      if (row_codes_)
        memcpy(row_codes_ + i * p_.R, head.codes + position * p_.R,
               static_cast<size_t>(p_.R) * sizeof(int32_t));
    }
    memset(grad_queries_, 0, static_cast<size_t>(tile_.rows * plan_.d_padded) * sizeof(float));
    if constexpr (kPaired) {
      if (tile_.rows % 2 == 1) {
        memset(queries_ + tile_.rows * query_stride(), 0, static_cast<size_t>(query_stride()) * sizeof(Op));
        memset(grad_outs_ + tile_.rows * value_stride(), 0, static_cast<size_t>(value_stride()) * sizeof(Op));
      }
      pair_rows(queries_, query_stride(), tile_.rows, paired_queries_);
      pair_rows(grad_outs_, value_stride(), tile_.rows, paired_grad_outs_);
    }
  }

  void differentiate_block(const Head& head, const Sums& sums, int64_t from, int64_t to) {
    panels_.require(from, to);
    if (factors_) rule_.write_dropout(head, tile_, panels_, from, to, factors_, stride_);
    for (int group = 0; group < tile_.groups; ++group) met_count_[group] = 0;
    prefetched_ = 0;
    for (int64_t panel = from; panel < to; ++panel) differentiate_panel(head, sums, panel, from, to);
    for (int group = 0; group < tile_.groups; ++group) {
      if (met_count_[group] == 0) continue;
      const int row = group * kGroupRows;
      for (int m = 0; m < met_count_[group]; ++m)
        pieces_[m] = Piece<Op>{panels_.keys(met_[group * plan_.block_panels + m]), operands<Op>(kPanel)};
      multiply_group<false>(group_rows(tile_, group), grad_logits_ + row * logits_stride(), logits_stride(),
                            Pieces<Op>{pieces_, met_count_[group], plan_.d_padded}, plan_.d_padded,
                            grad_queries_ + row * plan_.d_padded, plan_.d_padded, true);
    }
  }

  // Asks for the rows that the next tile will gather, a few of its `kTileRows` at a time, in step with the
  // products: asked for all at once they would only wait for one another.
  REFORMER_INLINE_MEMBER void prefetch(const Head& head, const Sums& sums, int64_t rows) {
    constexpr int64_t kBytes = sizeof(T);
    for (const int64_t end = min_of<int64_t>(prefetched_ + rows, kTileRows); prefetched_ < end;
         ++prefetched_) {
      panels_.prefetch(prefetched_);
      const int64_t rank = tile_.first_rank + kTileRows + prefetched_;
      if (rank >= p_.L) continue;
      const int64_t position = head.order[tile_.round * p_.L + rank];
      if (p_.k.data)  // shared query-keys are asked for as keys
        prefetch_row(row_of<const T>(p_.q, head.b, head.h, position), p_.D * kBytes);
      prefetch_row(row_of<const T>(g_.grad_out, head.b, head.h, position), p_.Dv * kBytes);
      prefetch_row(sums.grad_q + position * sums.grad_q_stride, p_.D * static_cast<int64_t>(sizeof(float)));
      __builtin_prefetch(p_.lse + head.index * p_.L + position);
      __builtin_prefetch(sums.delta + position);
    }
  }

  // One panel: for the groups of rows that meet it, probabilities and gradients of logits, packed one group
  // after the other; then dv and dk of its keys.
  void differentiate_panel(const Head& head, const Sums& sums, int64_t panel, int64_t from, int64_t to) {
    const Panel& keys = panels_.panel(panel);
    const Piece<Op> keys_t{panels_.keys_t(panel), operands<Op>(p_.D)};
    const Piece<Op> values_t{panels_.values_t(panel), operands<Op>(p_.Dv)};
    const int32_t* codes = row_codes_ ? panels_.codes(panel) : nullptr;
    const int64_t rows_a_step = ceil_div(kTileRows, (to - from) * tile_.groups);
    int64_t packed = 0;  // rows so far
    int runs = 0;        // of neighbouring groups
    for (int group = 0; group < tile_.groups; ++group) {
      if (to == tile_.last_panel) prefetch(head, sums, rows_a_step);
      if (!rule_.may_meet(tile_, group, panel, keys)) continue;
      const int row = group * kGroupRows, rows = group_rows(tile_, group), met = met_count_[group]++;
      met_[group * plan_.block_panels + met] = panel;
      multiply_group<false>(rows, queries_ + row * query_stride(), query_stride(),
                            Pieces<Op>{&keys_t, 1, kPanel}, kPanel, probabilities_ + packed * kPanel, kPanel,
                            false);
      multiply_group<false>(rows, grad_outs_ + row * value_stride(), value_stride(),
                            Pieces<Op>{&values_t, 1, kPanel}, kPanel, grad_probabilities_ + packed * kPanel,
                            kPanel, false);
      Op* grad_logits = grad_logits_ + row * logits_stride() + met * operands<Op>(kPanel);
      rule_.with_compare([&](auto compare) {
        if (codes || factors_)
          grad_logits_group<decltype(compare)::value, true>(row, rows, packed, panel, from, keys, codes,
                                                            grad_logits);
        else
          grad_logits_group<decltype(compare)::value, false>(row, rows, packed, panel, from, keys, codes,
                                                             grad_logits);
      });
      packed += rows;
      if (runs > 0 && runs_[runs - 1].row + runs_[runs - 1].rows == row)
        runs_[runs - 1].rows += rows;
      else
        runs_[runs++] = Run{row, rows};
    }
    if (packed == 0) return;
    add_product(probabilities_, paired_grad_outs_, plan_.dv_padded, runs, panels_.grad_v(panel));
    add_product(grad_probabilities_, paired_queries_, plan_.d_padded, runs, panels_.grad_k(panel));
  }

  // sums[key][k] += packed[row][key] rows[row][k], over the rows of the runs. No run but the last is odd.
  void add_product(const float* packed, const Op* rows, int64_t width, int runs, float* sums) {
    for (int run = 0; run < runs; ++run)
      pieces_[run] = Piece<Op>{rows + runs_[run].row / kNumbers<Op> * width, operands<Op>(runs_[run].rows)};
    multiply<true>(kPanel, reinterpret_cast<const Op*>(packed), kPanel, Pieces<Op>{pieces_, runs, width},
                   width, sums, width, true);
  }

  // Of one row and a panel: (dropped) probabilities, and gradients of logits.
  struct RowGradients {
    vfloat probabilities[kPanel / kLanes] = {}, logits[kPanel / kLanes] = {};
  };
  static_assert(kGroupRows % 2 == 0 && kTileRows % 2 == 0);

  // Rows [row, row + rows), packed from row `packed` on: turns logits and gradients of probabilities into
  // probabilities and gradients of logits, as operands that pair rows, in the same memory. The latter go to
  // `grad_logits` too, as operands that pair keys.
  template <PairRule::Compare kCompare, bool kWeighted>
  void grad_logits_group(int row, int rows, int64_t packed, int64_t panel, int64_t from, const Panel& keys,
                         const int32_t* codes, Op* grad_logits) {
    const bool simple = rule_.positions_decide(tile_, row / kGroupRows, panel, keys);
    for (int i = 0; i < rows; i += kNumbers<Op>) {
      RowGradients found[kNumbers<Op>];
      const int64_t first = (packed + i) * kPanel;
      found[0] = grad_logits_row<kCompare, kWeighted>(row + i, panel, from, keys, codes, simple, first);
      if (kPaired && i + 1 < rows)
        found[kNumbers<Op> - 1] = grad_logits_row<kCompare, kWeighted>(row + i + 1, panel, from, keys, codes,
                                                                       simple, first + kPanel);
      for (int half = 0; half < kPanel / kLanes; ++half) {
        const int64_t place = first / kNumbers<Op> + half * kLanes;
        if constexpr (kPaired) {
          store_pairs(probabilities_ + place,
                      pairs_of_rows(found[0].probabilities[half], found[1].probabilities[half]));
          store_pairs(grad_probabilities_ + place,
                      pairs_of_rows(found[0].logits[half], found[1].logits[half]));
        } else {
          store(probabilities_ + place, found[0].probabilities[half]);
          store(grad_probabilities_ + place, found[0].logits[half]);
          store(grad_logits + i * logits_stride() + half * kLanes, found[0].logits[half]);
        }
      }
      if constexpr (kPaired)
        for (int k = 0; k < 2 && i + k < rows; ++k)
          store_neighbours(found[k], grad_logits + (i + k) * logits_stride());
    }
  }

  static void store_neighbours(const RowGradients& row, Op* grad_logits) {
    if constexpr (kPanel == kLanes) {
      const auto pairs = pairs_of_neighbours(row.logits[0]);
      memcpy(grad_logits, &pairs, sizeof(pairs));
    } else {
      store_pairs(grad_logits, pairs_of_neighbours(row.logits[0], row.logits[1]));
    }
  }

  // Row i of the tile, whose logits and gradients of probabilities are at `place`. kWeighted: duplicates are
  // corrected or probabilities dropped. Paired operands need gradients of the products, not of the logits.
  template <PairRule::Compare kCompare, bool kWeighted>
  REFORMER_INLINE_MEMBER RowGradients grad_logits_row(int i, int64_t panel, int64_t from, const Panel& keys,
                                                      const int32_t* codes, bool simple, int64_t place) {
    RowGradients row;
#pragma GCC unroll 2
    for (int half = 0; half < kPanel; half += kLanes) {
      const vint visible = rule_.template visible<kCompare>(tile_, i, panel, keys, half, simple);
      vfloat s = load(probabilities_ + place + half);
      if (kPaired) s *= load(keys.factor + half);
      if (!simple) s += load(keys.bias + half);
      // A rounded log-sum-exp may fall below its own largest logit; of huge ones, far enough to overflow.
      vfloat p;
      if (kWeighted && codes) {
        p = vmin(exp2_of(vmin(s - lse_[i], splat(kLargestExponent))) *
                     rule_.inverse_count(row_codes_ + i * p_.R, codes, half, tile_.round),
                 splat(1.0f));
      } else {
        p = exp2_of(vmin(s - lse_[i], vfloat{}));
      }
      p = select(visible, p, vfloat{});
      vfloat grad = load(grad_probabilities_ + place + half);
      vfloat dropped = p;
      if (kWeighted && factors_) {
        const vfloat factor = load(factors_ + i * stride_ + (panel - from) * kPanel + half);
        dropped *= factor;
        grad *= factor;
      }
      row.probabilities[half / kLanes] = dropped;
      grad = select(visible, p * (grad - delta_[i]), vfloat{});
      row.logits[half / kLanes] = kPaired ? grad * load(keys.factor + half) : grad;
    }
    return row;
  }

  // The keys, and so these gradients, are in logit units, 1 / ln 2 times the size.
  void store_grad_queries(const Sums& sums) {
    for (int i = 0; i < tile_.rows; ++i) {
      const float* src = grad_queries_ + i * plan_.d_padded;
      float* dst = sums.grad_q + tile_.position[i] * sums.grad_q_stride;
      int64_t k = 0;
      if (tile_.round == 0) {
        store_row(src, p_.D, kLn2, dst);
        continue;
      }
      for (; k + kLanes <= p_.D; k += kLanes) store(dst + k, load(dst + k) + load(src + k) * kLn2);
      for (; k < p_.D; ++k) dst[k] += src[k] * kLn2;
    }
  }

  int64_t query_stride() const { return plan_.d_padded / kNumbers<Op>; }
  int64_t value_stride() const { return plan_.dv_padded / kNumbers<Op>; }
  // One vector more than the panels, so that rows do not fall on one another in the cache.
  int64_t logits_stride() const { return operands<Op>(stride_) + kLanes; }

  const AttentionParams& p_;
  const AttentionGradients& g_;
  const Plan& plan_;
  PairRule rule_;
  KeyPanels<T, true> panels_;
  Tile tile_;
  int64_t stride_ = 0, prefetched_ = 0;
  Op *queries_ = nullptr, *grad_outs_ = nullptr;                // rows of operands, as they come
  Op *paired_queries_ = nullptr, *paired_grad_outs_ = nullptr;  // for products that reduce over rows
  Op* grad_logits_ = nullptr;
  float* grad_queries_ = nullptr;
  float *probabilities_ = nullptr, *grad_probabilities_ = nullptr, *factors_ = nullptr;
  int64_t* met_ = nullptr;  // (kTileGroups, block_panels): panels of the block that a group meets
  int met_count_[kTileGroups];
  struct Run {
    int row, rows;
  };
  Run runs_[kTileGroups];
  Piece<Op>* pieces_ = nullptr;
  int32_t* row_codes_ = nullptr;
  float lse_[kTileRows], delta_[kTileRows];
};

template <typename T>
struct Workspace {
  const AttentionParams& p;
  const AttentionGradients& g;
  float *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr, *delta = nullptr;  // (heads, L, ...)
  uint8_t* seen = nullptr;                                                          // (heads, R, L)
  HeadTables tables;
  char* workers = nullptr;
  size_t worker_bytes = 0;

  Workspace(const AttentionParams& params, const AttentionGradients& gradients, const Plan& plan,
            Arena* arena)
      : p(params), g(gradients), tables(p, plan, arena) {
    if (!kIsFloat<T>) {
      grad_q = arena->take<float>(plan.heads * p.L * p.D);
      grad_v = arena->take<float>(plan.heads * p.Lk * p.Dv);
    }
    if (!kIsFloat<T> || !p.k.data) grad_k = arena->take<float>(plan.heads * p.Lk * p.D);
    delta = arena->take<float>(plan.heads * p.L);
    seen = arena->take<uint8_t>(plan.heads * p.R * max_of(p.L, p.Lk));
    Arena one;
    BackwardWorker<T>(p, g, plan, &one);
    worker_bytes = one.used;
    workers = arena->take<char>(static_cast<int64_t>(worker_bytes) * p.threads);
  }

  Head head_at(int64_t first, int64_t slot) const { return tables.head(p, first, slot); }
  Sums sums_at(const Head& head, int64_t slot) const {
    Sums sums;
    sums.grad_q = pick(grad_q, g.grad_q, head, slot * p.L, p.D, &sums.grad_q_stride);
    sums.grad_k = pick(grad_k, g.grad_k, head, slot * p.Lk, p.D, &sums.grad_k_stride);
    sums.grad_v = pick(grad_v, g.grad_v, head, slot * p.Lk, p.Dv, &sums.grad_v_stride);
    sums.delta = delta + slot * p.L;
    return sums;
  }

 private:
  float* pick(float* scratch, const Rows& rows, const Head& head, int64_t row, int64_t d,
              int64_t* stride) const {
    *stride = scratch ? d : rows.row_stride;
    return scratch ? scratch + row * d : row_of<float>(rows, head.b, head.h, 0);
  }
};

template <typename T>
Status backward(const AttentionParams& p, const AttentionGradients& g) {
  using Part = typename BackwardWorker<T>::Part;
  constexpr int64_t kRowsPerTask = 256;
  const Plan plan = make_plan(p);
  Arena arena{static_cast<char*>(p.workspace), 0};
  const Workspace<T> workspace(p, g, plan, &arena);
  const int64_t rows = max_of(p.L, p.Lk), row_tasks = ceil_div(rows, kRowsPerTask);
  const int64_t all_segments = key_segments(p, plan);
  const bool crossings = p.rule.ring && !plan.inside_bucket;
  Status status = Status::kOk;
#pragma omp parallel num_threads(p.threads)
  {
    Arena own{workspace.workers + static_cast<size_t>(thread_index()) * workspace.worker_bytes, 0};
    BackwardWorker<T> worker(p, g, plan, &own);
    alignas(64) float key[256 + kLanes], grad[256 + kLanes];
    for (int64_t first = 0; first < p.B * p.H; first += plan.heads) {
      const int64_t heads = min_of(plan.heads, p.B * p.H - first);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < heads * row_tasks; ++task) {
        const int64_t slot = task / row_tasks, begin = task % row_tasks * kRowsPerTask;
        const Head head = workspace.head_at(first, slot);
        const Sums sums = workspace.sums_at(head, slot);
        for (int64_t i = begin; i < min_of(begin + kRowsPerTask, rows); ++i) {
          if (i < p.L) prepare_query<T>(p, g, head, sums, i);
          if (i < p.Lk) prepare_key(p, sums, i);
        }
      }
      // Looked at again: a caller of the operator may have changed the layout since.
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < heads * p.R; ++task) {
        const Head head = workspace.head_at(first, task / p.R);
        const Status found = prepare_layout(p, plan, head, task % p.R, workspace.seen + task * rows);
        if (found != Status::kOk) {
#pragma omp atomic write
          status = found;
        }
      }
      if (status != Status::kOk) break;  // one value for all threads, by the barrier
      for (int64_t round = 0; round < p.R; ++round) {
        for (int64_t parity = 0; parity < 2; ++parity) {
          const int64_t segments = (all_segments + 1 - parity) / 2;
#pragma omp for schedule(dynamic, 1)
          for (int64_t task = 0; task < heads * segments; ++task) {
            const int64_t slot = task / segments;
            const Head head = workspace.head_at(first, slot);
            worker.run_segment(head, workspace.sums_at(head, slot), round, 2 * (task % segments) + parity,
                               Part::kInner);
          }
        }
        if (!crossings) continue;
#pragma omp for schedule(dynamic, 1)
        for (int64_t slot = 0; slot < heads; ++slot) {
          const Head head = workspace.head_at(first, slot);
          const Sums sums = workspace.sums_at(head, slot);
          for (int64_t segment = 0; segment < plan.segments; ++segment)
            worker.run_segment(head, sums, round, segment, Part::kCrossing);
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < heads * row_tasks; ++task) {
        const int64_t slot = task / row_tasks, begin = task % row_tasks * kRowsPerTask;
        const Head head = workspace.head_at(first, slot);
        const Sums sums = workspace.sums_at(head, slot);
        for (int64_t i = begin; i < min_of(begin + kRowsPerTask, rows); ++i) {
          if (i < p.Lk) finish_key<T>(p, g, plan, head, sums, i, key, grad);
          if (i < p.L) finish_query<T>(p, g, head, sums, i);
        }
      }
    }
  }
  return status;
}

template <typename T>
size_t workspace_bytes(const AttentionParams& p) {
  const Plan plan = make_plan(p);
  const AttentionGradients none;
  Arena arena;
  const Workspace<T> workspace(p, none, plan, &arena);
  return arena.used;
}

}  // namespace

size_t attention_backward_workspace_bytes(const AttentionParams& p) {
  return with_element(p.dtype, [&](auto element) { return workspace_bytes<decltype(element)>(p); });
}

Status attention_backward(const AttentionParams& p, const AttentionGradients& g) {
  if (p.B * p.H == 0 || p.L == 0) return Status::kOk;
  return with_element(p.dtype, [&](auto element) { return backward<decltype(element)>(p, g); });
}

}  // namespace REFORMER_ISA
}  // namespace reformer
