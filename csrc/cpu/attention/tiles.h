// Tiles of queries: which keys each row sees, which panels of keys a tile must visit, and in what order.
#pragma once

#include "layout.h"

namespace reformer {
namespace REFORMER_ISA {

// Ranks [first, last) in the sorted queries of a round.
struct Ranks {
  int64_t first = 0, last = 0;
};

// The queries of segment `index` of a round, for the forward pass.
static inline Ranks forward_segment(const AttentionParams& p, const Plan& plan, int64_t index) {
  const int64_t rows = plan.segment_tiles * kTileRows;
  return Ranks{index * rows, min_of((index + 1) * rows, p.L)};
}

// The rank of the first query of a round whose cursor is at least `cursor`.
static inline int64_t rank_of_cursor(const AttentionParams& p, const Head& head, int64_t round,
                                     int64_t cursor) {
  const int32_t* cursors = head.cursors + round * p.L;
  int64_t low = 0, high = p.L;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cursors[middle] < cursor)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// The segments of the backward pass: no key is seen by queries of two segments that are both even or both
// odd. With separate keys they are intervals of cursors: see Plan::cursor_span.
static inline int64_t backward_segments(const AttentionParams& p, const Plan& plan) {
  return plan.separate ? p.Lk / plan.cursor_span + 1 : plan.segments;
}
static inline Ranks backward_segment(const AttentionParams& p, const Plan& plan, const Head& head,
                                     int64_t round, int64_t index) {
  if (!plan.separate) return forward_segment(p, plan, index);
  return Ranks{rank_of_cursor(p, head, round, index * plan.cursor_span),
               rank_of_cursor(p, head, round, (index + 1) * plan.cursor_span)};
}

// Up to kTileRows queries of one round, in groups of kGroupRows rows that are multiplied together.
struct Tile {
  int64_t round = 0, first_rank = 0;
  int rows = 0, groups = 0;
  int32_t position[kTileRows];
  int32_t rank[kTileRows];                                  // rank within the round
  int64_t bucket[kTileRows];                                // round * starts_size + bucket, if buckets matter
  int64_t low[kTileRows], high[kTileRows];                  // a row sees ring positions [low, high)
  int64_t full_low[kTileRows], full_high[kTileRows];        // panels that lie entirely inside [low, high)
  int64_t panel_low[kTileGroups], panel_high[kTileGroups];  // panels in which any row of a group sees a key
  int64_t whole_low[kTileGroups], whole_high[kTileGroups];  // panels that every row of a group sees entirely
  int32_t last_position[kTileGroups];                       // the highest position of a group's queries
  int64_t first_panel = 0, last_panel = 0;                  // panels [first, last) of all groups together
  bool crosses = false;                                     // some row sees keys of another round
};

REFORMER_INLINE int group_rows(const Tile& tile, int group) {
  return min_of(kGroupRows, tile.rows - group * kGroupRows);
}

// kTileRows positions in rising order; -1, which is no position, comes last. `from` says where each was.
struct SortedPositions {
  int32_t position[kTileRows], from[kTileRows];

