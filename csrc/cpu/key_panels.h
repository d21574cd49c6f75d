// Keys and values of consecutive ring positions, gathered by the sorted order and packed for the products.
//
// Panel p holds ring positions [p * kPanel, (p + 1) * kPanel). Neighbouring tiles share most of their keys,
// so packed panels are kept in a ring buffer; the backward pass sums the gradients of a panel's keys there
// and adds them to the rows of the keys once, when the panel leaves.
#pragma once

#include "attention_plan.h"
#include "philox.h"

namespace reformer {
namespace REFORMER_ISA {

// 1 / norm of row `position`, so that the key is row * result. Falls back to double where squares overflow.
template <typename T>
static float inverse_norm(const AttentionParams& p, const Head& head, int64_t position) {
  constexpr float kRmsEpsilon = 1e-6f, kL2Smallest = 1e-12f;
  const T* row = row_of<const T>(p.q, head.b, head.h, position);
  vfloat lanes{};
  int64_t i = 0;
  for (; i + kLanes <= p.D; i += kLanes) lanes += load_floats(row + i) * load_floats(row + i);
  float squares = sum_of_lanes(lanes);
  for (; i < p.D; ++i) squares += to_float(row[i]) * to_float(row[i]);
  if (squares == kInfinity) {
    double wide = 0.0;
    for (i = 0; i < p.D; ++i)
      wide += static_cast<double>(to_float(row[i])) * static_cast<double>(to_float(row[i]));
    return static_cast<float>(1.0 / __builtin_sqrt(wide));
  }
  if (p.rule.key_norm == KeyNorm::kRms)
    return 1.0f / __builtin_sqrtf(squares + kRmsEpsilon * static_cast<float>(p.D));
  return 1.0f / max_of(__builtin_sqrtf(squares), kL2Smallest);
}

// Keys are normalised and scaled, in logit units. Rounding the result to bfloat16 would spoil logits, so
// paired operands take keys as they are, times a power of two where sums of their products might overflow
// otherwise, and each product is multiplied by the rest, `factor`. A gradient that was so multiplied belongs
// to the key as the operand has it: times `gradient`, to the key before it was normalised.
struct KeyScale {
  float power = 1.0f, factor, gradient;

  KeyScale(const AttentionParams& p, float inverse_norm) {
    if (inverse_norm < 0x1p-40f || inverse_norm > 0x1p40f)
      power = max_of(float_of_bits(bits_of_float(inverse_norm) & 0x7f800000u), 0x1p-126f);
    factor = inverse_norm / power * (p.scale * kLog2E);
    gradient = power * kLn2;
  }
};

struct Panel {
  bool plain = false;          // every key is there, has no bias, and buckets need not be compared
  int32_t first_position = 0;  // the lowest position of a key that may be seen, INT32_MAX if there is none
  int32_t ring[kPanel];        // ring position of the key, from the start of its block of kTileRows
  int32_t position[kPanel];    // original position of the key, -1 where there is none
  float bias[kPanel];          // in logit units; -inf where there is no key or it is padding
  float factor[kPanel];        // of the products of paired operands, for logits: see KeyScale
  int64_t bucket[kPanel];      // over all rounds, where pairs' buckets are compared
};

template <typename T, bool kBackward>
class KeyPanels {
 public:
  using Op = Operand<T>;
  static constexpr bool kPaired = kIsPaired<Op>;

  // Gradients of keys are added to rows of these arrays of the head: position * stride.
  float* grad_k_rows = nullptr;
  float* grad_v_rows = nullptr;
  int64_t grad_k_stride = 0, grad_v_stride = 0;

  KeyPanels(const AttentionParams& p, const Plan& plan, Arena* arena) : p_(p), plan_(plan) {
    const int64_t n = plan.cached_panels;
    panels_ = arena->take<Panel>(n);
    keys_t_ = arena->take<Op>(n * keys_t_size());
    if (kBackward) values_t_ = arena->take<Op>(n * values_t_size());
    // Rows gathered but not yet paired; floats stay where they were gathered.
    staged_keys_ = arena->take<Op>((kBackward && !kPaired ? n : 1) * kPanel * key_stride());
    staged_values_ = arena->take<Op>((!kBackward && !kPaired ? n : 1) * kPanel * value_stride());
    keys_ = kBackward && kPaired ? arena->take<Op>(n * keys_size()) : staged_keys_;
    values_ = !kBackward && kPaired ? arena->take<Op>(n * values_size()) : staged_values_;
    if (p.rule.correct_duplicates) codes_ = arena->take<int32_t>(n * p.R * kPanel);
    if (!kBackward) return;
    grad_k_ = arena->take<float>(n * kPanel * plan.d_padded);
    grad_v_ = arena->take<float>(n * kPanel * plan.dv_padded);
  }

