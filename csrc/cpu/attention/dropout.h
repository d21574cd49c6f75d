// Dropout of attention's probabilities: a factor m_ij, keep_scale or 0, for each query and each key that it
// meets on the ring.
//
// The factor depends only on the seed and the pair, so the backward pass finds the same ones. It is decided
// by one word of Philox, with counter (head, round of the query, rank of the query, slot of the key / 4) and
// word slot % 4. The slot of a key is round * L' + rank, L' being Lk rounded up to a multiple of 4.
#pragma once

#include "../simd/philox.h"
#include "tiles.h"

namespace reformer {
namespace REFORMER_ISA {

REFORMER_INLINE bool has_dropout(const AttentionParams& p) {
  return p.dropout_threshold > 0 || p.keep_scale != 1.0f;
}

class Dropout {
 public:
  Dropout(const AttentionParams& p, const Plan& plan) : p_(p), plan_(plan) {}

  // factors[i * stride + k] for the rows of the tile and the keys of panels [from, to), in the order in which
  // `panels` holds the keys.
  template <typename Panels>
  void write_factors(const Head& head, const Tile& tile, const Panels& panels, int64_t from, int64_t to,
                     float* factors, int64_t stride) const {
    float block_factors[kTileRows];
    constexpr int64_t kPerBlock = kTileRows / kPanel;
    for (int64_t first = from; first < to;) {
      const int64_t block = floor_div(first, kPerBlock), end = min_of(to, (block + 1) * kPerBlock);
      for (int i = 0; i < tile.rows; ++i) {
        write_row(head, tile, i, block * kTileRows, block_factors);
        for (int64_t panel = first; panel < end; ++panel)
          for (int lane = 0; lane < kPanel; ++lane)
            factors[i * stride + (panel - from) * kPanel + lane] =
                block_factors[panels.panel(panel).ring_offset[lane]];
      }
      first = end;
    }
  }

 private:
  // The factors of row i and the kTileRows keys at ring positions g, g + 1, ...
  void write_row(const Head& head, const Tile& tile, int i, int64_t g, float* factors) const {
    const int64_t padded_length = round_up(p_.Lk, 4), end = g + kTileRows;
    while (g < end) {
      const int64_t on_ring = floor_mod(g, plan_.ring_length), round = on_ring / p_.Lk,
                    rank = on_ring % p_.Lk;
      const int64_t count = min_of(end - g, p_.Lk - rank), first_slot = round * padded_length + rank;
      uint32_t words[4 * kLanes];
      int64_t skip = first_slot % 4;
      for (int64_t done = 0, counter = first_slot / 4; done < count; counter += kLanes) {
        philox_blocks(p_.seed, static_cast<uint32_t>(head.index), static_cast<uint32_t>(tile.round),
                      static_cast<uint32_t>(tile.rank[i]), static_cast<uint32_t>(counter), words);
        const int64_t n = min_of<int64_t>(count - done, 4 * kLanes - skip);
        for (int64_t k = 0; k < n; ++k)
          factors[done + k] = words[skip + k] >= p_.dropout_threshold ? p_.keep_scale : 0.0f;
        done += n;
        skip = 0;
      }
      g += count;
      factors += count;
    }
  }

  const AttentionParams& p_;
  const Plan& plan_;
};

}  // namespace REFORMER_ISA
}  // namespace reformer
