// From shared query-keys to keys: k = q * inverse_norm(q), and how bfloat16 pairs hold such a key.
#pragma once

#include "layout.h"

namespace reformer {
namespace REFORMER_ISA {

// The factor that normalises a query-key, so that its key is row * factor: 1 / sqrt(sum x^2 + 1e-6 D) for
// kRms, 1 / max(sqrt(sum x^2), 1e-12) for kL2. Squares that overflow are summed again in double.
template <typename T>
static float inverse_norm_of(const T* row, int64_t D, KeyNorm norm) {
  constexpr float kRmsEpsilon = 1e-6f, kL2Smallest = 1e-12f;
  vfloat lanes{};
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) lanes += load_floats(row + i) * load_floats(row + i);
  float squares = sum_of_lanes(lanes);
  for (; i < D; ++i) squares += to_float(row[i]) * to_float(row[i]);
  if (squares == kInfinity) {
    double sum = 0.0;
    for (i = 0; i < D; ++i)
      sum += static_cast<double>(to_float(row[i])) * static_cast<double>(to_float(row[i]));
    return static_cast<float>(1.0 / __builtin_sqrt(sum));
  }
  if (norm == KeyNorm::kRms) return 1.0f / __builtin_sqrtf(squares + kRmsEpsilon * static_cast<float>(D));
  return 1.0f / max_of(__builtin_sqrtf(squares), kL2Smallest);
}

// The same for query-key `position`.
template <typename T>
static float inverse_norm(const AttentionParams& p, const Head& head, int64_t position) {
  return inverse_norm_of(row_of<const T>(p.q, head.b, head.h, position), p.D, p.rule.key_norm);
}

// How bfloat16 pairs represent a normalised and scaled key. Rounding that key to bfloat16 would cost the
// logits too much precision, so the pairs hold the key as it was given, times `power`, a power of two that
// keeps sums of products from overflowing. Each product is then multiplied by `factor` to become a logit.
// A gradient that includes `factor` is that of the key as the pairs hold it; times `gradient`, it is that
// of the key as it was given.
struct KeyScale {
  float power = 1.0f, factor, gradient;

  KeyScale(const AttentionParams& p, float inverse_norm) {
    if (inverse_norm < 0x1p-40f || inverse_norm > 0x1p40f)
      power = max_of(float_of_bits(bits_of_float(inverse_norm) & 0x7f800000u), 0x1p-126f);
    factor = inverse_norm / power * (p.scale * kLog2E);
    gradient = power * kLn2;
  }
};

}  // namespace REFORMER_ISA
}  // namespace reformer
