// The random numbers of dropout: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2,
// 3", 2011), kLanes counters at a time.
#pragma once

#include "vectors.h"

namespace reformer {
namespace REFORMER_ISA {

// words[4 * i + j] = word j of the block with counter (c0, c1, c2, c3 + i), for i < kLanes.
static inline void philox_blocks(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                 uint32_t* words) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  uint32_t x0[kLanes], x1[kLanes], x2[kLanes], x3[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    x0[i] = c0;
    x1[i] = c1;
    x2[i] = c2;
    x3[i] = c3 + static_cast<uint32_t>(i);
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t product0 = static_cast<uint64_t>(kMultiplier0) * x0[i];
      const uint64_t product1 = static_cast<uint64_t>(kMultiplier1) * x2[i];
      x0[i] = static_cast<uint32_t>(product1 >> 32) ^ x1[i] ^ key0;
      x1[i] = static_cast<uint32_t>(product1);
      x2[i] = static_cast<uint32_t>(product0 >> 32) ^ x3[i] ^ key1;
      x3[i] = static_cast<uint32_t>(product0);
    }
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  for (int i = 0; i < kLanes; ++i) {
    words[4 * i] = x0[i];
    words[4 * i + 1] = x1[i];
    words[4 * i + 2] = x2[i];
    words[4 * i + 3] = x3[i];
  }
}

}  // namespace REFORMER_ISA
}  // namespace reformer
