// The shape of the work in attention: tiles of queries in sorted order, each with one range of ring
// positions.
//
// Ring position g = round * Lk + rank: the keys' order of one head, read from end to end, is the ring. A
// range may leave [0, R * Lk); its positions then wrap. Everything here is a function of the problem alone,
// never of the number of threads, so neither is any result.
#pragma once

#include "matmul.h"
#include "simd.h"

namespace reformer {
namespace REFORMER_ISA {

constexpr int kTileRows = 64;                               // queries in a tile
constexpr int kPanel = kLanes == 16 ? kLanes : 2 * kLanes;  // keys in a panel
constexpr int kTileGroups = (kTileRows + kGroupRows - 1) / kGroupRows;
constexpr float kInfinity = __builtin_inff();
// Logits are held in units of ln 2, so that a probability is one power of two.
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kSelfOnlyLse = -1e5f;  // log-sum-exp of a query that could attend to nothing but itself

REFORMER_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }
REFORMER_INLINE int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }
REFORMER_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
  bool separate = false;      // keys are sorted apart from the queries
  int64_t ring_length = 0;    // R * Lk
  int64_t chunks = 0;         // chunks in a round
  int64_t tiles = 0;          // tiles in a round
  int64_t segment_tiles = 0;  // tiles that one task walks, carrying packed keys from tile to tile
  int64_t segments = 0;
  int64_t cursor_span = 0;    // where separate, tasks of the backward pass are the queries of so many cursors
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
  plan.separate = p.key_order != nullptr;
  plan.ring_length = p.R * p.Lk;
  plan.chunks = ceil_div(p.L, rule.chunk_length);
  plan.tiles = ceil_div(p.L, kTileRows);
  plan.d_padded = round_up(p.D, kLanes);
  plan.dv_padded = round_up(p.Dv, kLanes);
  plan.compares_buckets = rule.bucket_mask && !rule.rank_window && rule.ring &&
                          max_of(rule.chunks_before, rule.chunks_after) > (p.R - 1) * plan.chunks;
  plan.inside_bucket = rule.bucket_mask && !plan.compares_buckets;
  plan.sorts_positions =
      rule.causal && !plan.inside_bucket && !rule.rank_window && rule.chunk_length % kTileRows == 0;
  // How far a tile's keys reach below its first and above its last query.
  int64_t below, above;
  if (rule.rank_window) {
    below = rule.window_before;
    above = rule.window_after + 1;
    plan.before = static_cast<int32_t>(min_of(rule.window_before, p.Lk)) - (plan.separate ? 1 : 0);
    plan.after = static_cast<int32_t>(min_of(rule.window_after, p.Lk));
  } else {
    below = (rule.chunks_before + 1) * rule.chunk_length;
    above = (rule.chunks_after + 1) * rule.chunk_length;
    // Around the ring a range may meet a key again and again, so there all of it counts.
    plan.before = static_cast<int32_t>(rule.ring ? rule.chunks_before : min_of(rule.chunks_before, p.L));
    plan.after = static_cast<int32_t>(rule.ring ? rule.chunks_after : min_of(rule.chunks_after, p.L));
  }
  plan.ring_turns = static_cast<int32_t>((plan.before + plan.after) / (p.R * plan.chunks)) + 2;
  if (!rule.ring) below = min_of(below, p.Lk), above = min_of(above, p.Lk);
  const int64_t needed = ceil_div(below + kTileRows + above, kPanel) + 2 * kTileRows / kPanel;
  // In a bucket window all logits of a row are held at once (up to a size): its sum then does not depend
  // on where in the tile the row lies, so appending tokens changes no bit of earlier outputs.
  plan.block_panels = min_of<int64_t>(needed, rule.rank_window ? 65536 / kPanel : 512 / kPanel);
  plan.cached_panels = 1;
  while (plan.cached_panels < max_of(plan.block_panels, min_of<int64_t>(needed, 1024 / kPanel)))
    plan.cached_panels *= 2;
  // Tasks of the backward pass add to rows of keys: with segments at least as long as the reach, the even
  // segments do not touch one another's keys, nor do the odd ones. Where keys are sorted apart, it is cursors
  // that must be so far apart.
  plan.segment_tiles = max_of<int64_t>(16, ceil_div(below + above + 2 * kTileRows, kTileRows));
  plan.segments = ceil_div(plan.tiles, plan.segment_tiles);
  plan.cursor_span = plan.segment_tiles * kTileRows;
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

// The orders of one head. The keys' are the ring; they are the queries' own unless sorted apart.
struct Head {
  int64_t index = 0, b = 0, h = 0;
  const int32_t* order = nullptr;       // (R, L)
  const int32_t* starts = nullptr;      // (R, starts_size)
  const int32_t* key_order = nullptr;   // (R, Lk)
  const int32_t* key_starts = nullptr;  // (R, starts_size)
  const float* key_bias = nullptr;      // (Lk)
  int32_t* cursors = nullptr;           // (R, L), by rank, of keys sorted apart; null elsewhere
  int32_t* codes = nullptr;             // (L, R), where duplicates are corrected
  int32_t* key_codes = nullptr;         // (Lk, R), likewise
  float* inverse_norms = nullptr;       // (L), of query-keys that are normalised
};

