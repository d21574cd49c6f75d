// The shape of the work in attention: tiles of queries in sorted order, each with one range of ring
// positions.
//
// Ring position g = round * L + rank: `order` of one head, read from end to end, is the ring. A range may
// leave [0, R * L); its positions then wrap. Everything here is a function of the problem alone, never of
// the number of threads, so neither is any result.
#pragma once

#include "matmul.h"
#include "simd.h"

namespace reformer {
namespace REFORMER_ISA {

constexpr int kTileRows = 64;       // queries in a tile
constexpr int kPanel = 2 * kLanes;  // keys in a panel
constexpr int kTileGroups = (kTileRows + kGroupRows - 1) / kGroupRows;
constexpr float kInfinity = __builtin_inff();
// Logits are held in units of ln 2, so that a probability is one power of two.
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kSelfOnlyLse = -1e5f;  // log-sum-exp of a query that could attend to nothing but itself

REFORMER_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }
REFORMER_INLINE int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }
REFORMER_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
  int64_t ring_length = 0;    // R * L
  int64_t chunks = 0;         // chunks in a round
  int64_t tiles = 0;          // tiles in a round
  int64_t segment_tiles = 0;  // tiles that one task walks, carrying packed keys from tile to tile
  int64_t segments = 0;
  int64_t block_panels = 0;   // panels whose logits are held at once
  int64_t cached_panels = 0;  // panels kept packed, a power of two
  int64_t heads = 0;          // (batch, head) pairs worked on together
  int64_t d_padded = 0, dv_padded = 0;
  bool inside_bucket = false;  // every range lies in one bucket, where rank order is position order
  // A causal rule over whole chunks: the queries of a tile and the keys of each kTileRows ring positions are
  // taken in order of position, which makes a tile's mask nearly triangular and lets half of it be skipped.
  bool sorts_positions = false;
  bool compares_buckets = false;  // a range around the ring comes back to its own round: pairs are compared
  int32_t before = 0, after = 0;  // codes: see write_codes
  int32_t ring_turns = 0;         // how often a range may go around the ring
};

static inline Plan make_plan(const AttentionParams& p) {
  const AttentionRule& rule = p.rule;
  Plan plan;
  plan.ring_length = p.R * p.L;
  plan.chunks = ceil_div(p.L, rule.chunk_length);
  plan.tiles = ceil_div(p.L, kTileRows);
  plan.d_padded = round_up(p.D, kLanes);
  plan.dv_padded = round_up(p.Dv, kLanes);
  plan.compares_buckets = rule.bucket_mask && !rule.bucket_window && rule.ring &&
                          max_of(rule.chunks_before, rule.chunks_after) > (p.R - 1) * plan.chunks;
  plan.inside_bucket = rule.bucket_window || (rule.bucket_mask && !plan.compares_buckets);
  plan.sorts_positions = rule.causal && !plan.inside_bucket && rule.chunk_length % kTileRows == 0;
  // How far a tile's keys reach below its first and above its last query.
  int64_t below, above;
  if (rule.bucket_window) {
    below = rule.window_before;
    above = rule.window_after + 1;
    plan.before = static_cast<int32_t>(min_of(rule.window_before, p.L));
    plan.after = static_cast<int32_t>(min_of(rule.window_after, p.L));
  } else {
    below = (rule.chunks_before + 1) * rule.chunk_length;
    above = (rule.chunks_after + 1) * rule.chunk_length;
    // Around the ring a range may meet a key again and again, so there all of it counts.
    plan.before = static_cast<int32_t>(rule.ring ? rule.chunks_before : min_of(rule.chunks_before, p.L));
    plan.after = static_cast<int32_t>(rule.ring ? rule.chunks_after : min_of(rule.chunks_after, p.L));
  }
  plan.ring_turns = static_cast<int32_t>((plan.before + plan.after) / (p.R * plan.chunks)) + 2;
  if (!rule.ring) below = min_of(below, p.L), above = min_of(above, p.L);
  const int64_t needed = ceil_div(below + kTileRows + above, kPanel) + 2 * kTileRows / kPanel;
  // In a bucket window all logits of a row are held at once (up to a size): its sum then does not depend
  // on where in the tile the row lies, so appending tokens changes no bit of earlier outputs.
  plan.block_panels = min_of<int64_t>(needed, rule.bucket_window ? 4096 / kPanel : 512 / kPanel);
  plan.cached_panels = 1;
  while (plan.cached_panels < max_of(plan.block_panels, min_of<int64_t>(needed, 1024 / kPanel)))
    plan.cached_panels *= 2;
  // Tasks of the backward pass add to rows of keys: with segments at least as long as the reach, the even
  // segments do not touch one another's keys, nor do the odd ones.
  plan.segment_tiles = max_of<int64_t>(16, ceil_div(below + above + 2 * kTileRows, kTileRows));
  plan.segments = ceil_div(plan.tiles, plan.segment_tiles);
  // Few heads at a time keep their rows in the last-level cache; enough of them keep the threads busy.
  const int64_t wanted = 16 * static_cast<int64_t>(p.threads);
  plan.heads = min_of(p.B * p.H, max_of<int64_t>(1, ceil_div(wanted, plan.segments)));
  return plan;
}

