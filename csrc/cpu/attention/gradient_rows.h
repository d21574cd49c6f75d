// What the backward pass of attention does once for each row, before and after the tiles.
//
// Before: delta_i = out_i . dout_i - dlse_i and the norm of query i, and zeros for the sums of key j. After:
// the gradients of q, k and v from the sums, which undoes scale and key normalisation. For a key
// k = q / |q|, that is dq += (dk - (dk . k) k) / |q|.
#pragma once

#include "key_norm.h"

namespace reformer {
namespace REFORMER_ISA {

// Computes delta_i and the norm of query i.
template <typename T>
static void prepare_query(const AttentionParams& p, const AttentionGradients& g, const Head& head,
                          const GradientSums& sums, int64_t i) {
  const T* out = row_of<const T>(p.out, head.b, head.h, i);
  const T* grad_out = row_of<const T>(g.grad_out, head.b, head.h, i);
  vfloat lanes{};
  int64_t k = 0;
  for (; k + kLanes <= p.Dv; k += kLanes) lanes += load_floats(out + k) * load_floats(grad_out + k);
  float delta = sum_of_lanes(lanes);
  for (; k < p.Dv; ++k) delta += to_float(out[k]) * to_float(grad_out[k]);
  if (g.grad_lse) delta -= g.grad_lse[head.index * p.L + i];
  sums.delta[i] = delta;
  if (head.inverse_norms) head.inverse_norms[i] = inverse_norm<T>(p, head, i);
}

// Sets to zero the sums of key j, to which tiles add.
static void prepare_key(const AttentionParams& p, const GradientSums& sums, int64_t j) {
  memset(sums.grad_k + j * sums.grad_k_stride, 0, static_cast<size_t>(p.D) * sizeof(float));
  memset(sums.grad_v + j * sums.grad_v_stride, 0, static_cast<size_t>(p.Dv) * sizeof(float));
  if (sums.along) sums.along[j] = 0.0f;
}

// Turns the sums of key j into the gradients of k and v. For shared query-keys, the key's gradient is in that
// of q, from which this takes the part along the key. A query that saw only itself adds its grad_out to the
// gradient of its own value. Padding was read as zeros, so its gradients are zero.
template <typename T>
static void finish_key(const AttentionParams& p, const AttentionGradients& g, const Head& head,
                       const GradientSums& sums, int64_t j) {
  const bool padding = is_padding(head, j);
  float* grad_k = sums.grad_k + j * sums.grad_k_stride;
  float* grad_v = sums.grad_v + j * sums.grad_v_stride;
  if (padding) {
    memset(grad_k, 0, static_cast<size_t>(p.D) * sizeof(float));
    memset(grad_v, 0, static_cast<size_t>(p.Dv) * sizeof(float));
  } else if (p.rule.exclude_self && p.lse[head.index * p.L + j] == kSelfOnlyLse) {
    const T* grad_out = row_of<const T>(g.grad_out, head.b, head.h, j);
    for (int64_t k = 0; k < p.Dv; ++k) grad_v[k] += to_float(grad_out[k]);
  }
  if constexpr (!kIsFloat<T>) store_row(grad_v, p.Dv, 1.0f, row_of<T>(g.grad_v, head.b, head.h, j));
  if (p.k.data) {
    const float scale = kIsPaired<Operand<T>> ? KeyScale(p, 1.0f).gradient : p.scale;
    store_row(grad_k, p.D, scale, row_of<T>(g.grad_k, head.b, head.h, j));
  } else if (head.inverse_norms && !padding) {
    const float inverse = head.inverse_norms[j];
    // A divisor that does not depend on the key leaves the gradient as it is.
    if (p.rule.key_norm == KeyNorm::kL2 && inverse >= 1e12f) return;
    const T* key = row_of<const T>(p.q, head.b, head.h, j);
    const float factor = sums.along[j] * inverse;
    int64_t k = 0;
    for (; k + kLanes <= p.D; k += kLanes)
      store(grad_k + k, load(grad_k + k) - load_floats(key + k) * factor);
    for (; k < p.D; ++k) grad_k[k] -= to_float(key[k]) * factor;
  }
}

// Turns the sum of query i into its gradient; comes after finish_key.
template <typename T>
static void finish_query(const AttentionParams& p, const AttentionGradients& g, const Head& head,
                         const GradientSums& sums, int64_t i) {
  float* grad_q = sums.grad_q + i * sums.grad_q_stride;
  if (is_padding_query(head, i)) memset(grad_q, 0, static_cast<size_t>(p.D) * sizeof(float));
  if constexpr (!kIsFloat<T>) store_row(grad_q, p.D, 1.0f, row_of<T>(g.grad_q, head.b, head.h, i));
}

}  // namespace REFORMER_ISA
}  // namespace reformer
