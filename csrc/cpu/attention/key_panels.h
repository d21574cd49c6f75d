// Keys and values of consecutive ring positions, gathered in sorted order and packed for the matrix products.
//
// Panel p holds ring positions [p * kPanel, (p + 1) * kPanel). Neighbouring tiles share most of their keys,
// so packed panels stay in a circular buffer. The backward pass sums the gradients of a panel's keys there
// too, and adds them to the keys' rows only once, when the panel leaves the buffer.
#pragma once

#include "key_norm.h"
#include "tiles.h"

namespace reformer {
namespace REFORMER_ISA {

// What is known of the keys of one panel besides their numbers.
struct Panel {
  bool plain = false;           // all keys exist and have no bias, and buckets need not be compared
  int32_t first_position = 0;   // the lowest position of a key that may be seen; INT32_MAX if there is none
  int32_t ring_offset[kPanel];  // ring position, counted from the start of the block of kTileRows
  int32_t position[kPanel];     // original position; -1 where there is no key
  float bias[kPanel];           // times log2(e); -inf where there is no key or it is padding
  float factor[kPanel];         // turns products of paired operands into logits: see KeyScale
  int64_t bucket[kPanel];       // round * starts_size + bucket, where buckets are compared
};

// The packed panels of one thread. kBackward says for which pass, since the two need different operands.
template <typename T, bool kBackward>
class KeyPanels {
 public:
  using Op = Operand<T>;
  static constexpr bool kPaired = kIsPaired<Op>;

  // The head's gradient arrays, to which gradients of keys are added: row `position` starts at
  // position * stride. Only the backward pass sets them.
  float* grad_k_rows = nullptr;
  float* grad_v_rows = nullptr;
  int64_t grad_k_stride = 0, grad_v_stride = 0;

  KeyPanels(const AttentionParams& p, const Plan& plan, Arena* arena) : p_(p), plan_(plan) {
    const int64_t n = plan.cached_panels;
    panels_ = arena->take<Panel>(n);
    keys_t_ = arena->take<Op>(n * keys_t_size());
    if (kBackward) values_t_ = arena->take<Op>(n * values_t_size());
    // Rows as they were gathered. Floats are multiplied from here; bfloat16 rows are paired into keys_ or
    // values_ first, so for them one panel is enough.
    staged_keys_ = arena->take<Op>((kBackward && !kPaired ? n : 1) * kPanel * key_stride());
    staged_values_ = arena->take<Op>((!kBackward && !kPaired ? n : 1) * kPanel * value_stride());
    keys_ = kBackward && kPaired ? arena->take<Op>(n * keys_size()) : staged_keys_;
    values_ = !kBackward && kPaired ? arena->take<Op>(n * values_size()) : staged_values_;
    if (p.rule.correct_duplicates) codes_ = arena->take<int32_t>(n * p.R * kPanel);
    if (!kBackward) return;
    grad_k_ = arena->take<float>(n * kPanel * plan.d_padded);
    grad_v_ = arena->take<float>(n * kPanel * plan.dv_padded);
  }

  // Starts on a round of a head. If `ring`, positions wrap around; else there are no keys but the round's.
  void enter(const Head& head, int64_t round, bool ring) {
    head_ = head;
    first_ = round * p_.Lk;
    last_ = first_ + p_.Lk;
    ring_ = ring;
    code_rounds_ = code_rounds(p_, round);
    begin_ = end_ = 0;
    sorted_block_ = INT64_MIN;
  }

  // Makes panels [from, to) available, at most block_panels of them.
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
  // Empties the buffer; in the backward pass this adds the gradients to their rows.
  void flush() {
    while (begin_ < end_) evict(begin_++);
  }

