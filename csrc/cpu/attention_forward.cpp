// Attention over sorted orders, forward: out_i = sum_j p_ij v_j, p_i = softmax over the keys of all rounds.
//
// One task walks a segment of one head's tiles in one round. A tile computes its logits, their running
// maximum and sum, and the product with the values, and merges them into the row's place in the output,
// which holds sums over the rounds done so far; the last round divides. Rounds follow one another, so a row
// is added to in the order of the rounds whatever the number of threads.

#ifdef _OPENMP
#include <omp.h>
#endif

#include "key_panels.h"

namespace reformer {
namespace REFORMER_ISA {
namespace {

// Sums over the rounds done so far of one group of heads. Arrays are indexed [head in group][position].
struct Running {
  float* maximum = nullptr;
  float* sum = nullptr;
  float* out = nullptr;  // unnormalised outputs, where the output's own dtype cannot hold them
  int32_t* codes = nullptr;
};

template <typename T>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<float> = true;

template <typename T>
class ForwardWorker {
 public:
  ForwardWorker(const AttentionParams& p, const Plan& plan, Arena* arena)
      : p_(p), plan_(plan), rule_(p, plan), panels_(p, plan, arena) {
    logits_stride_ = plan.block_panels * kPanel + 2 * kLanes;
    queries_ = arena->take<float>(kTileRows * plan.d_padded);
    logits_ = arena->take<float>(kTileRows * logits_stride_);
    out_ = arena->take<float>(kTileRows * plan.dv_padded);
    pieces_ = arena->take<const float*>(plan.block_panels);
    if (dropout()) factors_ = arena->take<float>(kTileRows * plan.block_panels * kPanel);
    if (p.rule.correct_duplicates) row_codes_ = arena->take<int32_t>(kTileRows * p.R);
  }

  void run_segment(const Head& head, const Running& running, int64_t round, int64_t segment) {
    panels_.enter(head, round * p_.L, (round + 1) * p_.L, p_.rule.ring);
    const int64_t first = segment * plan_.segment_tiles;
    for (int64_t t = first; t < min_of(first + plan_.segment_tiles, plan_.tiles); ++t) {
      make_tile(p_, plan_, head, round, t, &tile_);
      load_queries(head);
      for (int64_t from = tile_.first_panel; from < tile_.last_panel; from += plan_.block_panels)
        attend_block(head, from, min_of(from + plan_.block_panels, tile_.last_panel));
      if (tile_.first_panel == tile_.last_panel) clear_rows();
      merge(head, running);
    }
  }

 private:
  bool dropout() const { return p_.dropout_threshold > 0 || p_.keep_scale != 1.0f; }

