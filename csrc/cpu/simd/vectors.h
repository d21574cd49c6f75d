// Vectors of REFORMER_LANES floats, written once for all instruction sets.
//
// Kernel sources are compiled once for each instruction set (see ../variants.h), with REFORMER_ISA naming it
// and REFORMER_LANES its vector length: 4 portable, 8 for AVX2, 16 for AVX-512. GCC's vector types do most of
// the rest; what needs an intrinsic of its own is in this folder, under #if. Everything is static and in the
// namespace of the instruction set: if the linker could share a function between them, a machine without
// AVX-512 might run AVX-512 code. That is also why no standard header with inline functions is included.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#endif

#include "../../kernels.h"

#define REFORMER_INLINE static inline __attribute__((always_inline))
// The same for members. Functions that only prefetch need it, because GCC takes them for pure and would drop
// the call.
#define REFORMER_INLINE_MEMBER inline __attribute__((always_inline))

namespace reformer {
namespace REFORMER_ISA {

constexpr int kLanes = REFORMER_LANES;

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
typedef float vfloat4 __attribute__((vector_size(16)));

template <typename T>
REFORMER_INLINE T min_of(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
REFORMER_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}
REFORMER_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

template <typename V, typename T>
REFORMER_INLINE V load_as(const T* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}
REFORMER_INLINE vfloat load(const float* p) { return load_as<vfloat>(p); }
REFORMER_INLINE vint load(const int32_t* p) { return load_as<vint>(p); }
REFORMER_INLINE void store(float* p, vfloat v) { memcpy(p, &v, sizeof(v)); }

REFORMER_INLINE vfloat splat(float x) { return x - vfloat{}; }
REFORMER_INLINE vint splat(int32_t x) { return x - vint{}; }
// For each lane, `a` where `mask` is all ones and `b` where it is zero.
REFORMER_INLINE vfloat select(vint mask, vfloat a, vfloat b) { return mask ? a : b; }
REFORMER_INLINE vfloat vmax(vfloat a, vfloat b) { return a > b ? a : b; }
REFORMER_INLINE vfloat vmin(vfloat a, vfloat b) { return a > b ? b : a; }  // NaN in `a` stays
REFORMER_INLINE vint iota() {
  vint v{};
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = lane;
  return v;
}

// Horizontal results are computed by halving: lane i is combined with lane i + n/2, and so on. The order of
// addition is therefore fixed.
template <int kWidth>
REFORMER_INLINE vfloat swap_lanes(vfloat v) {
#define REFORMER_FOUR(lane) \
  (lane) ^ kWidth, ((lane) + 1) ^ kWidth, ((lane) + 2) ^ kWidth, ((lane) + 3) ^ kWidth
#if REFORMER_LANES == 4
  return __builtin_shufflevector(v, v, REFORMER_FOUR(0));
#elif REFORMER_LANES == 8
  return __builtin_shufflevector(v, v, REFORMER_FOUR(0), REFORMER_FOUR(4));
#else
  return __builtin_shufflevector(v, v, REFORMER_FOUR(0), REFORMER_FOUR(4), REFORMER_FOUR(8),
                                 REFORMER_FOUR(12));
#endif
#undef REFORMER_FOUR
}
REFORMER_INLINE float sum_of_lanes(vfloat v) {
#if REFORMER_LANES > 8
  v += swap_lanes<8>(v);
#endif
#if REFORMER_LANES > 4
  v += swap_lanes<4>(v);
#endif
  v += swap_lanes<2>(v);
  v += swap_lanes<1>(v);
  return v[0];
}
REFORMER_INLINE float max_of_lanes(vfloat v) {
#if REFORMER_LANES > 8
  v = vmax(v, swap_lanes<8>(v));
#endif
#if REFORMER_LANES > 4
  v = vmax(v, swap_lanes<4>(v));
#endif
  v = vmax(v, swap_lanes<2>(v));
  v = vmax(v, swap_lanes<1>(v));
  return v[0];
}

// Lane i of the result is table[index[i]]; indices are in [0, kLanes).
REFORMER_INLINE vfloat look_up(vfloat table, vint index) {
#if REFORMER_LANES == 16 && defined(__AVX512F__)
  return (vfloat)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif REFORMER_LANES == 8 && defined(__AVX2__)
  return (vfloat)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
#else
  vfloat values{};
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = table[index[lane]];
  return values;
#endif
}

// 2^x to about 2 ulp for x in [-126, 127]; 0 for lower x, and NaN for NaN and +inf. Finite x above 127 are
// not supported. The polynomial is a minimax fit to (2^f - 1) / f on [-1/2, 1/2], with a relative error of
// 9e-8 in 2^f.
REFORMER_INLINE vfloat exp2_of(vfloat x) {
  constexpr float kLowest = -126.0f;
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits of the mantissa.
  constexpr float kShift = 12582912.0f;
  const vfloat shifted = x + kShift;
  const vfloat f = x - (shifted - kShift);
  vfloat y = splat(1.326472614891827e-3f);
  y = y * f + 9.671512991189957e-3f;
  y = y * f + 5.550733581185341e-2f;
  y = y * f + 2.4022242426872253e-1f;
  y = y * f + 6.931470036506653e-1f;
  y = y * f + 1.0f;
  vuint shifted_bits, bits;  // for x below kLowest they wrap around and are not used
  memcpy(&shifted_bits, &shifted, sizeof(bits));
  memcpy(&bits, &y, sizeof(bits));
  bits += shifted_bits << 23;  // this drops the bits of kShift; those of the integer remain
  memcpy(&y, &bits, sizeof(bits));
  return select(x < kLowest, vfloat{}, y);
}
REFORMER_INLINE float exp2_of(float x) { return exp2_of(splat(x))[0]; }

// Transposes the 4x4 matrix in each 128-bit part of a, b, c, d.
REFORMER_INLINE void transpose4(vfloat& a, vfloat& b, vfloat& c, vfloat& d) {
#if REFORMER_LANES == 4
#define REFORMER_LOW(x, y) __builtin_shufflevector(x, y, 0, 4, 1, 5)
#define REFORMER_HIGH(x, y) __builtin_shufflevector(x, y, 2, 6, 3, 7)
#define REFORMER_EVEN(x, y) __builtin_shufflevector(x, y, 0, 1, 4, 5)
#define REFORMER_ODD(x, y) __builtin_shufflevector(x, y, 2, 3, 6, 7)
#elif REFORMER_LANES == 8
#define REFORMER_LOW(x, y) __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13)
#define REFORMER_HIGH(x, y) __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15)
#define REFORMER_EVEN(x, y) __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13)
#define REFORMER_ODD(x, y) __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define REFORMER_LOW(x, y) \
  __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define REFORMER_HIGH(x, y) \
  __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define REFORMER_EVEN(x, y) \
  __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define REFORMER_ODD(x, y) \
  __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#endif
  const vfloat ab_low = REFORMER_LOW(a, b), ab_high = REFORMER_HIGH(a, b);
  const vfloat cd_low = REFORMER_LOW(c, d), cd_high = REFORMER_HIGH(c, d);
  a = REFORMER_EVEN(ab_low, cd_low);
  b = REFORMER_ODD(ab_low, cd_low);
  c = REFORMER_EVEN(ab_high, cd_high);
  d = REFORMER_ODD(ab_high, cd_high);
#undef REFORMER_LOW
#undef REFORMER_HIGH
#undef REFORMER_EVEN
#undef REFORMER_ODD
}

// Loads four words from each of kLanes / 4 addresses that are `stride` words apart.
template <typename Word>
REFORMER_INLINE vfloat load_quarters(const Word* p, int64_t stride) {
#if REFORMER_LANES == 4
  (void)stride;
  return load_as<vfloat>(p);
#else
  typedef float vfloat8 __attribute__((vector_size(32)));
  const vfloat4 a = load_as<vfloat4>(p), b = load_as<vfloat4>(p + stride);
  const vfloat8 low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
#if REFORMER_LANES == 8
  return low;
#else
  const vfloat4 c = load_as<vfloat4>(p + 2 * stride), d = load_as<vfloat4>(p + 3 * stride);
  const vfloat8 high = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#endif
#endif
}

// out[column * out_stride + row] = in[row * in_stride + column] for kLanes rows and `columns` columns of
// 4-byte words.
template <typename Word>
REFORMER_INLINE void transpose_lanes(const Word* in, int64_t in_stride, int64_t columns, Word* out,
                                     int64_t out_stride) {
  static_assert(sizeof(Word) == sizeof(float));
  int64_t column = 0;
  for (; column + 4 <= columns; column += 4) {
    // Vector j holds four columns of rows j, 4 + j, 8 + j ..., so only the 128-bit parts need transposing.
    vfloat a = load_quarters(in + column, 4 * in_stride);
    vfloat b = load_quarters(in + in_stride + column, 4 * in_stride);
    vfloat c = load_quarters(in + 2 * in_stride + column, 4 * in_stride);
    vfloat d = load_quarters(in + 3 * in_stride + column, 4 * in_stride);
    transpose4(a, b, c, d);
    Word* o = out + column * out_stride;
    memcpy(o, &a, sizeof(a));
    memcpy(o + out_stride, &b, sizeof(b));
    memcpy(o + 2 * out_stride, &c, sizeof(c));
    memcpy(o + 3 * out_stride, &d, sizeof(d));
  }
  for (; column < columns; ++column)
    for (int row = 0; row < kLanes; ++row) out[column * out_stride + row] = in[row * in_stride + column];
}

}  // namespace REFORMER_ISA
}  // namespace reformer