  // Prefetches what the next tile will need first, step i of kTileRows: the row of the i-th key after the
  // packed ones and, in the backward pass, the gradient row of the key that will make room for it.
  REFORMER_INLINE_MEMBER void prefetch(int64_t i) const {
    constexpr int64_t kBytes = sizeof(T);
    int64_t g = end_ * kPanel + i;
    if (ring_ && g >= plan_.ring_length) g -= plan_.ring_length;
    if (g >= 0 && g < (ring_ ? plan_.ring_length : last_)) {
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
  // The operands of a panel. Those of products that sum over dimensions, keys_t and values_t, are
  // [operands in D or Dv][kPanel]; those of products that sum over keys, keys and values, are
  // [operands in kPanel][d_padded or dv_padded]. The forward pass has keys_t and values, the backward pass
  // all but values.
  const Op* keys_t(int64_t p) const { return keys_t_ + slot(p) * keys_t_size(); }
  const Op* values_t(int64_t p) const { return values_t_ + slot(p) * values_t_size(); }
  const Op* keys(int64_t p) const { return keys_ + slot(p) * keys_size(); }
  const Op* values(int64_t p) const { return values_ + slot(p) * values_size(); }
  const int32_t* codes(int64_t p) const { return codes_ + slot(p) * p_.R * kPanel; }  // [R][kPanel]
  float* grad_k(int64_t p) { return grad_k_ + slot(p) * kPanel * plan_.d_padded; }
  float* grad_v(int64_t p) { return grad_v_ + slot(p) * kPanel * plan_.dv_padded; }

 private:
  int64_t slot(int64_t panel) const { return panel & (plan_.cached_panels - 1); }
  int64_t key_stride() const { return plan_.d_padded / kValuesPerOperand<Op>; }
  int64_t value_stride() const { return plan_.dv_padded / kValuesPerOperand<Op>; }
  int64_t keys_t_size() const { return operand_count<Op>(p_.D) * kPanel; }
  int64_t values_t_size() const { return operand_count<Op>(p_.Dv) * kPanel; }
  int64_t keys_size() const { return operand_count<Op>(kPanel) * plan_.d_padded; }
  int64_t values_size() const { return operand_count<Op>(kPanel) * plan_.dv_padded; }

  // The original position of the key at ring position g; -1 if there is no key.
  int32_t position_at(int64_t g) const {
    if (ring_) return head_.key_order[floor_mod(g, plan_.ring_length)];
    return g >= first_ && g < last_ ? head_.key_order[g] : -1;
  }

  // Sorts the kTileRows ring positions from `block` on by their keys' positions; missing keys come last.
  void sort_block(int64_t block) {
    sorted_block_ = block;
    for (int i = 0; i < kTileRows; ++i)
      sorted_[i] = static_cast<uint64_t>(static_cast<uint32_t>(position_at(block + i))) << 8 |
                   static_cast<uint64_t>(i);
    insertion_sort(sorted_, kTileRows);
  }

  // Gathers the keys and values of panel `index` and lays them out for the products.
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
      panel.ring_offset[lane] = in_block + lane;
      if (plan_.sorts_positions)
        panel.ring_offset[lane] = static_cast<int32_t>(sorted_[in_block + lane] & 0xff);
      const int64_t g = block + panel.ring_offset[lane];
      const int32_t position = position_at(g);
      const bool present = position >= 0;
      const float bias = !present ? -kInfinity : head_.key_bias ? head_.key_bias[position] : 0.0f;
      panel.position[lane] = position;
      if (plan_.compares_buckets && present) {
        const int64_t on_ring = floor_mod(g, plan_.ring_length), round = on_ring / p_.L;
        panel.bucket[lane] = round * p_.starts_size + bucket_of_rank(head_.starts + round * p_.starts_size,
                                                                     p_.starts_size, on_ring % p_.L);
      }
      panel.bias[lane] = bias * kLog2E;
      panel.plain &= bias == 0.0f && !plan_.compares_buckets;
      Op* key = keys + lane * key_stride();
      Op* value = values + lane * value_stride();
      if (bias == -kInfinity) {  // the contents of padding are never read
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
    if (code_rounds_ > 0) {
      int32_t* codes = codes_ + slot(index) * p_.R * kPanel;
      for (int lane = 0; lane < kPanel; ++lane)
        for (int64_t r = 0; r < code_rounds_; ++r)
          codes[r * kPanel + lane] =
              panel.position[lane] < 0 ? 0 : head_.key_codes[panel.position[lane] * p_.R + r];
    }
    for (int half = 0; half < kPanel; half += kLanes) {
      transpose_lanes(keys + half * key_stride(), key_stride(), operand_count<Op>(p_.D),
                      keys_t_ + slot(index) * keys_t_size() + half, kPanel);
      if (kBackward)
        transpose_lanes(values + half * value_stride(), value_stride(), operand_count<Op>(p_.Dv),
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

  // Lets go of a panel: adds its keys' gradients to their rows.
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
  int64_t first_ = 0, last_ = 0, begin_ = 0, end_ = 0, code_rounds_ = 0;
  bool ring_ = false;
  int64_t sorted_block_ = 0;
  uint64_t sorted_[kTileRows];  // the block packed last: position << 8 | ring_offset
  Panel* panels_ = nullptr;
  Op *staged_keys_ = nullptr, *staged_values_ = nullptr;
  Op *keys_t_ = nullptr, *values_t_ = nullptr, *keys_ = nullptr, *values_ = nullptr;
  float *grad_k_ = nullptr, *grad_v_ = nullptr;
  int32_t* codes_ = nullptr;
};

}  // namespace REFORMER_ISA
}  // namespace reformer