// What is worked out once a head, before its tiles: cursors, codes and norms of a group of heads.
struct HeadTables {
  int32_t *cursors = nullptr, *codes = nullptr, *key_codes = nullptr;
  float* inverse_norms = nullptr;

  HeadTables(const AttentionParams& p, const Plan& plan, Arena* arena) {
    if (p.rule.correct_duplicates) codes = arena->take<int32_t>(plan.heads * p.L * p.R);
    if (plan.separate) cursors = arena->take<int32_t>(plan.heads * p.L * p.R);
    if (plan.separate && p.rule.correct_duplicates) key_codes = arena->take<int32_t>(plan.heads * p.Lk * p.R);
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
    head.key_order = p.key_order ? p.key_order + head.index * p.R * p.Lk : head.order;
    head.key_starts = p.key_order ? p.key_starts + head.index * p.R * p.starts_size : head.starts;
    head.key_bias = p.key_bias ? p.key_bias + head.b * p.Lk : nullptr;
    head.cursors = cursors ? cursors + slot * p.L * p.R : nullptr;
    head.codes = codes ? codes + slot * p.L * p.R : nullptr;
    head.key_codes = key_codes ? key_codes + slot * p.Lk * p.R : head.codes;
    head.inverse_norms = inverse_norms ? inverse_norms + slot * p.L : nullptr;
    return head;
  }
};