  void load_queries(const Head& head) {
    for (int i = 0; i < tile_.rows; ++i) {
      float* row = queries_ + i * plan_.d_padded;
      if (is_padding(head, tile_.position[i]))
        memset(row, 0, static_cast<size_t>(plan_.d_padded) * sizeof(float));
      else
        load_row(row_of<const T>(p_.q, head.b, head.h, tile_.position[i]), p_.D, plan_.d_padded, row);
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
  void attend_block(const Head& head, int64_t from, int64_t to) {
    const bool first = from == tile_.first_panel;
    if (first) clear_rows();
    panels_.require(from, to);
    if (factors_) rule_.write_dropout(head, tile_, from, to, factors_, plan_.block_panels * kPanel);
    float* logits = logits_ + kLanes;  // a margin of one vector on either side: see probabilities()
    for (int64_t panel = from; panel < to; ++panel) {
      const float* keys = panels_.keys_t(panel);
      const Pieces pieces{&keys, 1, p_.D, kPanel};
      for (int group = 0; group < tile_.groups; ++group) {
        if (panel < tile_.panel_low[group] || panel >= tile_.panel_high[group]) continue;
        const int row = group * kGroupRows;
        multiply_group<false>(group_rows(tile_, group), queries_ + row * plan_.d_padded, plan_.d_padded, pieces,
                              kPanel, logits + row * logits_stride_ + (panel - from) * kPanel, logits_stride_, false);
      }
      pieces_[panel - from] = panels_.values(panel);
    }
    for (int group = 0; group < tile_.groups; ++group) {
      const int64_t low = max_of(tile_.panel_low[group], from), high = min_of(tile_.panel_high[group], to);
      if (low >= high) continue;
      const int row = group * kGroupRows, rows = group_rows(tile_, group);
      for (int i = row; i < row + rows; ++i) probabilities(i, from, low, high, first);
      const Pieces pieces{pieces_ + (low - from), high - low, kPanel, plan_.dv_padded};
      multiply_group<false>(rows, logits + row * logits_stride_ + (low - from) * kPanel, logits_stride_, pieces,
                            plan_.dv_padded, out_ + row * plan_.dv_padded, plan_.dv_padded, !first);
    }
  }

  // Turns row i's logits of panels [low, high), held from panel `from` on, into probabilities relative to the
  // row's maximum, and updates its maximum and sum.
  void probabilities(int i, int64_t from, int64_t low, int64_t high, bool first) {
    float* row = logits_ + kLanes + i * logits_stride_ + (low - from) * kPanel;
    const int64_t count = (high - low) * kPanel;
    vfloat largest = splat(-kInfinity);
    for (int64_t panel = low; panel < high; ++panel) {
      const Panel& keys = panels_.panel(panel);
      float* logit = row + (panel - low) * kPanel;
      for (int half = 0; half < kPanel; half += kLanes) {
        vfloat s = load(logit + half);
        if (!keys.plain) s += load(keys.bias + half);
        s = select(rule_.visible(tile_, i, panel, keys, half), s, splat(-kInfinity));
        store(logit + half, s);
        largest = vmax(s, largest);
      }
    }
    const float old = maximum_[i], maximum = max_of(old, max_of_lanes(largest));
    const float shift = maximum == -kInfinity ? 0.0f : maximum;
    for (int64_t k = 0; k < count; k += kLanes) {
      vfloat p = exp_of(load(row + k) - shift);
      if (row_codes_)
        p *= rule_.inverse_count(row_codes_ + i * p_.R, panels_.codes(low + k / kPanel), static_cast<int>(k % kPanel));
      store(row + k, p);
    }
    const float sum = sum_row(i, low, high, row);
    if (factors_) {
      const float* factors = factors_ + i * plan_.block_panels * kPanel + (low - from) * kPanel;
      for (int64_t k = 0; k < count; k += kLanes) store(row + k, load(row + k) * load(factors + k));
    }
    if (first) {
      sum_[i] = sum;
    } else {
      const float rescale = old == -kInfinity ? 0.0f : exp_of(old - shift);
      sum_[i] = sum_[i] * rescale + sum;
      float* out = out_ + i * plan_.dv_padded;
      for (int64_t k = 0; k < plan_.dv_padded; k += kLanes) store(out + k, load(out + k) * rescale);
    }
    maximum_[i] = maximum;
  }

  // The sum of a row of probabilities over panels [low, high). In a bucket window the lanes are counted from
  // the row's first key, so that the order of addition is the same wherever in a tile the row lies: appended
  // tokens, which move whole buckets, then change no bit of earlier rows.
  float sum_row(int i, int64_t low, int64_t high, float* row) const {
    const int64_t count = (high - low) * kPanel;
    vfloat sum{};
    if (!p_.rule.bucket_window) {
      for (int64_t k = 0; k < count; k += kLanes) sum += load(row + k);
      return sum_of_lanes(sum);
    }
    store(row + count, vfloat{});
    const int64_t begin = max_of<int64_t>(tile_.low[i] - low * kPanel, 0);
    const int64_t end = min_of<int64_t>(tile_.high[i] - low * kPanel, count);
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
          const float keep = exp_of(old - top), add = sum == 0.0f ? 0.0f : exp_of(maximum - top);
          sum = old_sum * keep + sum * add;
          int64_t k = 0;
          for (; k + kLanes <= p_.Dv; k += kLanes) store(out + k, load(old_out + k) * keep + load(out + k) * add);
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
    float lse = maximum + __builtin_logf(sum), scale = 1.0f / sum;
    if (sum == 0.0f) {  // nothing to attend to
      const bool itself = p_.rule.exclude_self && !is_padding(head, position);
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
  int64_t logits_stride_ = 0;
  float *queries_ = nullptr, *logits_ = nullptr, *out_ = nullptr, *factors_ = nullptr;
  const float** pieces_ = nullptr;
  int32_t* row_codes_ = nullptr;
  float maximum_[kTileRows], sum_[kTileRows];
};

Running running_of(const AttentionParams& p, const Running& all, int64_t slot) {
  Running one;
  one.maximum = all.maximum ? all.maximum + slot * p.L : nullptr;
  one.sum = all.sum ? all.sum + slot * p.L : nullptr;
  one.out = all.out ? all.out + slot * p.L * p.Dv : nullptr;
  one.codes = all.codes ? all.codes + slot * p.L * p.R : nullptr;
  return one;
}

template <typename T>
struct Workspace {
  Running running;
  uint8_t* seen = nullptr;  // (heads, L)
  Arena workers;

  Workspace(const AttentionParams& p, const Plan& plan, Arena* arena) {
    if (p.R > 1) {
      running.maximum = arena->take<float>(plan.heads * p.L);
      running.sum = arena->take<float>(plan.heads * p.L);
      if (!kIsFloat<T>) running.out = arena->take<float>(plan.heads * p.L * p.Dv);
    }
    if (p.rule.correct_duplicates) running.codes = arena->take<int32_t>(plan.heads * p.L * p.R);
    seen = arena->take<uint8_t>(plan.heads * p.L);
    workers = *arena;
    Arena one;
    ForwardWorker<T>(p, plan, &one);
    worker_bytes = one.used;
    arena->take<char>(static_cast<int64_t>(worker_bytes) * p.threads);
  }
  Arena worker_arena(int thread) const {
    return Arena{workers.base + workers.used + static_cast<size_t>(thread) * worker_bytes, 0};
  }
  size_t worker_bytes = 0;
};

template <typename T>
Status forward(const AttentionParams& p) {
  const Plan plan = make_plan(p);
  Arena arena{static_cast<char*>(p.workspace), 0};
  const Workspace<T> workspace(p, plan, &arena);
  Status status = Status::kOk;
#pragma omp parallel num_threads(p.threads)
  {
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    Arena own = workspace.worker_arena(thread);
    ForwardWorker<T> worker(p, plan, &own);
    for (int64_t first = 0; first < p.B * p.H; first += plan.heads) {
      const int64_t heads = min_of(plan.heads, p.B * p.H - first);
      const auto head_at = [&](int64_t slot) {
        Head head = make_head(p, first + slot);
        head.codes = running_of(p, workspace.running, slot).codes;
        return head;
      };
#pragma omp for schedule(dynamic, 1)
      for (int64_t slot = 0; slot < heads; ++slot) {
        const Head head = head_at(slot);
        for (int64_t round = 0; round < p.R; ++round) {
          const Status found = check_layout(p, head, round, workspace.seen + slot * p.L);
          if (found != Status::kOk) {
#pragma omp atomic write
            status = found;
          } else if (head.codes) {
            write_codes(p, plan, head, round);
          }
        }
      }
      // The barrier at the end of the loop above makes `status` one value for all threads.
      if (status != Status::kOk) break;
      for (int64_t round = 0; round < p.R; ++round) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < heads * plan.segments; ++task) {
          const int64_t slot = task / plan.segments;
          worker.run_segment(head_at(slot), running_of(p, workspace.running, slot), round, task % plan.segments);
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
  switch (p.dtype) {
    case DType::kFloat32: return workspace_bytes<float>(p);
    case DType::kBFloat16: return workspace_bytes<BFloat16>(p);
    case DType::kFloat16: return workspace_bytes<Float16>(p);
  }
  return 0;
}

Status attention_forward(const AttentionParams& p) {
  if (p.B * p.H == 0 || p.L == 0) return Status::kOk;
  switch (p.dtype) {
    case DType::kFloat32: return forward<float>(p);
    case DType::kBFloat16: return forward<BFloat16>(p);
    case DType::kFloat16: return forward<Float16>(p);
  }
  return Status::kOk;
}

}  // namespace REFORMER_ISA
}  // namespace reformer