  // The place of a position is the number of those before it, which takes no branches.
  void sort(const int32_t* unsorted) {
    constexpr int kVectors = kTileRows / kLanes;
    int32_t place[kTileRows];
    vint value[kVectors], before[kVectors] = {};
    for (int v = 0; v < kVectors; ++v) {
      const vint index = iota() + v * kLanes, x = load(unsorted + v * kLanes);
      value[v] = x < 0 ? index : x - INT32_MAX;
      memcpy(place + v * kLanes, &value[v], sizeof(vint));
    }
#pragma GCC unroll 4
    for (int w = 0; w < kVectors; ++w)
      for (int lane = 0; lane < kLanes; ++lane) {
        // Among equal ones, which a block on a ring may hold, the first comes first.
        const vint x = splat(place[w * kLanes + lane]), x_or_equal = x - 1;
        const vint x_here = x + (iota() > splat(lane));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) before[v] -= (v < w ? x : v == w ? x_here : x_or_equal) < value[v];
      }
    memcpy(place, before, sizeof(place));
    for (int i = 0; i < kTileRows; ++i) {
      position[place[i]] = unsorted[i];
      from[place[i]] = i;
    }
  }
};

// Puts the rows of a tile in order of position. They all lie in one chunk, so their ranges are the same.
static inline void sort_rows(Tile* tile) {
  SortedPositions sorted;
  int64_t bucket[kTileRows];
  for (int i = tile->rows; i < kTileRows; ++i) tile->position[i] = -1;
  for (int i = 0; i < tile->rows; ++i) bucket[i] = tile->bucket[i];
  sorted.sort(tile->position);
  for (int i = 0; i < tile->rows; ++i) {
    tile->position[i] = sorted.position[i];
    tile->rank[i] = static_cast<int32_t>(tile->first_rank) + sorted.from[i];
    tile->bucket[i] = bucket[sorted.from[i]];
  }
}

// The multiple of a power of two that is next below or above, without a division; `n` may be negative.
REFORMER_INLINE int64_t aligned_below(int64_t n, int64_t power) { return n & -power; }
REFORMER_INLINE int64_t aligned_above(int64_t n, int64_t power) { return (n + power - 1) & -power; }

// Makes a tile of the first kTileRows queries of `ranks`, or of all if there are fewer.
static inline void make_tile(const AttentionParams& p, const Plan& plan, const Head& head, int64_t round,
                             Ranks ranks, Tile* tile) {
  const AttentionRule& rule = p.rule;
  const int64_t ring_start = round * p.Lk, length = p.Lk;
  const int64_t unit = plan.sorts_positions ? kTileRows : kPanel;  // ring positions that stay together
  tile->round = round;
  tile->first_rank = ranks.first;
  tile->rows = static_cast<int>(min_of<int64_t>(kTileRows, ranks.last - ranks.first));
  tile->groups = static_cast<int>(ceil_div(tile->rows, kGroupRows));
  const int32_t* starts = head.starts + round * p.starts_size;
  const int32_t* key_starts = head.key_starts + round * p.starts_size;
  const bool buckets = plan.inside_bucket || plan.compares_buckets;
  int64_t bucket = buckets ? bucket_of_rank(starts, p.starts_size, tile->first_rank) : 0;
  const auto chunk_start = [&](int64_t chunk) {
    const int64_t r = floor_div(chunk, plan.chunks);
    return r * length + (chunk - r * plan.chunks) * rule.chunk_length;
  };
  int64_t chunk = tile->first_rank / rule.chunk_length - 1, chunk_end = 0, chunk_low = 0, chunk_high = 0;
  tile->crosses = false;
  for (int i = 0; i < tile->rows; ++i) {
    const int64_t rank = tile->first_rank + i;
    tile->position[i] = head.order[round * p.L + rank];
    tile->rank[i] = static_cast<int32_t>(rank);
    // The query's own place on the ring; with separate keys, the gap between keys at its cursor.
    const int64_t own = ring_start + (plan.separate ? head.cursors[round * p.L + rank] : rank);
    const int64_t own_end = own + (plan.separate ? 0 : 1);
    int64_t low, high;
    if (rule.rank_window) {
      low = max_of(own - rule.window_before, ring_start);
      high = min_of(own_end + rule.window_after, ring_start + length);
    } else {
      if (rank >= chunk_end) {
        ++chunk;
        chunk_end = (chunk + 1) * rule.chunk_length;
        chunk_low = chunk_start(round * plan.chunks + chunk - rule.chunks_before);
        chunk_high = chunk_start(round * plan.chunks + chunk + 1 + rule.chunks_after);
        if (!rule.ring) {
          chunk_low = max_of(chunk_low, ring_start);
          chunk_high = min_of(chunk_high, ring_start + length);
        }
      }
      low = chunk_low;
      high = chunk_high;
    }
    if (buckets) {
      while (starts[bucket + 1] <= rank) ++bucket;
      tile->bucket[i] = round * p.starts_size + bucket;
    } else {
      tile->bucket[i] = 0;
    }
    if (plan.inside_bucket) {
      low = max_of(low, ring_start + key_starts[bucket]);
      high = min_of(high, ring_start + key_starts[bucket + 1]);
      if (rule.causal) high = min_of(high, rule.exclude_self ? own : own_end);
    }
    tile->low[i] = low;
    tile->high[i] = high;
    tile->full_low[i] = aligned_above(low, unit) / kPanel;
    tile->full_high[i] = aligned_below(high, unit) / kPanel;
    tile->crosses |= low < ring_start || high > ring_start + length;
  }
  if (plan.sorts_positions) sort_rows(tile);
  tile->first_panel = INT64_MAX;
  tile->last_panel = INT64_MIN;
  for (int group = 0; group < tile->groups; ++group) {
    int64_t low = INT64_MAX, high = INT64_MIN;
    int32_t last_position = -1;
    tile->whole_low[group] = INT64_MIN;
    tile->whole_high[group] = INT64_MAX;
    for (int i = group * kGroupRows; i < group * kGroupRows + group_rows(*tile, group); ++i) {
      last_position = max_of(last_position, tile->position[i]);
      tile->whole_low[group] = max_of(tile->whole_low[group], tile->full_low[i]);
      tile->whole_high[group] = min_of(tile->whole_high[group], tile->full_high[i]);
      if (tile->high[i] <= tile->low[i]) continue;
      low = min_of(low, tile->low[i]);
      high = max_of(high, tile->high[i]);
    }
    tile->last_position[group] = last_position;
    const bool empty = low == INT64_MAX;
    tile->panel_low[group] = empty ? 0 : aligned_below(low, unit) / kPanel;
    tile->panel_high[group] = empty ? 0 : aligned_above(high, unit) / kPanel;
    if (empty) continue;
    tile->first_panel = min_of(tile->first_panel, tile->panel_low[group]);
    tile->last_panel = max_of(tile->last_panel, tile->panel_high[group]);
  }
  if (tile->first_panel == INT64_MAX) tile->first_panel = tile->last_panel = 0;
}

// Whether any row of a group sees a key of the panel. With separate keys there may be gaps between the ranges
// of the rows.
static inline bool group_meets(const Plan& plan, const Tile& tile, int group, int64_t panel) {
  if (panel < tile.panel_low[group] || panel >= tile.panel_high[group]) return false;
  if (!plan.separate) return true;
  const int64_t low = panel * kPanel, high = low + kPanel;
  for (int i = group * kGroupRows; i < group * kGroupRows + group_rows(tile, group); ++i)
    if (tile.low[i] < min_of(high, tile.high[i]) && tile.high[i] > low) return true;
  return false;
}

// Panels [from, to) that are worked on together.
struct Block {
  int64_t from = 0, to = 0;
};

// The next block of a tile's panels, at most block_panels long, from panel `last` on (INT64_MIN for the first
// block). After the last block, `from` is last_panel. With separate keys, ranges rise with the cursors, and
// panels that lie between two ranges are skipped.
static inline Block next_block(const Plan& plan, const Tile& tile, int64_t last) {
  Block block;
  block.from = max_of(last, tile.first_panel);
  if (!plan.separate) {
    block.to = min_of(block.from + plan.block_panels, tile.last_panel);
    return block;
  }
  block.to = block.from;
  for (int i = 0; i < tile.rows && block.to < block.from + plan.block_panels; ++i) {
    const int64_t high = ceil_div(tile.high[i], kPanel);
    if (tile.high[i] <= tile.low[i] || high <= block.to) continue;
    const int64_t low = tile.low[i] / kPanel;
    if (low > block.to && block.to > block.from) break;
    if (block.to == block.from) block.from = max_of(block.from, low);
    block.to = high;
  }
  block.to = min_of(block.to, block.from + plan.block_panels);
  if (block.to == block.from) block.from = block.to = tile.last_panel;
  return block;
}

}  // namespace REFORMER_ISA
}  // namespace reformer
