// How an attention problem is cut into work, decided once per call: see Plan.
//
// Queries are taken in sorted order, a tile of kTileRows at a time, and each query sees one contiguous range
// of keys on a ring. The ring is the keys' sorted order of one head, all rounds end to end: the key of rank r
// in round `round` has ring position g = round * Lk + r. Where the rule is a ring, a range may leave
// [0, R * Lk), and its positions then wrap around. Keys are taken a panel of kPanel ring positions at a time.
//
// Nothing that changes a result depends on the number of threads.
#pragma once

#include "../simd/matmul.h"

namespace reformer {
namespace REFORMER_ISA {

constexpr int kTileRows = 64;                               // queries per tile
constexpr int kPanel = kLanes == 16 ? kLanes : 2 * kLanes;  // keys per panel
constexpr int kTileGroups = (kTileRows + kGroupRows - 1) / kGroupRows;
constexpr float kInfinity = __builtin_inff();
// Logits are multiplied by log2(e), so that a probability is a power of two.
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
// The log-sum-exp that marks a query with exclude_self that could attend to nothing but itself.
constexpr float kSelfOnlyLse = -1e5f;

REFORMER_INLINE int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }
REFORMER_INLINE int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }
REFORMER_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Plan {
  bool separate = false;      // keys are sorted apart from the queries
  int64_t ring_length = 0;    // R * Lk
  int64_t chunks = 0;         // chunks per round
  int64_t tiles = 0;          // tiles per round
  int64_t segment_tiles = 0;  // tiles that one task walks; it carries packed keys from tile to tile
  int64_t segments = 0;       // segments per round
  int64_t cursor_span = 0;  // with separate keys, a backward task takes the queries of an interval of cursors
  int64_t block_panels = 0;             // panels whose logits are held at the same time
  int64_t cached_panels = 0;            // panels that stay packed; a power of two
  int64_t heads = 0;                    // (batch, head) pairs that are worked on together
  int64_t d_padded = 0, dv_padded = 0;  // D and Dv, rounded up to whole vectors
  bool inside_bucket = false;           // every range lies in one bucket, where rank order is position order
  // A causal rule over whole chunks takes the queries of a tile, and the keys of kTileRows ring positions, in
  // order of position. A tile's mask is then nearly triangular, and half of the work can be skipped.
  bool sorts_positions = false;
  // Ranges may go around the ring to their own round again, so the bucket mask is checked for each pair.
  bool compares_buckets = false;
  int32_t before = 0, after = 0;  // the window in codes: see write_codes
  int32_t ring_laps = 0;          // the most times that a range may go around the ring
};

// The rounds, from 0 on, whose codes (see write_codes) tiles of `round` read: the earlier ones, which may
// have met a pair before, or on a ring all, in which a pair is counted.
REFORMER_INLINE int64_t code_rounds(const AttentionParams& p, int64_t round) {
  return !p.rule.correct_duplicates ? 0 : p.rule.ring ? p.R : round;
}

// Whether the sizes by which a plan divides are positive. Without, no plan can be made.
static inline bool can_plan(const AttentionParams& p) {
  return p.L > 0 && p.Lk > 0 && p.R > 0 && p.starts_size > 1 && p.rule.chunk_length > 0;
}

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
    // A range on a ring may meet the same key several times, so its whole width counts there.
    plan.before = static_cast<int32_t>(rule.ring ? rule.chunks_before : min_of(rule.chunks_before, p.L));
    plan.after = static_cast<int32_t>(rule.ring ? rule.chunks_after : min_of(rule.chunks_after, p.L));
  }
  plan.ring_laps =
      plan.inside_bucket ? 0 : static_cast<int32_t>((plan.before + plan.after) / (p.R * plan.chunks)) + 2;
  if (!rule.ring) below = min_of(below, p.Lk), above = min_of(above, p.Lk);
  const int64_t needed = ceil_div(below + kTileRows + above, kPanel) + 2 * kTileRows / kPanel;
  // With a rank window all logits of a row are held at once, up to a limit. Its sum then does not depend on
  // where in the tile the row lies, so appending tokens changes no bit of earlier outputs.
  plan.block_panels = min_of<int64_t>(needed, rule.rank_window ? 65536 / kPanel : 512 / kPanel);
  plan.cached_panels = 1;
  while (plan.cached_panels < max_of(plan.block_panels, min_of<int64_t>(needed, 1024 / kPanel)))
    plan.cached_panels *= 2;
  // Tasks of the backward pass add to rows of keys. Segments are at least as long as the reach of a tile, so
  // no two even segments touch the same key, and no two odd ones. With separate keys the same distance
  // must lie between cursors instead.
  plan.segment_tiles = max_of<int64_t>(16, ceil_div(below + above + 2 * kTileRows, kTileRows));
  plan.segments = ceil_div(plan.tiles, plan.segment_tiles);
  plan.cursor_span = plan.segment_tiles * kTileRows;
  // The fewer heads at a time, the better their rows stay in the last-level cache; but there must be enough
  // tasks to keep all threads busy.
  const int64_t wanted = 16 * static_cast<int64_t>(p.threads);
  plan.heads = min_of(p.B * p.H, max_of<int64_t>(1, ceil_div(wanted, plan.segments)));
  return plan;
}

}  // namespace REFORMER_ISA
}  // namespace reformer
