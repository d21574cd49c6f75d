// What one thread does in attention's forward pass: it walks a segment of one head's tiles in one round.
//
// For each tile it computes logits s_ij = scale q_i . k_j + bias_j (times log2(e)), their running maximum m_i
// and sum, and out_i = sum_j 2^(s_ij - m_i) v_j; then it merges these into the row's sums over the rounds
// done so far. The last round divides by the sum.
//
// The class is in an unnamed namespace because GCC then inlines what is called once.
#pragma once

#include "dropout.h"
#include "mask.h"

namespace reformer {
namespace REFORMER_ISA {
namespace {

// The sums of one head over the rounds done so far, by position.
struct RunningRows {
  float* maximum = nullptr;
  float* sum = nullptr;
  float* out = nullptr;  // outputs before division; null for float32, which keeps them in the output itself
};

template <typename T>
class ForwardWorker {
  using Op = Operand<T>;

 public:
  ForwardWorker(const AttentionParams& p, const Plan& plan, Arena* arena)
      : p_(p), plan_(plan), mask_(p, plan), dropout_(p, plan), panels_(p, plan, arena) {
    logits_stride_ = plan.block_panels * kPanel + kLanes;  // room for sum_from_first_key's last vector
    query_stride_ = plan.d_padded / kValuesPerOperand<Op>;
    queries_ = arena->take<Op>(kTileRows * query_stride_);
    logits_ = arena->take<float>(kTileRows * logits_stride_);
    out_ = arena->take<float>(kTileRows * plan.dv_padded);
    met_panels_ = arena->take<int64_t>(kTileGroups * plan.block_panels);
    pieces_ = arena->take<Piece<Op>>(plan.block_panels);
    if (has_dropout(p)) factors_ = arena->take<float>(kTileRows * plan.block_panels * kPanel);
    if (p.rule.correct_duplicates) row_codes_ = arena->take<int32_t>(kTileRows * p.R);
  }

