// Conversion between stored elements (float32, bfloat16, float16) and float32: single ones, vectors and rows.
#pragma once

#include "vectors.h"

namespace reformer {
namespace REFORMER_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls f with an element of the type that `dtype` names.
template <typename F>
REFORMER_INLINE auto with_element(DType dtype, F f) {
  if (dtype == DType::kBFloat16) return f(BFloat16());
  if (dtype == DType::kFloat16) return f(Float16());
  return f(float());
}

template <typename T>
inline constexpr bool kIsFloat = false;
template <>
inline constexpr bool kIsFloat<float> = true;

REFORMER_INLINE float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
REFORMER_INLINE uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

REFORMER_INLINE float to_float(float x) { return x; }
REFORMER_INLINE float to_float(BFloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }
REFORMER_INLINE float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponent biases differ by 127 - 15, so the shifted bits are 2^-112 of the value. Multiplying, rather
  // than adding to the exponent, is right for denormals too.
  const float value = float_of_bits(magnitude << 13) * 0x1p112f;
  return float_of_bits(sign | bits_of_float(value));
}

REFORMER_INLINE void from_float(float x, float* out) { *out = x; }
REFORMER_INLINE void from_float(float x, BFloat16* out) {
  const uint32_t bits = bits_of_float(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  out->bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}
REFORMER_INLINE void from_float(float x, Float16* out) {
  const uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is a denormal: adding 0.5 leaves it, rounded, in the low bits.
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
  } else {
    half = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

REFORMER_INLINE vfloat load_floats(const float* p) { return load(p); }
REFORMER_INLINE vfloat load_floats(const BFloat16* p) {
  typedef uint16_t vshort __attribute__((vector_size(kLanes * 2)));
  const vuint bits = __builtin_convertvector(load_as<vshort>(p), vuint) << 16;
  vfloat v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}
REFORMER_INLINE vfloat load_floats(const Float16* p) {
#if defined(__AVX512F__) && REFORMER_LANES == 16
  return (vfloat)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__) && REFORMER_LANES == 8
  return (vfloat)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
  vfloat v{};
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = to_float(p[lane]);
  return v;
#endif
}

// dst[0 .. n) = scale * src in float32, and dst[n .. padded) = 0.
template <typename T>
REFORMER_INLINE void load_row(const T* src, int64_t n, int64_t padded, float* dst, float scale = 1.0f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load_floats(src + i) * scale);
  for (; i < n; ++i) dst[i] = to_float(src[i]) * scale;
  for (; i < padded; ++i) dst[i] = 0.0f;
}

// dst[0 .. n) = scale * src, rounded to T.
template <typename T>
REFORMER_INLINE void store_row(const float* src, int64_t n, float scale, T* dst) {
  for (int64_t i = 0; i < n; ++i) from_float(src[i] * scale, dst + i);
}
REFORMER_INLINE void store_row(const float* src, int64_t n, float scale, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i) * scale);
  for (; i < n; ++i) dst[i] = src[i] * scale;
}

// dst[0 .. n) += scale * src.
REFORMER_INLINE void add_row(const float* src, int64_t n, float scale, float* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(dst + i) + load(src + i) * scale);
  for (; i < n; ++i) dst[i] += src[i] * scale;
}

template <typename T>
REFORMER_INLINE T* row_of(const Rows& rows, int64_t b, int64_t h, int64_t i) {
  return static_cast<T*>(rows.data) + b * rows.batch_stride + h * rows.head_stride + i * rows.row_stride;
}

// Prefetches a row of `bytes` bytes. Rows are gathered in sorted order, which the hardware cannot predict.
REFORMER_INLINE void prefetch_row(const void* row, int64_t bytes) {
  const char* p = static_cast<const char*>(row);
  const char* end = p + bytes;  // a row need not begin on a cache line
  for (p -= reinterpret_cast<uintptr_t>(p) % 64; p < end; p += 64) __builtin_prefetch(p);
}

}  // namespace REFORMER_ISA
}  // namespace reformer
