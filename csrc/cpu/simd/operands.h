// The operands of attention's matrix products: floats or, where REFORMER_BF16_PAIRS is defined (AVX512-BF16),
// pairs of bfloat16 values that are neighbours along the dimension that the product sums over.
//
// The AVX512-BF16 instruction adds to a float32 the product of the high halves of two pairs, rounds, adds the
// product of the low halves, and rounds again. Pairs of rows therefore hold the first row in the high half:
// a sum over rows is then one chain of additions in rising order, as with floats, however rows are paired.
// The instruction takes denormal values for zero.
#pragma once

#include "elements.h"

namespace reformer {
namespace REFORMER_ISA {

struct Pair {
  uint32_t bits;
};

template <typename T>
struct OperandOf {
  using type = float;  // 16-bit elements are widened
};
#ifdef REFORMER_BF16_PAIRS
template <>
struct OperandOf<BFloat16> {
  using type = Pair;
};
#endif
// The operands that rows of elements T become.
template <typename T>
using Operand = typename OperandOf<T>::type;

template <typename Op>
inline constexpr bool kIsPaired = false;
template <>
inline constexpr bool kIsPaired<Pair> = true;

// The number of values in one operand, and of operands that n values take.
template <typename Op>
constexpr int kValuesPerOperand = kIsPaired<Op> ? 2 : 1;
template <typename Op>
REFORMER_INLINE int64_t operand_count(int64_t n) {
  return (n + kValuesPerOperand<Op> - 1) / kValuesPerOperand<Op>;
}

template <typename Op>
struct OperandVectorOf {
  using type = vfloat;
};
template <>
struct OperandVectorOf<Pair> {
  using type = vuint;
};
template <typename Op>
using OperandVector = typename OperandVectorOf<Op>::type;

REFORMER_INLINE vfloat multiply_add(vfloat sum, float a, vfloat b) { return sum + a * b; }

typedef uint32_t vhalf __attribute__((vector_size(kLanes * 2)));

REFORMER_INLINE void store_pairs(void* out, vuint pairs) { memcpy(out, &pairs, sizeof(pairs)); }

#ifdef __AVX512BF16__
REFORMER_INLINE vfloat multiply_add(vfloat sum, Pair a, vuint b) {
  return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(a.bits - vuint{}), (__m512bh)b);
}

// The pair (first, second) of each lane, rounded to bfloat16, with `first` in the high half.
REFORMER_INLINE vuint pairs_of_rows(vfloat first, vfloat second) {
  typedef uint16_t vbfloat16s __attribute__((vector_size(kLanes * 4)));
  const vbfloat16s zip = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vuint)_mm512_permutexvar_epi16((__m512i)zip,
                                         (__m512i)_mm512_cvtne2ps_pbh((__m512)first, (__m512)second));
}

// The kLanes values of x, rounded to bfloat16; each pair is two neighbours, with the first in the high half.
REFORMER_INLINE vhalf pairs_of_neighbours(vfloat x) {
  const vhalf pairs = (vhalf)_mm512_cvtneps_pbh((__m512)x);
  return pairs << 16 | pairs >> 16;
}

// The same for the 2 kLanes values of `low` and `high`.
REFORMER_INLINE vuint pairs_of_neighbours(vfloat low, vfloat high) {
  const vuint pairs = (vuint)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return pairs << 16 | pairs >> 16;
}
#else
// The same without the instructions, so that tests can run this code on any machine.
REFORMER_INLINE vfloat floats_of_bits(vuint bits) {
  vfloat floats;
  memcpy(&floats, &bits, sizeof(floats));
  return floats;
}
REFORMER_INLINE vfloat multiply_add(vfloat sum, Pair a, vuint b) {
  sum += float_of_bits(a.bits & 0xffff0000u) * floats_of_bits(b & 0xffff0000u);
  return sum + float_of_bits(a.bits << 16) * floats_of_bits(b << 16);
}
REFORMER_INLINE vuint pairs_of_rows(vfloat first, vfloat second) {
  vuint pairs{};
  for (int lane = 0; lane < kLanes; ++lane) {
    BFloat16 high, low;
    from_float(first[lane], &high);
    from_float(second[lane], &low);
    pairs[lane] = static_cast<uint32_t>(high.bits) << 16 | low.bits;
  }
  return pairs;
}
REFORMER_INLINE vhalf pairs_of_neighbours(vfloat x) {
  const vuint rounded = pairs_of_rows(x, vfloat{});
  vhalf pairs{};
  for (int word = 0; word < kLanes / 2; ++word) pairs[word] = rounded[2 * word] | rounded[2 * word + 1] >> 16;
  return pairs;
}
REFORMER_INLINE vuint pairs_of_neighbours(vfloat low, vfloat high) {
  float values[2 * kLanes];
  store(values, low);
  store(values + kLanes, high);
  vfloat first{}, second{};
  for (int lane = 0; lane < kLanes; ++lane)
    first[lane] = values[2 * lane], second[lane] = values[2 * lane + 1];
  return pairs_of_rows(first, second);
}
#endif

// dst = the n values of src as operands, in memory order, followed by zeros up to `padded` values.
template <typename T>
REFORMER_INLINE void load_operands(const T* src, int64_t n, int64_t padded, float* dst) {
  load_row(src, n, padded, dst);
}
REFORMER_INLINE void load_operands(const BFloat16* src, int64_t n, int64_t padded, Pair* dst) {
  constexpr int kBlock = 2 * kLanes;
  auto* out = reinterpret_cast<char*>(dst);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) memcpy(out + 2 * i, src + i, 2 * kBlock);
  for (; i < n; ++i) memcpy(out + 2 * i, src + i, 2);
  for (; i < padded; ++i) memset(out + 2 * i, 0, 2);
}

// Multiplies the values of `count` pairs by a power of two.
static inline void scale_pairs(Pair* pairs, int64_t count, float power) {
  for (int64_t i = 0; i < count; ++i) {
    BFloat16 values[2];
    memcpy(values, pairs + i, sizeof(values));
    for (BFloat16& value : values) from_float(to_float(value) * power, &value);
    memcpy(pairs + i, values, sizeof(values));
  }
}

// Pairs rows of `stride` operands for a product that sums over rows:
// out[i][k] = (in[2i][k], in[2i + 1][k]) for k < 2 stride. If `rows` is odd, a row of zeros must follow.
REFORMER_INLINE void pair_rows(const Pair* in, int64_t stride, int64_t rows, Pair* out) {
  typedef uint16_t vshort __attribute__((vector_size(kLanes * 2)));
  for (int64_t row = 0; row < rows; row += 2, in += 2 * stride)
    for (int64_t k = 0; k < stride; k += kLanes / 2, out += kLanes) {
      const vuint first = __builtin_convertvector(load_as<vshort>(in + k), vuint);
      const vuint second = __builtin_convertvector(load_as<vshort>(in + stride + k), vuint);
      store_pairs(out, first << 16 | second);
    }
}

}  // namespace REFORMER_ISA
}  // namespace reformer