REFORMER_INLINE bool is_padding(const Head& head, int64_t key_position) {
  return head.key_bias && head.key_bias[key_position] == -kInfinity;
}
REFORMER_INLINE bool is_padding_query(const Head& head, int64_t position) {
  return !head.cursors && is_padding(head, position);
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

// `seen` is `length` bytes of scratch.
static inline Status check_order(const int32_t* order, const int32_t* starts, int64_t length,
                                 int64_t starts_size, bool sorted, uint8_t* seen) {
  memset(seen, 0, static_cast<size_t>(length));
  for (int64_t i = 0; i < length; ++i) {
    if (order[i] < 0 || order[i] >= length || seen[order[i]]) return Status::kBadOrder;
    seen[order[i]] = 1;
  }
  if (starts[0] != 0 || starts[starts_size - 1] != length) return Status::kBadStarts;
  for (int64_t x = 1; x < starts_size; ++x)
    if (starts[x] < starts[x - 1]) return Status::kBadStarts;
  if (!sorted) return Status::kOk;
  for (int64_t x = 1; x < starts_size; ++x)
    for (int64_t i = starts[x - 1] + 1; i < starts[x]; ++i)
      if (order[i] < order[i - 1]) return Status::kUnsorted;
  return Status::kOk;
}

// codes[position * R + round], such that key j is in the window of query i in that round exactly if
// -after <= code_i - code_j <= before: chunk numbers (ranks, for bucket windows; of keys sorted apart, that
// of the last key not after the query), with a jump wherever a bucket mask parts two tokens. Read only to
// count the rounds in which a pair meets. Codes may wrap around, as a difference is taken modulo 2^32; where
// they span so much of it that it could be mistaken for a smaller one, kTooManyCodes.
static inline Status write_codes(const AttentionParams& p, const Plan& plan, const Head& head,
                                 int64_t round) {
  const int32_t* order = head.order + round * p.L;
  const int32_t* starts = head.starts + round * p.starts_size;
  const int32_t* key_order = head.key_order + round * p.Lk;
  const int32_t* key_starts = head.key_starts + round * p.starts_size;
  const bool jumps = plan.inside_bucket || plan.compares_buckets;
  const int64_t around = plan.compares_buckets ? (plan.ring_turns + 1) * p.R * plan.chunks : 0;
  const int64_t jump = max_of(plan.before, plan.after) + around + 1;
  int64_t offset = 0;
  const auto code = [&](int64_t own) { return static_cast<int32_t>(static_cast<uint32_t>(own + offset)); };
  for (int64_t bucket = 0; bucket + 1 < p.starts_size; ++bucket) {
    const int64_t begin = starts[bucket], end = starts[bucket + 1];
    const int64_t key_begin = key_starts[bucket], key_end = key_starts[bucket + 1];
    if (jumps && (end > begin || key_end > key_begin)) offset += jump;
    if (plan.separate) {
      for (int64_t rank = begin; rank < end; ++rank)
        head.codes[order[rank] * p.R + round] = code(head.cursors[round * p.L + rank] - 1);
      for (int64_t rank = key_begin; rank < key_end; ++rank)
        head.key_codes[key_order[rank] * p.R + round] = code(rank);
    } else {
      for (int64_t rank = begin; rank < end; ++rank)
        head.codes[order[rank] * p.R + round] =
            code(p.rule.rank_window ? rank : rank / p.rule.chunk_length);
    }
  }
  const bool meets_again = p.R > 1 || p.rule.ring;
  return meets_again && offset + p.Lk + jump > INT64_C(1) << 32 ? Status::kTooManyCodes : Status::kOk;
}

// The cursor of each query of a round, in order of rank: see AttentionParams.
static inline void write_cursors(const AttentionParams& p, const Head& head, int64_t round) {
  const int32_t* order = head.order + round * p.L;
  const int32_t* starts = head.starts + round * p.starts_size;
  const int32_t* key_order = head.key_order + round * p.Lk;
  const int32_t* key_starts = head.key_starts + round * p.starts_size;
  int32_t* cursors = head.cursors + round * p.L;
  const bool alike = p.rule.causal || p.L == p.Lk;
  for (int64_t bucket = 0; bucket + 1 < p.starts_size; ++bucket) {
    int32_t cursor = key_starts[bucket];
    for (int64_t rank = starts[bucket]; rank < starts[bucket + 1]; ++rank) {
      const int64_t place = alike ? order[rank] : order[rank] * p.Lk / p.L;
      while (cursor < key_starts[bucket + 1] && key_order[cursor] <= place) ++cursor;
      cursors[rank] = cursor;
    }
  }
}

// Checks a round of a head's layout and works out its tables. `seen` is max(L, Lk) bytes of scratch.
static inline Status prepare_layout(const AttentionParams& p, const Plan& plan, const Head& head,
                                    int64_t round, uint8_t* seen) {
  const bool sorted = plan.separate || (p.rule.causal && plan.inside_bucket);
  Status status = check_order(head.order + round * p.L, head.starts + round * p.starts_size, p.L,
                              p.starts_size, sorted, seen);
  if (status == Status::kOk && plan.separate)
    status = check_order(head.key_order + round * p.Lk, head.key_starts + round * p.starts_size, p.Lk,
                         p.starts_size, sorted, seen);
  if (status != Status::kOk) return status;
  if (plan.separate) write_cursors(p, head, round);
  return head.codes ? write_codes(p, plan, head, round) : Status::kOk;
}

// Ranks [first, last) of a round's sorted queries.
struct Ranks {
  int64_t first = 0, last = 0;
};

// Segment `index` of the tiles of a round.
static inline Ranks tile_segment(const AttentionParams& p, const Plan& plan, int64_t index) {
  const int64_t rows = plan.segment_tiles * kTileRows;
  return Ranks{index * rows, min_of((index + 1) * rows, p.L)};
}

// The first query of a round whose cursor is at least `cursor`.
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

// Segments whose queries see keys that the next but one segment's do not: see `Plan::cursor_span`.
static inline int64_t key_segments(const AttentionParams& p, const Plan& plan) {
  return plan.separate ? p.Lk / plan.cursor_span + 1 : plan.segments;
}
static inline Ranks key_segment(const AttentionParams& p, const Plan& plan, const Head& head, int64_t round,
                                int64_t index) {
  if (!plan.separate) return tile_segment(p, plan, index);
  return Ranks{rank_of_cursor(p, head, round, index * plan.cursor_span),
               rank_of_cursor(p, head, round, (index + 1) * plan.cursor_span)};
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
  int64_t whole_low[kTileGroups], whole_high[kTileGroups];  // panels that lie in the range of all its rows
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

// The tile of up to kTileRows queries from rank `ranks.first` on.
static inline void make_tile(const AttentionParams& p, const Plan& plan, const Head& head, int64_t round,
                             Ranks ranks, Tile* tile) {
  const AttentionRule& rule = p.rule;
  const int64_t ring_start = round * p.Lk, length = p.Lk;
  const int64_t unit = plan.sorts_positions ? kTileRows : kPanel;  // of ring positions that stay together
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
    // The query itself on the ring, or the gap at its cursor.
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
    tile->panel_low[group] = empty ? 0 : floor_div(low, unit) * (unit / kPanel);
    tile->panel_high[group] = empty ? 0 : (floor_div(high - 1, unit) + 1) * (unit / kPanel);
    if (empty) continue;
    tile->first_panel = min_of(tile->first_panel, tile->panel_low[group]);
    tile->last_panel = max_of(tile->last_panel, tile->panel_high[group]);
  }
  if (tile->first_panel == INT64_MAX) tile->first_panel = tile->last_panel = 0;
}

// Whether a panel holds keys of a group's ranges, between which there may be gaps.
static inline bool group_meets(const Plan& plan, const Tile& tile, int group, int64_t panel) {
  if (panel < tile.panel_low[group] || panel >= tile.panel_high[group]) return false;
  if (!plan.separate) return true;
  const int64_t low = panel * kPanel, high = low + kPanel;
  for (int i = group * kGroupRows; i < group * kGroupRows + group_rows(tile, group); ++i)
    if (tile.low[i] < min_of(high, tile.high[i]) && tile.high[i] > low) return true;
  return false;
}

// Panels [from, to), to be worked on together.
struct Block {
  int64_t from = 0, to = 0;
};

// The block of a tile's panels after `last` (INT64_MIN: its first), at most block_panels long; `from` is
// last_panel where there is none. Cursors rise, and so do ranges: panels between two ranges are skipped.
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
