// Random numbers by counter: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// 2011), kLanes counters at a time. Dropout and rotations use it.
#pragma once

#include "vectors.h"

namespace reformer {
namespace REFORMER_ISA {

// A counter in each lane and, after `philox`, the four random words of that counter's block.
struct Counters {
  vuint x0, x1, x2, x3;
};

// The low and the high half of the 64-bit product in each lane.
REFORMER_INLINE void multiply_wide(vuint x, uint32_t multiplier, vuint& low, vuint& high) {
#if REFORMER_LANES == 16 && defined(__AVX512F__)
  const __m512i m = _mm512_set1_epi32(static_cast<int32_t>(multiplier)), v = (__m512i)x;
  const __m512i even = _mm512_mul_epu32(v, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), m);
  low = (vuint)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
  high = (vuint)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
#elif REFORMER_LANES == 8 && defined(__AVX2__)
  const __m256i m = _mm256_set1_epi32(static_cast<int32_t>(multiplier)), v = (__m256i)x;
  const __m256i even = _mm256_mul_epu32(v, m), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), m);
  low = (vuint)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  high = (vuint)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t product = static_cast<uint64_t>(multiplier) * x[lane];
    low[lane] = static_cast<uint32_t>(product);
    high[lane] = static_cast<uint32_t>(product >> 32);
  }
#endif
}

REFORMER_INLINE void philox(uint64_t seed, Counters& c) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    vuint low0, high0, low1, high1;
    multiply_wide(c.x0, 0xD2511F53u, low0, high0);
    multiply_wide(c.x2, 0xCD9E8D57u, low1, high1);
    c = {high1 ^ c.x1 ^ key0, low1, high0 ^ c.x3 ^ key1, low0};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// Which of kLanes consecutive counters each lane must hold for `store_blocks` to write them in order.
REFORMER_INLINE vuint block_order() {
  vuint order{};
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane)
    order[lane] = static_cast<uint32_t>(lane % 4 * (kLanes / 4) + lane / 4);
  return order;
}

// out[4 * i + j] = element j of counter i, where lane l of x0, ..., x3 has the elements of counter
// block_order()[l].
template <typename Word, typename V>
REFORMER_INLINE void store_blocks(V x0, V x1, V x2, V x3, Word* out) {
  vfloat a = (vfloat)x0, b = (vfloat)x1, c = (vfloat)x2, d = (vfloat)x3;
  transpose4(a, b, c, d);
  memcpy(out, &a, sizeof(a));
  memcpy(out + kLanes, &b, sizeof(b));
  memcpy(out + 2 * kLanes, &c, sizeof(c));
  memcpy(out + 3 * kLanes, &d, sizeof(d));
}

// words[4 * i + j] = word j of the block with counter (c0, c1, c2, c3 + i), for i < kLanes.
REFORMER_INLINE void philox_blocks(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                   uint32_t* words) {
  Counters c = {c0 - vuint{}, c1 - vuint{}, c2 - vuint{}, c3 + block_order()};
  philox(seed, c);
  store_blocks(c.x0, c.x1, c.x2, c.x3, words);
}

}  // namespace REFORMER_ISA
}  // namespace reformer