// Hands out parts of a workspace; with no base it only counts.
struct Arena {
  char* base = nullptr;
  size_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    char* p = base ? base + used : nullptr;
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return reinterpret_cast<T*>(p);
  }
};

// The orders of one head are the ring.
struct Head {
  int64_t index = 0, b = 0, h = 0;
  const int32_t* order = nullptr;   // (R, L)
  const int32_t* starts = nullptr;  // (R, starts_size)
  const float* key_bias = nullptr;  // (L)
  int32_t* codes = nullptr;         // (L, R), where duplicates are corrected
  float* inverse_norms = nullptr;   // (L), of query-keys that are normalised
};

// What is worked out once a head, before its tiles: codes and norms of a group of heads.
struct HeadTables {
  int32_t* codes = nullptr;
  float* inverse_norms = nullptr;

  HeadTables(const AttentionParams& p, const Plan& plan, Arena* arena) {
    if (p.rule.correct_duplicates) codes = arena->take<int32_t>(plan.heads * p.L * p.R);
    if (!p.k.data && p.rule.key_norm != KeyNorm::kNone) inverse_norms = arena->take<float>(plan.heads * p.L);
  }

  // Head `first + slot`, the slot-th of the group.
  Head head(const AttentionParams& p, int64_t first, int64_t slot) const {
    Head head;
    head.index = first + slot;
    head.b = head.index / p.H;
    head.h = head.index % p.H;
    head.order = p.order + head.index * p.R * p.L;
    head.starts = p.starts + head.index * p.R * p.starts_size;
    head.key_bias = p.key_bias ? p.key_bias + head.b * p.L : nullptr;
    head.codes = codes ? codes + slot * p.L * p.R : nullptr;
    head.inverse_norms = inverse_norms ? inverse_norms + slot * p.L : nullptr;
    return head;
  }
};

REFORMER_INLINE bool is_padding(const Head& head, int64_t position) {
  return head.key_bias && head.key_bias[position] == -kInfinity;
}

// The last bucket that starts at or below `rank` and is not empty.
REFORMER_INLINE int64_t bucket_of_rank(const int32_t* starts, int64_t starts_size, int64_t rank) {
  int64_t low = 0, high = starts_size - 1;  // starts[low] <= rank < starts[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (starts[middle] <= rank)
      low = middle;
    else
      high = middle;
  }
  return low;
}

static inline Status check_layout(const AttentionParams& p, const Head& head, int64_t round, uint8_t* seen) {
  const int32_t* order = head.order + round * p.L;
  memset(seen, 0, static_cast<size_t>(p.L));
  for (int64_t i = 0; i < p.L; ++i) {
    if (order[i] < 0 || order[i] >= p.L || seen[order[i]]) return Status::kBadOrder;
    seen[order[i]] = 1;
  }
  const int32_t* starts = head.starts + round * p.starts_size;
  if (starts[0] != 0 || starts[p.starts_size - 1] != p.L) return Status::kBadStarts;
  for (int64_t x = 1; x < p.starts_size; ++x)
    if (starts[x] < starts[x - 1]) return Status::kBadStarts;
  return Status::kOk;
}

// codes[position * R + round], such that key j is in the window of query i in that round exactly if
// -after <= code_i - code_j <= before: chunk numbers (ranks, for bucket windows), with a jump wherever a
// bucket mask parts two tokens. Read only to count the rounds in which a pair meets. Codes may wrap around:
// a difference is taken modulo 2^32, and spans less than that within a head.
static inline void write_codes(const AttentionParams& p, const Plan& plan, const Head& head, int64_t round) {
  const int32_t* order = head.order + round * p.L;
  const int32_t* starts = head.starts + round * p.starts_size;
  const bool jumps = plan.inside_bucket || plan.compares_buckets;
  const int64_t around = plan.compares_buckets ? (plan.ring_turns + 1) * p.R * plan.chunks : 0;
  const uint32_t jump = static_cast<uint32_t>(max_of(plan.before, plan.after) + around) + 1;
  uint32_t offset = 0;
  int64_t bucket_end = 0, bucket = 0;
  for (int64_t rank = 0; rank < p.L; ++rank) {
    if (jumps && rank == bucket_end) {
      while (starts[bucket + 1] <= rank) ++bucket;
      bucket_end = starts[bucket + 1];
      offset += jump;
    }
    const int64_t own = p.rule.bucket_window ? rank : rank / p.rule.chunk_length;
    head.codes[order[rank] * p.R + round] = static_cast<int32_t>(static_cast<uint32_t>(own) + offset);
  }
}

struct Tile {
  int64_t round = 0, first_rank = 0;
  int rows = 0, groups = 0;
  int32_t position[kTileRows];
  int32_t rank[kTileRows];                                  // in the round
  int64_t bucket[kTileRows];                                // over all rounds, where buckets matter
  int64_t low[kTileRows], high[kTileRows];                  // ring positions of a row's keys
  int64_t full_low[kTileRows], full_high[kTileRows];        // panels that lie inside [low, high)
  int64_t panel_low[kTileGroups], panel_high[kTileGroups];  // panels that a group of rows meets
  int32_t last_position[kTileGroups];                       // of a group's queries
  int64_t first_panel = 0, last_panel = 0;                  // [first, last) over all groups
  bool crosses = false;                                     // keys of another round, over the ring
};