  // Begins on a head. Positions outside [first, last) of the ring have no key, unless `wrap`.
  void enter(const Head& head, int64_t first, int64_t last, bool wrap) {
    head_ = head;
    first_ = first;
    last_ = last;
    wrap_ = wrap;
    begin_ = end_ = 0;
    sorted_block_ = INT64_MIN;
  }

  // Makes panels [from, to) available; to - from <= block_panels.
  void require(int64_t from, int64_t to) {
    if (from < begin_ || from > end_) {
      flush();
      begin_ = end_ = from;
    }
    while (end_ < to) {
      if (end_ - begin_ == plan_.cached_panels) evict(begin_++);
      pack(end_++);
    }
  }
  void flush() {
    while (begin_ < end_) evict(begin_++);
  }

  // Asks for rows that the next tile will need, the i-th of kTileRows: of a key that follows the packed ones,
  // and in the backward pass of gradients that will be added to to make room for it.
  REFORMER_INLINE_MEMBER void prefetch(int64_t i) const {
    constexpr int64_t kBytes = sizeof(T);
    int64_t g = end_ * kPanel + i;
    if (wrap_ && g >= plan_.ring_length) g -= plan_.ring_length;
    if (g >= 0 && g < (wrap_ ? plan_.ring_length : last_)) {
      const int64_t position = head_.key_order[g];
      prefetch_row(row_of<const T>(p_.k.data ? p_.k : p_.q, head_.b, head_.h, position), p_.D * kBytes);
      prefetch_row(row_of<const T>(p_.v, head_.b, head_.h, position), p_.Dv * kBytes);
    }
    if (!kBackward || end_ - begin_ < plan_.cached_panels) return;
    const int64_t position = panels_[slot(begin_ + i / kPanel)].position[i % kPanel];
    if (position < 0) return;
    prefetch_row(grad_k_rows + position * grad_k_stride, p_.D * static_cast<int64_t>(sizeof(float)));
    prefetch_row(grad_v_rows + position * grad_v_stride, p_.Dv * static_cast<int64_t>(sizeof(float)));
  }

  const Panel& panel(int64_t p) const { return panels_[slot(p)]; }
  // Operands of products that reduce over dimensions, [operands of D or Dv][kPanel], and over keys,
  // [operands of kPanel][d_padded or dv_padded]. Values by key are there in the forward pass, the other two
  // in the backward pass.
  const Op* keys_t(int64_t p) const { return keys_t_ + slot(p) * keys_t_size(); }
  const Op* values_t(int64_t p) const { return values_t_ + slot(p) * values_t_size(); }
  const Op* keys(int64_t p) const { return keys_ + slot(p) * keys_size(); }
  const Op* values(int64_t p) const { return values_ + slot(p) * values_size(); }
  const int32_t* codes(int64_t p) const { return codes_ + slot(p) * p_.R * kPanel; }  // [R][kPanel]
  float* grad_k(int64_t p) { return grad_k_ + slot(p) * kPanel * plan_.d_padded; }
  float* grad_v(int64_t p) { return grad_v_ + slot(p) * kPanel * plan_.dv_padded; }

 private:
  int64_t slot(int64_t panel) const { return panel & (plan_.cached_panels - 1); }
  int64_t key_stride() const { return plan_.d_padded / kNumbers<Op>; }
  int64_t value_stride() const { return plan_.dv_padded / kNumbers<Op>; }
  int64_t keys_t_size() const { return operands<Op>(p_.D) * kPanel; }
  int64_t values_t_size() const { return operands<Op>(p_.Dv) * kPanel; }
  int64_t keys_size() const { return operands<Op>(kPanel) * plan_.d_padded; }
  int64_t values_size() const { return operands<Op>(kPanel) * plan_.dv_padded; }

