// LSH hashing: bucket = argmax([xR; -xR]).
#include <cstring>

#include "variants.h"

namespace REFORMER_ISA_NAMESPACE {
namespace {

float load_float(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint32_t h = static_cast<const uint16_t*>(data)[i];
  uint32_t bits;
  float value;
  if (dtype == DType::kBFloat16) {
    bits = h << 16;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  bits = (h & 0x7fffu) << 13;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  std::memcpy(&bits, &value, 4);
  if ((h & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  bits |= (h & 0x8000u) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

void lsh_hash(const HashParams& p) {
  int32_t n = 1;
  for (int32_t f = 0; f < p.n_factors; ++f) n *= p.factors[f];
  const int64_t rows = p.B * p.H * p.L;
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = row % p.L, h = row / p.L % p.H, b = row / p.L / p.H;
    const int64_t at = b * p.x.batch_stride + h * p.x.head_stride + i * p.x.row_stride;
    const float* rotation = p.rotations + (p.rotation_heads == 1 ? 0 : h) * p.D * p.R * p.rotation_width;
    for (int64_t r = 0; r < p.R; ++r) {
      int32_t id = 0, unit = 1;
      int64_t column = r * p.rotation_width;
      bool finite = true;
      for (int32_t f = 0; f < p.n_factors; ++f) {
        const int32_t half = p.factors[f] / 2;
        float high = 0, low = 0;
        int32_t argmax = 0, argmin = 0;
        for (int32_t c = 0; c < half; ++c) {
          float dot = 0;
          for (int64_t d = 0; d < p.D; ++d) {
            dot += load_float(p.x.data, p.dtype, at + d) * rotation[d * p.R * p.rotation_width + column + c];
          }
          finite = finite && dot * 0 == 0;
          if (c == 0 || dot > high) high = dot, argmax = c;
          if (c == 0 || dot < low) low = dot, argmin = c;
        }
        id += unit * (high >= -low ? argmax : half + argmin);
        unit *= p.factors[f];
        column += half;
      }
      if (!finite) id = 0;
      if (p.padding && p.padding[b * p.L + i]) id = n;
      p.buckets[((b * p.H + h) * p.R + r) * p.L + i] = id;
    }
  }
}

}  // namespace REFORMER_ISA_NAMESPACE