REFORMER_INLINE int group_rows(const Tile& tile, int group) {
  return min_of(kGroupRows, tile.rows - group * kGroupRows);
}

// Sorts up to kTileRows numbers; they come as a few rising runs, one a bucket.
static inline void insertion_sort(uint64_t* numbers, int count) {
  for (int i = 1; i < count; ++i) {
    const uint64_t number = numbers[i];
    int j = i;
    for (; j > 0 && numbers[j - 1] > number; --j) numbers[j] = numbers[j - 1];
    numbers[j] = number;
  }
}

// Rows in order of position. They lie in one chunk, so that their ranges are the same.
static inline void sort_rows(Tile* tile) {
  uint64_t rows[kTileRows];
  int64_t bucket[kTileRows];
  for (int i = 0; i < tile->rows; ++i) {
    rows[i] = static_cast<uint64_t>(tile->position[i]) << 8 | static_cast<uint64_t>(i);
    bucket[i] = tile->bucket[i];
  }
  insertion_sort(rows, tile->rows);
  for (int i = 0; i < tile->rows; ++i) {
    const int from = static_cast<int>(rows[i] & 0xff);
    tile->position[i] = static_cast<int32_t>(rows[i] >> 8);
    tile->rank[i] = static_cast<int32_t>(tile->first_rank) + from;
    tile->bucket[i] = bucket[from];
  }
}

static inline void make_tile(const AttentionParams& p, const Plan& plan, const Head& head, int64_t round,
                             int64_t index, Tile* tile) {
  const AttentionRule& rule = p.rule;
  const int64_t ring_start = round * p.L, length = p.L;
  const int64_t unit = plan.sorts_positions ? kTileRows : kPanel;  // of ring positions that stay together
  tile->round = round;
  tile->first_rank = index * kTileRows;
  tile->rows = static_cast<int>(min_of<int64_t>(kTileRows, length - tile->first_rank));
  tile->groups = static_cast<int>(ceil_div(tile->rows, kGroupRows));
  const int32_t* starts = head.starts + round * p.starts_size;
  const bool buckets = plan.inside_bucket || plan.compares_buckets;
  int64_t bucket = buckets ? bucket_of_rank(starts, p.starts_size, tile->first_rank) : 0;
  const auto chunk_start = [&](int64_t chunk) {
    const int64_t r = floor_div(chunk, plan.chunks);
    return r * length + (chunk - r * plan.chunks) * rule.chunk_length;
  };
  int64_t chunk = tile->first_rank / rule.chunk_length - 1, chunk_end = 0, chunk_low = 0, chunk_high = 0;
  tile->crosses = false;
  for (int i = 0; i < tile->rows; ++i) {
    const int64_t rank = tile->first_rank + i, own = ring_start + rank;
    tile->position[i] = head.order[own];
    tile->rank[i] = static_cast<int32_t>(rank);
    int64_t low, high;
    if (rule.bucket_window) {
      low = own - rule.window_before;
      high = own + rule.window_after + 1;
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
      low = max_of(low, ring_start + starts[bucket]);
      high = min_of(high, ring_start + starts[bucket + 1]);
      if (rule.causal) high = min_of(high, own + (rule.exclude_self ? 0 : 1));
    }
    tile->low[i] = low;
    tile->high[i] = high;
    tile->full_low[i] = floor_div(low + unit - 1, unit) * (unit / kPanel);
    tile->full_high[i] = floor_div(high, unit) * (unit / kPanel);
    tile->crosses |= low < ring_start || high > ring_start + length;
  }
  if (plan.sorts_positions) sort_rows(tile);
  tile->first_panel = INT64_MAX;
  tile->last_panel = INT64_MIN;
  for (int group = 0; group < tile->groups; ++group) {
    int64_t low = INT64_MAX, high = INT64_MIN;
    int32_t last_position = -1;
    for (int i = group * kGroupRows; i < group * kGroupRows + group_rows(*tile, group); ++i) {
      last_position = max_of(last_position, tile->position[i]);
      if (tile->high[i] <= tile->low[i]) continue;
      low = min_of(low, tile->low[i]);
      high = max_of(high, tile->high[i]);
    }
    tile->last_position[group] = last_position;
    const bool empty = low == INT64_MAX;
    tile->panel_low[group] = empty ? 0 : floor_div(low, unit) * (unit / kPanel);
    tile->panel_high[group] = empty ? 0 : (floor_div(high - 1, unit) + 1) * (unit / kPanel);
    if (empty) continue;
    tile->first_panel = min_of(tile->first_panel, tile->panel_low[group]);
    tile->last_panel = max_of(tile->last_panel, tile->panel_high[group]);
  }
  if (tile->first_panel == INT64_MAX) tile->first_panel = tile->last_panel = 0;
}

}  // namespace REFORMER_ISA
}  // namespace reformer