  // Original position of the key at ring position g, -1 where there is none.
  int32_t position_at(int64_t g) const {
    if (wrap_) return head_.key_order[floor_mod(g, plan_.ring_length)];
    return g >= first_ && g < last_ ? head_.key_order[g] : -1;
  }

  // The kTileRows ring positions from `block` on in order of position, keys that are not there last.
  void sort_block(int64_t block) {
    sorted_block_ = block;
    for (int i = 0; i < kTileRows; ++i)
      sorted_[i] = static_cast<uint64_t>(static_cast<uint32_t>(position_at(block + i))) << 8 |
                   static_cast<uint64_t>(i);
    insertion_sort(sorted_, kTileRows);
  }

  void pack(int64_t index) {
    Panel& panel = panels_[slot(index)];
    Op* keys = staged_keys_ + (kBackward && !kPaired ? slot(index) : 0) * kPanel * key_stride();
    Op* values = staged_values_ + (!kBackward && !kPaired ? slot(index) : 0) * kPanel * value_stride();
    panel.plain = true;
    panel.first_position = INT32_MAX;
    const int64_t block = index * kPanel & ~static_cast<int64_t>(kTileRows - 1);
    const int in_block = static_cast<int>(index * kPanel - block);
    if (plan_.sorts_positions && block != sorted_block_) sort_block(block);
    for (int lane = 0; lane < kPanel; ++lane) {
      panel.ring[lane] = in_block + lane;
      if (plan_.sorts_positions) panel.ring[lane] = static_cast<int32_t>(sorted_[in_block + lane] & 0xff);
      const int64_t g = block + panel.ring[lane];
      const int32_t position = position_at(g);
      const bool there = position >= 0;
      const float bias = !there ? -kInfinity : head_.key_bias ? head_.key_bias[position] : 0.0f;
      panel.position[lane] = position;
      if (plan_.compares_buckets && there) {
        const int64_t on_ring = floor_mod(g, plan_.ring_length), round = on_ring / p_.L;
        panel.bucket[lane] = round * p_.starts_size + bucket_of_rank(head_.starts + round * p_.starts_size,
                                                                     p_.starts_size, on_ring % p_.L);
      }
      panel.bias[lane] = bias * kLog2E;
      panel.plain &= bias == 0.0f && !plan_.compares_buckets;
      Op* key = keys + lane * key_stride();
      Op* value = values + lane * value_stride();
      if (bias == -kInfinity) {  // padding is never read, whatever it holds
        memset(key, 0, static_cast<size_t>(key_stride()) * sizeof(Op));
        memset(value, 0, static_cast<size_t>(value_stride()) * sizeof(Op));
        panel.factor[lane] = 0.0f;
        continue;
      }
      panel.first_position = min_of(panel.first_position, position);
      const float norm = head_.inverse_norms ? head_.inverse_norms[position] : 1.0f;
      const T* key_row = row_of<const T>(p_.k.data ? p_.k : p_.q, head_.b, head_.h, position);
      if constexpr (kPaired) {
        const KeyScale scale(p_, norm);
        load_operands(key_row, p_.D, plan_.d_padded, key);
        if (scale.power != 1.0f) scale_pairs(key, key_stride(), scale.power);
        panel.factor[lane] = scale.factor;
      } else {
        load_row(key_row, p_.D, plan_.d_padded, key, norm * p_.scale * kLog2E);
      }
      load_operands(row_of<const T>(p_.v, head_.b, head_.h, position), p_.Dv, plan_.dv_padded, value);
    }
    if (p_.rule.correct_duplicates) {
      int32_t* codes = codes_ + slot(index) * p_.R * kPanel;
      for (int lane = 0; lane < kPanel; ++lane)
        for (int64_t r = 0; r < p_.R; ++r)
          codes[r * kPanel + lane] =
              panel.position[lane] < 0 ? 0 : head_.key_codes[panel.position[lane] * p_.R + r];
    }
    for (int half = 0; half < kPanel; half += kLanes) {
      transpose_lanes(keys + half * key_stride(), key_stride(), operands<Op>(p_.D),
                      keys_t_ + slot(index) * keys_t_size() + half, kPanel);
      if (kBackward)
        transpose_lanes(values + half * value_stride(), value_stride(), operands<Op>(p_.Dv),
                        values_t_ + slot(index) * values_t_size() + half, kPanel);
    }
    if constexpr (kPaired && kBackward)
      pair_rows(keys, key_stride(), kPanel, keys_ + slot(index) * keys_size());
    if constexpr (kPaired && !kBackward)
      pair_rows(values, value_stride(), kPanel, values_ + slot(index) * values_size());
    if (kBackward) {
      memset(grad_k(index), 0, static_cast<size_t>(kPanel * plan_.d_padded) * sizeof(float));
      memset(grad_v(index), 0, static_cast<size_t>(kPanel * plan_.dv_padded) * sizeof(float));
    }
  }

