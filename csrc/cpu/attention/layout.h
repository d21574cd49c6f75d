// The sorted orders of one head: they are checked, and what tiles need to know about each token is tabulated.
//
//   cursor of query i   the number of sorted keys not after (its bucket, its position): see AttentionParams
//   code of a token     a number per round such that the difference of two codes tells whether the pair meets
#pragma once

#include "../arena.h"
#include "plan.h"

namespace reformer {
namespace REFORMER_ISA {

// Pointers into the arrays of one head. The keys' order is the ring; unless keys are sorted apart, it is the
// queries' own order.
struct Head {
  int64_t index = 0, b = 0, h = 0;
  const int32_t* order = nullptr;       // (R, L)
  const int32_t* starts = nullptr;      // (R, starts_size)
  const int32_t* key_order = nullptr;   // (R, Lk)
  const int32_t* key_starts = nullptr;  // (R, starts_size)
  const float* key_bias = nullptr;      // (Lk)
  int32_t* cursors = nullptr;           // (R, L), by rank; null unless keys are sorted apart
  int32_t* codes = nullptr;             // (L, R); null unless duplicates are corrected
  int32_t* key_codes = nullptr;         // (Lk, R); likewise
  float* inverse_norms = nullptr;       // (L); null unless query-keys are normalised
};

// The tables of the heads that are worked on together. They are filled once per head, before its tiles.
struct HeadTables {
  int32_t *cursors = nullptr, *codes = nullptr, *key_codes = nullptr;
  float* inverse_norms = nullptr;

  HeadTables(const AttentionParams& p, const Plan& plan, Arena* arena) {
    if (p.rule.correct_duplicates) codes = arena->take<int32_t>(plan.heads * p.L * p.R);
    if (plan.separate) cursors = arena->take<int32_t>(plan.heads * p.L * p.R);
    if (plan.separate && p.rule.correct_duplicates) key_codes = arena->take<int32_t>(plan.heads * p.Lk * p.R);
    if (!p.k.data && p.rule.key_norm != KeyNorm::kNone) inverse_norms = arena->take<float>(plan.heads * p.L);
  }

  // Head number `first + slot`, whose tables have index `slot`.
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

// Checks that `order` is a permutation, that `starts` rise from 0 to `length` and, if `sorted`, that
// positions rise within each bucket. `seen` is scratch of `length` bytes.
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

// Writes codes[position * R + round] such that key j is in the window of query i in that round exactly if
// -after <= code_i - code_j <= before. Codes are only read to find the rounds in which a pair meets.
//
// The code of a token is its chunk number, or its rank for rank windows; where keys are sorted apart, a
// query's code is the rank of the last key before its cursor. Between buckets that a mask separates, codes
// jump by more than any window. Differences are taken modulo 2^32, so codes may wrap around; if their span is
// so large that one difference could be mistaken for another, the result is kTooManyCodes.
static inline Status write_codes(const AttentionParams& p, const Plan& plan, const Head& head,
                                 int64_t round) {
  const int32_t* order = head.order + round * p.L;
  const int32_t* starts = head.starts + round * p.starts_size;
  const int32_t* key_order = head.key_order + round * p.Lk;
  const int32_t* key_starts = head.key_starts + round * p.starts_size;
  const bool separates_buckets = plan.inside_bucket || plan.compares_buckets;
  const int64_t around = plan.compares_buckets ? (plan.ring_laps + 1) * p.R * plan.chunks : 0;
  const int64_t jump = max_of(plan.before, plan.after) + around + 1;
  int64_t offset = 0;
  const auto code = [&](int64_t own) { return static_cast<int32_t>(static_cast<uint32_t>(own + offset)); };
  for (int64_t bucket = 0; bucket + 1 < p.starts_size; ++bucket) {
    const int64_t begin = starts[bucket], end = starts[bucket + 1];
    const int64_t key_begin = key_starts[bucket], key_end = key_starts[bucket + 1];
    if (separates_buckets && (end > begin || key_end > key_begin)) offset += jump;
    if (plan.separate) {
      for (int64_t rank = begin; rank < end; ++rank)
        head.codes[order[rank] * p.R + round] = code(head.cursors[round * p.L + rank] - 1);
      for (int64_t rank = key_begin; rank < key_end; ++rank)
        head.key_codes[key_order[rank] * p.R + round] = code(rank);
    } else {
      for (int64_t rank = begin; rank < end; ++rank)
        head.codes[order[rank] * p.R + round] = code(p.rule.rank_window ? rank : rank / p.rule.chunk_length);
    }
  }
  const bool meets_again = p.R > 1 || p.rule.ring;
  return meets_again && offset + p.Lk + jump > INT64_C(1) << 32 ? Status::kTooManyCodes : Status::kOk;
}

// Writes the cursor of each query of a round, in order of rank.
static inline void write_cursors(const AttentionParams& p, const Head& head, int64_t round) {
  const int32_t* order = head.order + round * p.L;
  const int32_t* starts = head.starts + round * p.starts_size;
  const int32_t* key_order = head.key_order + round * p.Lk;
  const int32_t* key_starts = head.key_starts + round * p.starts_size;
  int32_t* cursors = head.cursors + round * p.L;
  const bool same_positions = p.rule.causal || p.L == p.Lk;
  for (int64_t bucket = 0; bucket + 1 < p.starts_size; ++bucket) {
    int32_t cursor = key_starts[bucket];
    for (int64_t rank = starts[bucket]; rank < starts[bucket + 1]; ++rank) {
      const int64_t position = same_positions ? order[rank] : order[rank] * p.Lk / p.L;
      while (cursor < key_starts[bucket + 1] && key_order[cursor] <= position) ++cursor;
      cursors[rank] = cursor;
    }
  }
}

// Checks the layout of one round of a head and fills its tables. `seen` is scratch of max(L, Lk) bytes.
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
  return code_rounds(p, p.R - 1) > round ? write_codes(p, plan, head, round) : Status::kOk;
}

}  // namespace REFORMER_ISA
}  // namespace reformer