  void run_segment(const Head& head, const RunningRows& running, int64_t round, int64_t segment) {
    panels_.enter(head, round, p_.rule.ring);
    for (Ranks ranks = forward_segment(p_, plan_, segment); ranks.first < ranks.last;
         ranks.first += kTileRows) {
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
  void load_queries(const Head& head) {
    for (int i = 0; i < tile_.rows; ++i) {
      Op* row = queries_ + i * query_stride_;
      if (is_padding_query(head, tile_.position[i]))
        memset(row, 0, static_cast<size_t>(query_stride_) * sizeof(Op));
      else
        load_operands(row_of<const T>(p_.q, head.b, head.h, tile_.position[i]), p_.D, plan_.d_padded, row);
      if (row_codes_)
        memcpy(row_codes_ + i * p_.R, head.codes + tile_.position[i] * p_.R,
               static_cast<size_t>(code_rounds(p_, tile_.round)) * sizeof(int32_t));
    }
  }

  void clear_rows() {
    for (int i = 0; i < tile_.rows; ++i) maximum_[i] = -kInfinity, sum_[i] = 0.0f;
    memset(out_, 0, static_cast<size_t>(tile_.rows * plan_.dv_padded) * sizeof(float));
  }

  // Adds the keys of panels [from, to) to maximum_, sum_ and out_.
  void attend_block(const Head& head, const RunningRows& running, int64_t from, int64_t to) {
    const bool first = from == tile_.first_panel;
    if (first) clear_rows();
    panels_.require(from, to);
    if (factors_)
      dropout_.write_factors(head, tile_, panels_, from, to, factors_, plan_.block_panels * kPanel);
    for (int group = 0; group < tile_.groups; ++group) met_count_[group] = 0;
    prefetched_ = 0;
    const int64_t rows_per_step = ceil_div(kTileRows, (to - from) * tile_.groups);
    for (int64_t panel = from; panel < to; ++panel) {
      const Piece<Op> keys{panels_.keys_t(panel), operand_count<Op>(p_.D)};
      for (int group = 0; group < tile_.groups; ++group) {
        if (to == tile_.last_panel) prefetch(head, running, rows_per_step);
        if (!mask_.may_meet(tile_, group, panel, panels_.panel(panel))) continue;
        const int row = group * kGroupRows, met = met_count_[group]++;
        met_panels_[group * plan_.block_panels + met] = panel;
        multiply_group<false>(group_rows(tile_, group), queries_ + row * query_stride_, query_stride_,
                              Pieces<Op>{&keys, 1, kPanel}, kPanel,
                              logits_ + row * logits_stride_ + met * kPanel, logits_stride_, false);
      }
    }
    for (int group = 0; group < tile_.groups; ++group) {
      if (met_count_[group] == 0) continue;
      const int row = group * kGroupRows, rows = group_rows(tile_, group);
      mask_.with_compare([&](auto compare) { probabilities<decltype(compare)::value>(group, from, first); });
      for (int m = 0; m < met_count_[group]; ++m)
        pieces_[m] =
            Piece<Op>{panels_.values(met_panels_[group * plan_.block_panels + m]), operand_count<Op>(kPanel)};
      multiply_group<false>(rows, reinterpret_cast<const Op*>(logits_ + row * logits_stride_), logits_stride_,
                            Pieces<Op>{pieces_, met_count_[group], plan_.dv_padded}, plan_.dv_padded,
                            out_ + row * plan_.dv_padded, plan_.dv_padded, !first);
    }
  }

  // Prefetches `rows` of the kTileRows rows that the next tile will gather. A few at a time are spread over
  // the products of this tile, because requests that are made all at once wait for one another.
  REFORMER_INLINE_MEMBER void prefetch(const Head& head, const RunningRows& running, int64_t rows) {
    for (const int64_t end = min_of<int64_t>(prefetched_ + rows, kTileRows); prefetched_ < end;
         ++prefetched_) {
      panels_.prefetch(prefetched_);
      const int64_t rank = tile_.first_rank + kTileRows + prefetched_;
      if (rank >= p_.L) continue;
      const int64_t position = head.order[tile_.round * p_.L + rank];
      if (p_.k.data)  // shared query-keys were already prefetched as keys
        prefetch_row(row_of<const T>(p_.q, head.b, head.h, position), p_.D * static_cast<int64_t>(sizeof(T)));
      if (tile_.round == 0) continue;
      prefetch_row(running_out(head, running, position), p_.Dv * static_cast<int64_t>(sizeof(float)));
      __builtin_prefetch(running.maximum + position);
      __builtin_prefetch(running.sum + position);
    }
  }

  // Turns a group's logits of the panels it meets into 2^(logit - the row's maximum), stored as operands in
  // the same memory, and updates the rows' maxima and sums.
  template <PairMask::Compare kCompare>
  void probabilities(int group, int64_t from, bool first) {
    const int64_t* met = met_panels_ + group * plan_.block_panels;
    const int count = met_count_[group], begin = group * kGroupRows, end = begin + group_rows(tile_, group);
    const bool leaves_pairs = mask_.leaves_pairs(tile_.round);
    const bool counts_on_ring = p_.rule.correct_duplicates && p_.rule.ring;
    vfloat largest[kGroupRows];
    for (vfloat& lanes : largest) lanes = splat(-kInfinity);
    for (int m = 0; m < count; ++m) {
      const Panel& keys = panels_.panel(met[m]);
      const bool by_position = mask_.positions_decide(tile_, group, met[m], keys);
      for (int i = begin; i < end; ++i) {
        float* logit = logits_ + i * logits_stride_ + m * kPanel;
#pragma GCC unroll 2
        for (int half = 0; half < kPanel; half += kLanes) {
          vfloat s = load(logit + half);
          if (kIsPaired<Op>) s *= load(keys.factor + half);
          if (!by_position) s += load(keys.bias + half);
          vint visible = mask_.template visible<kCompare>(tile_, i, met[m], keys, half, by_position);
          if (leaves_pairs) visible &= first_met(i, met[m], half);
          s = select(visible, s, splat(-kInfinity));
          store(logit + half, s);
          largest[i - begin] = vmax(s, largest[i - begin]);
        }
      }
    }
    // Each step goes over all rows, so that the latencies of their horizontal sums and maxima overlap.
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
        if (counts_on_ring)
          p *= mask_.inverse_count(row_codes_ + i * p_.R, panels_.codes(met[k / kPanel]),
                                   static_cast<int>(k % kPanel));
        store(row + k, p);
        lanes += p;
      }
      sums[i - begin] = lanes;
    }
    for (int i = begin; i < end; ++i) {
      float* row = logits_ + i * logits_stride_;
      const float old = maximum_[i], maximum = maxima[i - begin];
      // Where panels that no row may see, such as padding, were skipped, the first key's lane is not known.
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
        // After an odd number of panels the second vector is not a panel's, and its result is not read.
        for (int64_t k = 0; k < count * kPanel; k += 2 * kLanes)
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

  REFORMER_INLINE_MEMBER vint first_met(int i, int64_t panel, int half) const {
    return mask_.first_met(row_codes_ + i * p_.R, panels_.codes(panel), half, tile_.round);
  }

  // Whether a row whose logits are all -inf sees any key. If it does, its logits overflowed, and its result
  // is unknown rather than empty.
  template <PairMask::Compare kCompare>
  bool sees_any(int group, int i) const {
    const int64_t* met = met_panels_ + group * plan_.block_panels;
    vint any{};
    const bool leaves_pairs = mask_.leaves_pairs(tile_.round);
    for (int m = 0; m < met_count_[group]; ++m)
      for (int half = 0; half < kPanel; half += kLanes) {
        vint visible = mask_.template visible<kCompare>(tile_, i, met[m], panels_.panel(met[m]), half, false);
        if (leaves_pairs) visible &= first_met(i, met[m], half);
        any |= visible;
      }
    int32_t all_lanes = 0;
    for (int lane = 0; lane < kLanes; ++lane) all_lanes |= any[lane];
    return all_lanes != 0;
  }

  // The sum of row i's probabilities over `count` panels from panel `low` on, taken in vectors that begin at
  // the row's first key. With a rank window the order of addition is then the same wherever in a tile the row
  // lies, so appended tokens, which move whole buckets, change no bit of earlier rows.
  float sum_from_first_key(int i, int64_t low, int64_t count, float* row) const {
    store(row + count * kPanel, vfloat{});
    const int64_t begin = max_of<int64_t>(tile_.low[i] - low * kPanel, 0);
    const int64_t end = min_of<int64_t>(tile_.high[i] - low * kPanel, count * kPanel);
    vfloat sum{};
    for (int64_t k = begin; k < end; k += kLanes) sum += load(row + k);
    return sum_of_lanes(sum);
  }

  // Merges the tile into the sums over rounds; in the last round, writes the result.
  void merge(const Head& head, const RunningRows& running) {
    const bool first = tile_.round == 0, last = tile_.round == p_.R - 1;
    for (int i = 0; i < tile_.rows; ++i) {
      const int64_t position = tile_.position[i];
      float* out = out_ + i * plan_.dv_padded;
      float maximum = maximum_[i], sum = sum_[i];
      if (!first) {
        const float old = running.maximum[position];
        const float* old_out = running_out(head, running, position);
        const float old_sum = running.sum[position];
        if (old_sum != 0.0f) {  // true for NaN too: a row that met NaN is not empty
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

  // Writes out = out / sum and the log-sum-exp of one row.
  void finish(const Head& head, int64_t position, float maximum, float sum, float* out) {
    float lse = maximum * kLn2 + __builtin_logf(sum), scale = 1.0f / sum;
    if (lse == kSelfOnlyLse) lse = __builtin_nextafterf(lse, 0.0f);  // that value is reserved
    if (sum == 0.0f) {                                               // there was nothing to attend to
      const bool itself = p_.rule.exclude_self && !is_padding_query(head, position);
      if (itself) load_row(row_of<const T>(p_.v, head.b, head.h, position), p_.Dv, plan_.dv_padded, out);
      lse = itself ? kSelfOnlyLse : -kInfinity;
      scale = itself ? 1.0f : 0.0f;
    }
    p_.lse[head.index * p_.L + position] = lse;
    store_row(out, p_.Dv, scale, row_of<T>(p_.out, head.b, head.h, position));
  }

  float* running_out(const Head& head, const RunningRows& running, int64_t position) const {
    if constexpr (kIsFloat<T>) {
      (void)running;
      return row_of<float>(p_.out, head.b, head.h, position);
    } else {
      return running.out + position * p_.Dv;
    }
  }

  const AttentionParams& p_;
  const Plan& plan_;
  PairMask mask_;
  Dropout dropout_;
  KeyPanels<T, false> panels_;
  Tile tile_;
  int64_t query_stride_ = 0, logits_stride_ = 0, prefetched_ = 0;
  Op* queries_ = nullptr;
  float *logits_ = nullptr, *out_ = nullptr, *factors_ = nullptr;
  int64_t* met_panels_ = nullptr;  // (kTileGroups, block_panels): panels of the block that a group meets
  int met_count_[kTileGroups];
  Piece<Op>* pieces_ = nullptr;  // the values of these panels
  int32_t* row_codes_ = nullptr;
  float maximum_[kTileRows], sum_[kTileRows];
};

}  // namespace
}  // namespace REFORMER_ISA
}  // namespace reformer