  void evict(int64_t index) {
    if (!kBackward) return;
    const Panel& panel = panels_[slot(index)];
    const float* grad_k_panel = grad_k(index);
    const float* grad_v_panel = grad_v(index);
    for (int lane = 0; lane < kPanel; ++lane) {
      if (panel.bias[lane] == -kInfinity) continue;
      const int64_t position = panel.position[lane];
      add_row(grad_k_panel + lane * plan_.d_padded, p_.D, grad_k_rows + position * grad_k_stride);
      add_row(grad_v_panel + lane * plan_.dv_padded, p_.Dv, grad_v_rows + position * grad_v_stride);
    }
  }

  static void add_row(const float* src, int64_t n, float* dst) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(dst + i, load(dst + i) + load(src + i));
    for (; i < n; ++i) dst[i] += src[i];
  }

  const AttentionParams& p_;
  const Plan& plan_;
  Head head_;
  int64_t first_ = 0, last_ = 0, begin_ = 0, end_ = 0;
  bool wrap_ = false;
  int64_t sorted_block_ = 0;
  uint64_t sorted_[kTileRows];  // of the block packed last: position << 8 | ring position in the block
  Panel* panels_ = nullptr;
  Op *staged_keys_ = nullptr, *staged_values_ = nullptr;
  Op *keys_t_ = nullptr, *values_t_ = nullptr, *keys_ = nullptr, *values_ = nullptr;
  float *grad_k_ = nullptr, *grad_v_ = nullptr;
  int32_t* codes_ = nullptr;
};

template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};

// Which keys of a panel a query may attend to, and in how many rounds it meets them.
class PairRule {
 public:
  PairRule(const AttentionParams& p, const Plan& plan) : p_(p), plan_(plan) {
    // In one bucket a causal range says it all.
    if (p.rule.causal)
      compare_ = plan.inside_bucket ? Compare::kNone : Compare::kBefore;
    else if (p.rule.exclude_self)
      compare_ = Compare::kOthers;
  }

  // Whether any row of a group may attend to any key of the panel, as far as can be told at once.
  bool may_meet(const Tile& tile, int group, int64_t index, const Panel& panel) const {
    if (!group_meets(plan_, tile, group, index)) return false;
    if (compare_ != Compare::kBefore) return panel.first_position != INT32_MAX;
    return panel.first_position < tile.last_position[group] + (p_.rule.exclude_self ? 0 : 1);
  }

  // Whether positions alone decide which keys of a panel the rows of a group may attend to.
  bool positions_decide(const Tile& tile, int group, int64_t index, const Panel& panel) const {
    return panel.plain && index >= tile.whole_low[group] && index < tile.whole_high[group];
  }

  // How positions decide: not at all, keys before a limit, or all keys but the query.
  enum class Compare { kNone, kBefore, kOthers };
  Compare compare() const { return compare_; }

  // Lanes [half, half + kLanes) of panel `index` that row `i` may attend to. `simple`: positions_decide.
  template <Compare kCompare>
  REFORMER_INLINE_MEMBER vint visible(const Tile& tile, int i, int64_t index, const Panel& panel, int half,
                                      bool simple) const {
    vint mask = splat(-1);
    if constexpr (kCompare == Compare::kBefore)
      mask = load(panel.position + half) < splat(tile.position[i] + (p_.rule.exclude_self ? 0 : 1));
    if constexpr (kCompare == Compare::kOthers) mask = load(panel.position + half) != splat(tile.position[i]);
    if (__builtin_expect(simple, 1)) return mask;
    if (index < tile.full_low[i] || index >= tile.full_high[i]) {
      const int64_t block = index * kPanel & ~static_cast<int64_t>(kTileRows - 1);
      const int64_t low = min_of<int64_t>(max_of<int64_t>(tile.low[i] - block, 0), kTileRows);
      const int64_t high = min_of<int64_t>(max_of<int64_t>(tile.high[i] - block, 0), kTileRows);
      const vint ring = load(panel.ring + half);
      mask &= (ring >= splat(static_cast<int32_t>(low))) & (ring < splat(static_cast<int32_t>(high)));
    }
    if (panel.plain) return mask;
    mask &= load(panel.bias + half) > splat(-kInfinity);
    if (plan_.compares_buckets)
      for (int lane = 0; lane < kLanes; ++lane) mask[lane] &= -(panel.bucket[half + lane] == tile.bucket[i]);
    return mask;
  }

