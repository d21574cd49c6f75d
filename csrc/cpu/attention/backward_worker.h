// What one thread does in attention's backward pass: it walks a segment of one head's tiles in one round.
//
// For each tile and panel of keys it computes p_ij and ds_ij as in backward.cpp and adds to dv_j, dk_j (in
// the panel) and dq_i (in the tile).
//
// The class is in an unnamed namespace because GCC then inlines what is called once.
#pragma once

#include "dropout.h"
#include "gradient_rows.h"
#include "mask.h"

namespace reformer {
namespace REFORMER_ISA {
namespace {

// The highest exponent of 2 for a probability that is yet to be divided by the number of rounds in which its
// pair meets. Anything above it is a rounding error.
constexpr float kLargestExponent = 64.0f;

template <typename T>
class BackwardWorker {
  using Op = Operand<T>;
  static constexpr bool kPaired = kIsPaired<Op>;

 public:
  BackwardWorker(const AttentionParams& p, const AttentionGradients& g, const Plan& plan, Arena* arena)
      : p_(p), g_(g), plan_(plan), mask_(p, plan), dropout_(p, plan), panels_(p, plan, arena) {
    stride_ = plan.block_panels * kPanel;
    queries_ = arena->take<Op>(kTileRows * query_stride());
    grad_outs_ = arena->take<Op>(kTileRows * value_stride());
    paired_queries_ = kPaired ? arena->take<Op>(operand_count<Op>(kTileRows) * plan.d_padded) : queries_;
    paired_grad_outs_ = kPaired ? arena->take<Op>(operand_count<Op>(kTileRows) * plan.dv_padded) : grad_outs_;
    grad_queries_ = arena->take<float>(kTileRows * plan.d_padded);
    probabilities_ = arena->take<float>(kTileRows * kPanel);
    grad_probabilities_ = arena->take<float>(kTileRows * kPanel);
    grad_logits_ = arena->take<Op>(kTileRows * logits_stride());
    met_panels_ = arena->take<int64_t>(kTileGroups * plan.block_panels);
    pieces_ = arena->take<Piece<Op>>(max_of<int64_t>(plan.block_panels, kTileGroups));
    if (has_dropout(p)) factors_ = arena->take<float>(kTileRows * stride_);
    if (p.rule.correct_duplicates) row_codes_ = arena->take<int32_t>(kTileRows * p.R);
  }

  // Which tiles of a segment to do: those whose keys are all of the round itself, or the others.
  enum class Part { kInner, kCrossing };

