// The mask rules: which keys of a panel a query may attend to, and in which rounds it meets them.
#pragma once

#include "key_panels.h"

namespace reformer {
namespace REFORMER_ISA {

// A value as a type, so that a generic lambda can take it as a constant.
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

class PairMask {
 public:
  PairMask(const AttentionParams& p, const Plan& plan) : p_(p), plan_(plan) {
    // Inside one bucket, rank order is position order, and the range already excludes later keys.
    if (p.rule.causal)
      compare_ = plan.inside_bucket ? Compare::kNone : Compare::kBefore;
    else if (p.rule.exclude_self)
      compare_ = Compare::kOthers;
  }

  // False if no row of a group may attend to any key of the panel. It is a quick test that misses some cases.
  bool may_meet(const Tile& tile, int group, int64_t index, const Panel& panel) const {
    if (!group_meets(plan_, tile, group, index)) return false;
    if (compare_ != Compare::kBefore) return panel.first_position != INT32_MAX;
    return panel.first_position < tile.last_position[group] + (p_.rule.exclude_self ? 0 : 1);
  }

  // Whether positions alone decide which keys of a panel the rows of a group may attend to.
  bool positions_decide(const Tile& tile, int group, int64_t index, const Panel& panel) const {
    return panel.plain && index >= tile.whole_low[group] && index < tile.whole_high[group];
  }

  // How a key's position is compared: not at all, it must lie before the query's (or at it, unless
  // exclude_self), or it must differ from the query's.
  enum class Compare { kNone, kBefore, kOthers };

  // All ones in each lane of [half, half + kLanes) of panel `index` whose key row `i` may attend to.
  // `by_position` is what positions_decide said of the row's group.
  template <Compare kCompare>
  REFORMER_INLINE_MEMBER vint visible(const Tile& tile, int i, int64_t index, const Panel& panel, int half,
                                      bool by_position) const {
    vint mask = splat(-1);
    if constexpr (kCompare == Compare::kBefore)
      mask = load(panel.position + half) < splat(tile.position[i] + (p_.rule.exclude_self ? 0 : 1));
    if constexpr (kCompare == Compare::kOthers) mask = load(panel.position + half) != splat(tile.position[i]);
    if (__builtin_expect(by_position, 1)) return mask;
    if (index < tile.full_low[i] || index >= tile.full_high[i]) {
      const int64_t block = index * kPanel & ~static_cast<int64_t>(kTileRows - 1);
      const int64_t low = min_of<int64_t>(max_of<int64_t>(tile.low[i] - block, 0), kTileRows);
      const int64_t high = min_of<int64_t>(max_of<int64_t>(tile.high[i] - block, 0), kTileRows);
      const vint ring = load(panel.ring_offset + half);
      mask &= (ring >= splat(static_cast<int32_t>(low))) & (ring < splat(static_cast<int32_t>(high)));
    }
    if (panel.plain) return mask;
    mask &= load(panel.bias + half) > splat(-kInfinity);
    if (plan_.compares_buckets)
      for (int lane = 0; lane < kLanes; ++lane) mask[lane] &= -(panel.bucket[half + lane] == tile.bucket[i]);
    return mask;
  }

  // Calls f with the comparison that this rule needs as a compile-time constant.
  template <typename F>
  REFORMER_INLINE_MEMBER void with_compare(F f) const {
    switch (compare_) {
      case Compare::kNone:
        f(Constant<Compare::kNone>());
        break;
      case Compare::kBefore:
        f(Constant<Compare::kBefore>());
        break;
      case Compare::kOthers:
        f(Constant<Compare::kOthers>());
        break;
    }
  }

  // Whether a pair that is met in `round` may have to be left to an earlier round: a pair that several rounds
  // meet is counted in the first of them. On a ring it is counted in all, see inverse_count.
  bool leaves_pairs(int64_t round) const { return p_.rule.correct_duplicates && !p_.rule.ring && round > 0; }

  // All ones in each lane of half a panel whose key the query meets in no round before `round`.
  REFORMER_INLINE_MEMBER vint first_met(const int32_t* row_codes, const int32_t* panel_codes, int half,
                                        int64_t round) const {
    const vuint span = (vuint)splat(plan_.before + plan_.after);
    vint met{};
    for (int64_t r = 0; r < round; ++r) {
      const vuint distance =
          (vuint)(splat(row_codes[r] + plan_.after) - load(panel_codes + r * kPanel + half));
      met |= (vint)((distance < span ? distance : span) == distance);
    }
    return ~met;
  }

  // 1 / N for each key of half a panel, N being how often the query meets it on the ring, in all rounds: the
  // window may reach keys of any round (with a bucket mask, of the same round only), and a wide one reaches
  // the same key more than once. Right only for keys that the query meets.
  __attribute__((noinline)) vfloat inverse_count(const int32_t* row_codes, const int32_t* panel_codes,
                                                 int half) const {
    const vuint span = (vuint)splat(plan_.before + plan_.after);
    const int32_t rounds = static_cast<int32_t>(p_.R), chunks = static_cast<int32_t>(plan_.chunks);
    vint count{};
    for (int32_t r = 0; r < rounds; ++r)
      for (int32_t other = 0; other < rounds; ++other) {
        if (p_.rule.bucket_mask && other != r) continue;
        for (int32_t lap = -plan_.ring_laps; lap <= plan_.ring_laps; ++lap) {
          const int32_t base = row_codes[r] + (r - other + lap * rounds) * chunks + plan_.after;
          const vint distance = splat(base) - load(panel_codes + other * kPanel + half);
          count -= (vint)((vuint)distance <= span);
        }
      }
    return 1.0f / __builtin_convertvector(count > 1 ? count : splat(1), vfloat);
  }

 private:
  const AttentionParams& p_;
  const Plan& plan_;
  Compare compare_ = Compare::kNone;
};

}  // namespace REFORMER_ISA
}  // namespace reformer
