// What the matrix products of attention multiply: floats or, in a variant with REFORMER_BF16_PAIRS, pairs of
// bfloat16 that are neighbours along the reduction.
//
// AVX512-BF16 adds to a float32 the product of the high halves of two pairs, rounds, adds that of the low
// halves, and rounds. Pairs of rows therefore hold the first row in the high half: a sum over rows is then
// one chain of additions in rising order, as with floats, whichever rows make a pair. Denormal numbers count
// as zero there.
#pragma once

#include "convert.h"

namespace reformer {
namespace REFORMER_ISA {

struct Pair {
  uint32_t bits;
};

template <typename T>
struct OperandOf {
  using type = float;  // what is stored in 16 bits is widened
};
#ifdef REFORMER_BF16_PAIRS
template <>
struct OperandOf<BFloat16> {
  using type = Pair;
};
#endif
// What rows of elements T are multiplied as.
template <typename T>
using Operand = typename OperandOf<T>::type;

template <typename Op>
inline constexpr bool kIsPaired = false;
template <>
inline constexpr bool kIsPaired<Pair> = true;

// Numbers in an operand, and operands that n numbers along the reduction take.
template <typename Op>
constexpr int kNumbers = kIsPaired<Op> ? 2 : 1;
template <typename Op>
REFORMER_INLINE int64_t operands(int64_t n) {
  return (n + kNumbers<Op> - 1) / kNumbers<Op>;
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

REFORMER_INLINE void store_pairs(void* place, vuint pairs) { memcpy(place, &pairs, sizeof(pairs)); }

#ifdef __AVX512BF16__
REFORMER_INLINE vfloat multiply_add(vfloat sum, Pair a, vuint b) {
  return (vfloat)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(a.bits - vuint{}), (__m512bh)b);
}

// Numbers (first, second) of each lane, rounded, as pairs of rows.
REFORMER_INLINE vuint pairs_of_rows(vfloat first, vfloat second) {
  typedef uint16_t vnumbers __attribute__((vector_size(kLanes * 4)));
  const vnumbers zip = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (vuint)_mm512_permutexvar_epi16((__m512i)zip,
                                         (__m512i)_mm512_cvtne2ps_pbh((__m512)first, (__m512)second));
}

// The kLanes numbers of x, rounded, each with its neighbour, the first in the high half.
REFORMER_INLINE vhalf pairs_of_neighbours(vfloat x) {
  const vhalf pairs = (vhalf)_mm512_cvtneps_pbh((__m512)x);
  return pairs << 16 | pairs >> 16;
}

// The 2 kLanes numbers of low and high, likewise.
REFORMER_INLINE vuint pairs_of_neighbours(vfloat low, vfloat high) {
  const vuint pairs = (vuint)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return pairs << 16 | pairs >> 16;
}
#else
// The same without the instructions, to run and test this code anywhere.
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
  float numbers[2 * kLanes];
  store(numbers, low);
  store(numbers + kLanes, high);
  vfloat first{}, second{};
  for (int lane = 0; lane < kLanes; ++lane)
    first[lane] = numbers[2 * lane], second[lane] = numbers[2 * lane + 1];
  return pairs_of_rows(first, second);
}
#endif

// dst = the n numbers of src as operands, neighbours in memory's order, and zeros up to `padded` numbers.
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

// Multiplies the numbers of `count` pairs by a power of two.
static inline void scale_pairs(Pair* pairs, int64_t count, float power) {
  for (int64_t i = 0; i < count; ++i) {
    BFloat16 numbers[2];
    memcpy(numbers, pairs + i, sizeof(numbers));
    for (BFloat16& number : numbers) from_float(to_float(number) * power, &number);
    memcpy(pairs + i, numbers, sizeof(numbers));
  }
}

// Rows of `stride` operands in pairs, as a product that reduces over rows takes them:
// out[i][k] = (in[2i][k], in[2i + 1][k]) for k < 2 stride. An odd number of rows is followed by one of zeros.
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