  void run_segment(const Head& head, const GradientSums& sums, int64_t round, int64_t segment, Part part) {
    const bool crossing = part == Part::kCrossing;
    panels_.enter(head, round, crossing);
    panels_.grad_k_rows = sums.grad_k;
    panels_.grad_v_rows = sums.grad_v;
    panels_.grad_k_stride = sums.grad_k_stride;
    panels_.grad_v_stride = sums.grad_v_stride;
    Ranks ranks = backward_segment(p_, plan_, head, round, segment);
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
  void load_tile(const Head& head, const GradientSums& sums) {
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
               static_cast<size_t>(code_rounds(p_, tile_.round)) * sizeof(int32_t));
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

  void differentiate_block(const Head& head, const GradientSums& sums, int64_t from, int64_t to) {
    panels_.require(from, to);
    if (factors_) dropout_.write_factors(head, tile_, panels_, from, to, factors_, stride_);
    for (int group = 0; group < tile_.groups; ++group) met_count_[group] = 0;
    prefetched_ = 0;
    for (int64_t panel = from; panel < to; ++panel) differentiate_panel(head, sums, panel, from, to);
    for (int group = 0; group < tile_.groups; ++group) {
      if (met_count_[group] == 0) continue;
      const int row = group * kGroupRows;
      for (int m = 0; m < met_count_[group]; ++m)
        pieces_[m] =
            Piece<Op>{panels_.keys(met_panels_[group * plan_.block_panels + m]), operand_count<Op>(kPanel)};
      multiply_group<false>(group_rows(tile_, group), grad_logits_ + row * logits_stride(), logits_stride(),
                            Pieces<Op>{pieces_, met_count_[group], plan_.d_padded}, plan_.d_padded,
                            grad_queries_ + row * plan_.d_padded, plan_.d_padded, true);
    }
  }

  // Prefetches `rows` of the kTileRows rows that the next tile will gather. A few at a time are spread over
  // the products of this tile, because requests that are made all at once wait for one another.
  REFORMER_INLINE_MEMBER void prefetch(const Head& head, const GradientSums& sums, int64_t rows) {
    constexpr int64_t kBytes = sizeof(T);
    for (const int64_t end = min_of<int64_t>(prefetched_ + rows, kTileRows); prefetched_ < end;
         ++prefetched_) {
      panels_.prefetch(prefetched_);
      const int64_t rank = tile_.first_rank + kTileRows + prefetched_;
      if (rank >= p_.L) continue;
      const int64_t position = head.order[tile_.round * p_.L + rank];
      if (p_.k.data)  // shared query-keys were already prefetched as keys
        prefetch_row(row_of<const T>(p_.q, head.b, head.h, position), p_.D * kBytes);
      prefetch_row(row_of<const T>(g_.grad_out, head.b, head.h, position), p_.Dv * kBytes);
      prefetch_row(sums.grad_q + position * sums.grad_q_stride, p_.D * static_cast<int64_t>(sizeof(float)));
      __builtin_prefetch(p_.lse + head.index * p_.L + position);
      __builtin_prefetch(sums.delta + position);
    }
  }

  // Differentiates one panel: first the probabilities and the gradients of logits for each group of rows that
  // meets it, packed one group after the other, then dv and dk of its keys.
  void differentiate_panel(const Head& head, const GradientSums& sums, int64_t panel, int64_t from,
                           int64_t to) {
    const Panel& keys = panels_.panel(panel);
    const Piece<Op> keys_t{panels_.keys_t(panel), operand_count<Op>(p_.D)};
    const Piece<Op> values_t{panels_.values_t(panel), operand_count<Op>(p_.Dv)};
    const int32_t* codes = code_rounds(p_, tile_.round) > 0 ? panels_.codes(panel) : nullptr;
    const int64_t rows_per_step = ceil_div(kTileRows, (to - from) * tile_.groups);
    int64_t packed = 0;  // rows packed so far
    int runs = 0;        // runs of neighbouring groups
    for (int group = 0; group < tile_.groups; ++group) {
      if (to == tile_.last_panel) prefetch(head, sums, rows_per_step);
      if (!mask_.may_meet(tile_, group, panel, keys)) continue;
      const int row = group * kGroupRows, rows = group_rows(tile_, group), met = met_count_[group]++;
      met_panels_[group * plan_.block_panels + met] = panel;
      multiply_group<false>(rows, queries_ + row * query_stride(), query_stride(),
                            Pieces<Op>{&keys_t, 1, kPanel}, kPanel, probabilities_ + packed * kPanel, kPanel,
                            false);
      multiply_group<false>(rows, grad_outs_ + row * value_stride(), value_stride(),
                            Pieces<Op>{&values_t, 1, kPanel}, kPanel, grad_probabilities_ + packed * kPanel,
                            kPanel, false);
      Op* grad_logits = grad_logits_ + row * logits_stride() + met * operand_count<Op>(kPanel);
      mask_.with_compare([&](auto compare) {
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

  // sums[key][k] += sum over the rows of the runs of packed[row][key] rows[row][k]. Only the last run may
  // have an odd number of rows.
  void add_product(const float* packed, const Op* rows, int64_t width, int runs, float* sums) {
    for (int run = 0; run < runs; ++run)
      pieces_[run] = Piece<Op>{rows + runs_[run].row / kValuesPerOperand<Op> * width,
                               operand_count<Op>(runs_[run].rows)};
    multiply<true>(kPanel, reinterpret_cast<const Op*>(packed), kPanel, Pieces<Op>{pieces_, runs, width},
                   width, sums, width, true);
  }

  // The probabilities, after dropout, and the gradients of logits of one row and a panel.
  struct RowGradients {
    vfloat probabilities[kPanel / kLanes] = {}, logits[kPanel / kLanes] = {};
  };
  static_assert(kGroupRows % 2 == 0 && kTileRows % 2 == 0);

  // For rows [row, row + rows) of the tile, which are packed from row `packed` on: turns logits into
  // probabilities and gradients of probabilities into gradients of logits, in the same memory, as operands of
  // products that sum over rows. Gradients of logits also go to `grad_logits`, as operands of products that
  // sum over keys.
  template <PairMask::Compare kCompare, bool kWeighted>
  void grad_logits_group(int row, int rows, int64_t packed, int64_t panel, int64_t from, const Panel& keys,
                         const int32_t* codes, Op* grad_logits) {
    const bool by_position = mask_.positions_decide(tile_, row / kGroupRows, panel, keys);
    for (int i = 0; i < rows; i += kValuesPerOperand<Op>) {
      RowGradients gradients[kValuesPerOperand<Op>];
      const int64_t first = (packed + i) * kPanel;
      gradients[0] =
          grad_logits_row<kCompare, kWeighted>(row + i, panel, from, keys, codes, by_position, first);
      if (kPaired && i + 1 < rows)
        gradients[kValuesPerOperand<Op> - 1] = grad_logits_row<kCompare, kWeighted>(
            row + i + 1, panel, from, keys, codes, by_position, first + kPanel);
      for (int half = 0; half < kPanel / kLanes; ++half) {
        const int64_t offset = first / kValuesPerOperand<Op> + half * kLanes;
        if constexpr (kPaired) {
          store_pairs(probabilities_ + offset,
                      pairs_of_rows(gradients[0].probabilities[half], gradients[1].probabilities[half]));
          store_pairs(grad_probabilities_ + offset,
                      pairs_of_rows(gradients[0].logits[half], gradients[1].logits[half]));
        } else {
          store(probabilities_ + offset, gradients[0].probabilities[half]);
          store(grad_probabilities_ + offset, gradients[0].logits[half]);
          store(grad_logits + i * logits_stride() + half * kLanes, gradients[0].logits[half]);
        }
      }
      if constexpr (kPaired)
        for (int k = 0; k < 2 && i + k < rows; ++k)
          store_neighbours(gradients[k], grad_logits + (i + k) * logits_stride());
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

  // Differentiates row i of the tile, whose logits and gradients of probabilities are at `offset`. kWeighted
  // says that duplicates are corrected or that there is dropout. With paired operands the results are the
  // gradients of the products, which KeyScale::factor turned into logits.
  template <PairMask::Compare kCompare, bool kWeighted>
  REFORMER_INLINE_MEMBER RowGradients grad_logits_row(int i, int64_t panel, int64_t from, const Panel& keys,
                                                      const int32_t* codes, bool by_position,
                                                      int64_t offset) {
    RowGradients row;
#pragma GCC unroll 2
    for (int half = 0; half < kPanel; half += kLanes) {
      vint visible = mask_.template visible<kCompare>(tile_, i, panel, keys, half, by_position);
      vfloat s = load(probabilities_ + offset + half);
      if (kPaired) s *= load(keys.factor + half);
      if (!by_position) s += load(keys.bias + half);
      // A rounded log-sum-exp may lie below its own largest logit, far enough to overflow if that is huge.
      vfloat p;
      if (kWeighted && codes && p_.rule.ring) {
        p = vmin(exp2_of(vmin(s - lse_[i], splat(kLargestExponent))) *
                     mask_.inverse_count(row_codes_ + i * p_.R, codes, half),
                 splat(1.0f));
      } else {
        if (kWeighted && codes) visible &= mask_.first_met(row_codes_ + i * p_.R, codes, half, tile_.round);
        p = exp2_of(vmin(s - lse_[i], vfloat{}));
      }
      p = select(visible, p, vfloat{});
      vfloat grad = load(grad_probabilities_ + offset + half);
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

  // Adds the tile's gradients to the sums of its queries. Keys were multiplied by log2(e), so these gradients
  // are multiplied by ln 2.
  void store_grad_queries(const GradientSums& sums) {
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

  int64_t query_stride() const { return plan_.d_padded / kValuesPerOperand<Op>; }
  int64_t value_stride() const { return plan_.dv_padded / kValuesPerOperand<Op>; }
  // One vector longer than the panels need, so that rows do not compete for the same cache lines.
  int64_t logits_stride() const { return operand_count<Op>(stride_) + kLanes; }

  const AttentionParams& p_;
  const AttentionGradients& g_;
  const Plan& plan_;
  PairMask mask_;
  Dropout dropout_;
  KeyPanels<T, true> panels_;
  Tile tile_;
  int64_t stride_ = 0, prefetched_ = 0;
  Op *queries_ = nullptr, *grad_outs_ = nullptr;                // rows as they were gathered
  Op *paired_queries_ = nullptr, *paired_grad_outs_ = nullptr;  // for products that sum over rows
  Op* grad_logits_ = nullptr;
  float* grad_queries_ = nullptr;
  float *probabilities_ = nullptr, *grad_probabilities_ = nullptr, *factors_ = nullptr;
  int64_t* met_panels_ = nullptr;  // (kTileGroups, block_panels): panels of the block that a group meets
  int met_count_[kTileGroups];
  struct Run {
    int row, rows;
  };
  Run runs_[kTileGroups];
  Piece<Op>* pieces_ = nullptr;
  int32_t* row_codes_ = nullptr;
  float lse_[kTileRows], delta_[kTileRows];
};

}  // namespace
}  // namespace REFORMER_ISA
}  // namespace reformer