  // Calls f with compare() as a constant.
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

  // 1 / (rounds in which the query with these codes meets the keys of a panel), for keys that it meets in
  // `round`.
  REFORMER_INLINE_MEMBER vfloat inverse_count(const int32_t* row_codes, const int32_t* panel_codes, int half,
                                              int64_t round) const {
    if (p_.rule.ring && !plan_.inside_bucket) return inverse_ring_count(row_codes, panel_codes, half);
    const vuint span = (vuint)splat(plan_.before + plan_.after);
    vint others{};
    for (int64_t r = 0; r < p_.R; ++r) {
      if (r == round) continue;
      const vuint distance =
          (vuint)(splat(row_codes[r] + plan_.after) - load(panel_codes + r * kPanel + half));
      others -= (vint)((distance < span ? distance : span) == distance);
    }
    if (p_.R <= kLanes) return look_up(inverses_, others);
    return 1.0f / __builtin_convertvector(others + 1, vfloat);
  }

  // factors[i * stride + k] = keep_scale or 0 for rows [0, rows) and the keys of panels [from, to), as
  // `panels` holds them. `from` and `to` do not part a block that is sorted.
  template <typename Panels>
  void write_dropout(const Head& head, const Tile& tile, const Panels& panels, int64_t from, int64_t to,
                     float* factors, int64_t stride) const {
    float run[kTileRows];
    constexpr int64_t kPerBlock = kTileRows / kPanel;
    for (int64_t panel = from; panel < to;) {
      const int64_t block = floor_div(panel, kPerBlock), end = min_of(to, (block + 1) * kPerBlock);
      for (int i = 0; i < tile.rows; ++i) {
        write_factors(head, tile, i, block * kTileRows, run);
        for (int64_t p = panel; p < end; ++p)
          for (int lane = 0; lane < kPanel; ++lane)
            factors[i * stride + (p - from) * kPanel + lane] = run[panels.panel(p).ring[lane]];
      }
      panel = end;
    }
  }

 private:
  // On the ring a key of any round may be in reach (of the same one, with a bucket mask), and more than once
  // where the reach is longer.
  __attribute__((noinline)) vfloat inverse_ring_count(const int32_t* row_codes, const int32_t* panel_codes,
                                                      int half) const {
    const vuint span = (vuint)splat(plan_.before + plan_.after);
    const int32_t rounds = static_cast<int32_t>(p_.R), chunks = static_cast<int32_t>(plan_.chunks);
    vint count{};
    for (int32_t r = 0; r < rounds; ++r)
      for (int32_t other = 0; other < rounds; ++other) {
        if (plan_.compares_buckets && other != r) continue;
        for (int32_t turn = -plan_.ring_turns; turn <= plan_.ring_turns; ++turn) {
          const int32_t base = row_codes[r] + (r - other + turn * rounds) * chunks + plan_.after;
          const vint distance = splat(base) - load(panel_codes + other * kPanel + half);
          count -= (vint)((vuint)distance <= span);
        }
      }
    return 1.0f / __builtin_convertvector(count > 1 ? count : splat(1), vfloat);
  }

  // The factors of row i and the kTileRows keys at ring positions g, g + 1, ...
  void write_factors(const Head& head, const Tile& tile, int i, int64_t g, float* factors) const {
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
  Compare compare_ = Compare::kNone;
  vfloat inverses_ = 1.0f / __builtin_convertvector(iota() + 1, vfloat);  // 1 / 1, 1 / 2, ...
};

}  // namespace REFORMER_ISA
}  // namespace reformer
