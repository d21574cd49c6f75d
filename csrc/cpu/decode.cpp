// One step of cached generation: hash the new token, append it to the cache, list the keys in its windows,
// and attend to them.
//
// The task of one (row, head) is small, so nothing of the step leaves its thread: the windows become a list
// of positions, the logits of that list are computed kLanes keys at a time, and one pass over its values
// follows. Where duplicates are corrected, a position enters the list once, in whichever rounds it is met,
// which is softmax over the union of the rounds' keys. Sums are in the order of the list: threads do not
// change them.
#include "attention/key_norm.h"
#include "simd/elements.h"
#include "variants.h"

namespace REFORMER_ISA_NAMESPACE {
namespace {

constexpr int64_t kSharedProducts = 1 << 16;  // fewer multiplications are not worth a second thread

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

// The ring positions at which chunks start: see _chunk_start in reformer_kernels/rule.py.
int64_t chunk_start(int64_t chunk, int64_t chunks, int64_t chunk_length, int64_t length) {
  const int64_t round = floor_div(chunk, chunks);
  return round * length + (chunk - round * chunks) * chunk_length;
}

// An upper bound of the keys that one token meets, where rows have at most `length` tokens.
int64_t most_keys(const DecodeParams& p, int64_t length) {
  const AttentionRule& rule = p.rule;
  const int64_t width = rule.rank_window ? rule.window_before + 1 + rule.window_after
                                         : (rule.chunks_before + 1 + rule.chunks_after) * rule.chunk_length;
  return p.R * (rule.ring ? width : min_of(width, length));
}

// Scratch of one thread.
struct Scratch {
  float* query;        // (D), scaled
  float* row;          // (D), a row in float32
  float* sums;         // (Dv)
  float* staging;      // 2 * kLanes * kLanes
  float* projections;  // (R, rotation_width)
  int32_t* list;       // positions of keys, then their slots
  float* logits;       // of the list
  uint32_t* met;  // a hash table of the positions in the list, plus 1; null unless duplicates are corrected
  uint32_t table_mask;

  Scratch(const DecodeParams& p, int64_t keys, Arena* arena) {
    const int64_t padded = round_up(keys, kLanes);
    query = arena->take<float>(round_up(p.D, kLanes));
    row = arena->take<float>(round_up(max_of(p.D, p.Dv), kLanes));
    sums = arena->take<float>(round_up(p.Dv, kLanes));
    staging = arena->take<float>(2 * kLanes * kLanes);
    projections = arena->take<float>(p.R * p.rotation_width);
    list = arena->take<int32_t>(padded);
    logits = arena->take<float>(padded);
    uint32_t size = 16;
    while (size < 2 * keys) size *= 2;
    met = p.rule.correct_duplicates ? arena->take<uint32_t>(size) : nullptr;
    table_mask = size - 1;
  }
};

// The work of one row of the batch in one head.
class Task {
 public:
  Task(const DecodeParams& p, const Scratch& scratch, int64_t index)
      : p_(p), s_(scratch), index_(index), b_(index / p.H), h_(index % p.H), position_(p.lengths[b_]) {}

  Status run() {
    if (position_ < 0 || position_ >= p_.capacity) return Status::kFull;
    append();
    if (p_.buckets) insert();
    if (s_.met) memset(s_.met, 0, sizeof(uint32_t) * (static_cast<size_t>(s_.table_mask) + 1));
    if (!list_keys()) return Status::kBadStarts;
    attend();
    return Status::kOk;
  }

 private:
  // Writes the token's key and value to the cache, and its scaled query to scratch.
  void append() {
    with_element(p_.dtype, [&](auto element) {
      using T = decltype(element);
      const T* q = row_of<const T>(p_.q, b_, h_, 0);
      load_row(q, p_.D, round_up(p_.D, kLanes), s_.query, p_.scale * kLog2E);
      float norm = 1.0f;
      if (!p_.k.data && p_.rule.key_norm != KeyNorm::kNone) norm = inverse_norm_of(q, p_.D, p_.rule.key_norm);
      load_row(p_.k.data ? row_of<const T>(p_.k, b_, h_, 0) : q, p_.D, p_.D, s_.row, norm);
      store_in_cache(p_.keys, p_.key_dtype, p_.D);
      load_row(row_of<const T>(p_.v, b_, h_, 0), p_.Dv, p_.Dv, s_.row);
      store_in_cache(p_.values, p_.value_dtype, p_.Dv);
    });
  }

  void store_in_cache(void* cache, DType dtype, int64_t columns) {
    with_element(dtype, [&](auto element) {
      using T = decltype(element);
      T* rows = static_cast<T*>(cache) + index_ * p_.room * columns;
      store_row(s_.row, columns, 1.0f, rows + position_ % p_.room * columns);
    });
  }

  // Hashes the token and puts it among the recent tokens of each round, behind those of its bucket.
  void insert() {
    with_element(p_.dtype, [&](auto element) {
      load_row(row_of<const decltype(element)>(p_.hashed, b_, h_, 0), p_.D, p_.D, s_.row);
    });
    project();
    for (int64_t r = 0; r < p_.R; ++r) {
      const int32_t bucket = bucket_of(s_.projections + r * p_.rotation_width);
      p_.buckets[(index_ * p_.R + r) * p_.capacity + position_] = bucket;
      int32_t* positions = recent(r);
      int32_t* buckets = recent_buckets(r);
      int64_t at = p_.recent_count;
      for (; at > 0 && buckets[at - 1] > bucket; --at)
        positions[at] = positions[at - 1], buckets[at] = buckets[at - 1];
      positions[at] = static_cast<int32_t>(position_);
      buckets[at] = bucket;
    }
  }

  // projections = row * rotations. A projection is one chain of additions, as in hash.cpp, so that the bits
  // are the same.
  void project() {
    constexpr int kVectors = 4;
    const int64_t columns = p_.R * p_.rotation_width;
    const float* rotations = p_.rotations + (p_.rotation_heads == 1 ? 0 : h_) * p_.D * columns;
    int64_t c = 0;
    for (; c + kVectors * kLanes <= columns; c += kVectors * kLanes) {
      vfloat dot[kVectors] = {};
      for (int64_t d = 0; d < p_.D; ++d) {
        const vfloat x = splat(s_.row[d]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) dot[v] += load(rotations + d * columns + c + v * kLanes) * x;
      }
      for (int v = 0; v < kVectors; ++v) store(s_.projections + c + v * kLanes, dot[v]);
    }
    for (; c < columns; c += kLanes) {
      const auto bytes = sizeof(float) * static_cast<size_t>(min_of<int64_t>(kLanes, columns - c));
      vfloat dot{};
      for (int64_t d = 0; d < p_.D; ++d) {
        vfloat r{};
        memcpy(&r, rotations + d * columns + c, bytes);
        dot += r * splat(s_.row[d]);
      }
      memcpy(s_.projections + c, &dot, bytes);
    }
  }

  // The bucket of one round's projections. The lowest column wins a tie.
  int32_t bucket_of(const float* y) const {
    int32_t bucket = 0, multiplier = 1;
    float not_finite = 0.0f;
    for (int32_t f = 0; f < p_.n_factors; ++f) {
      const int32_t half = p_.factors[f] / 2;
      float high = -kInfinity, low = kInfinity;
      int32_t argmax = 0, argmin = 0;
      for (int32_t c = 0; c < half; ++c) {
        if (y[c] > high) high = y[c], argmax = c;
        if (y[c] < low) low = y[c], argmin = c;
        not_finite += y[c] * 0.0f;
      }
      bucket += multiplier * (high >= -low ? argmax : half + argmin);
      multiplier *= p_.factors[f];
      y += half;
    }
    return not_finite == 0.0f ? bucket : 0;
  }

  // Lists the slots of the keys that the token sees; false if starts or orders are not those of this cache.
  bool list_keys() {
    const int64_t length = position_ + 1, chunk_length = p_.rule.chunk_length;
    count_ = 0;
    if (!p_.rule.rank_window && length <= chunk_length) {  // neither hashed nor sorted
      for (int64_t j = 0; j < length; ++j) add(j);
      return true;
    }
    const int64_t chunks = p_.rule.rank_window ? 1 : (length + chunk_length - 1) / chunk_length;
    for (int64_t r = 0; r < p_.R; ++r) {
      const int64_t rank = p_.buckets ? rank_of_newest(r) : position_;
      if (rank < 0 || rank >= length) return false;
      int64_t low, high;
      if (p_.rule.rank_window) {
        low = r * length + rank - p_.rule.window_before;
        high = r * length + rank + 1 + p_.rule.window_after;
      } else {
        const int64_t chunk = r * chunks + rank / chunk_length;
        low = chunk_start(chunk - p_.rule.chunks_before, chunks, chunk_length, length);
        high = chunk_start(chunk + 1 + p_.rule.chunks_after, chunks, chunk_length, length);
      }
      if (!p_.rule.ring) {
        low = max_of(low, r * length);
        high = min_of(high, (r + 1) * length);
      }
      while (low < high) {
        const int64_t ring = p_.R * length;
        const int64_t place = low - floor_div(low, ring) * ring, round = place / length,
                      first = place % length;
        const int64_t count = min_of(high - low, length - first);
        low += count;
        if (!list_ranks(r, round, first, first + count)) return false;
      }
    }
    return true;
  }

  // Adds the keys at ranks [first, last) of `round`, as they are seen from the token in round `own`.
  bool list_ranks(int64_t own, int64_t round, int64_t first, int64_t last) {
    if (!p_.buckets) {
      for (int64_t j = first; j < last; ++j) add(j);
      return true;
    }
    const int64_t total = position_ + 1 - recents();
    if (p_.rule.bucket_mask) {
      if (round != own) return true;
      const int32_t bucket = newest_bucket(round);
      const int32_t* starts = starts_of(round);
      first = max_of(first, starts[bucket] + recents_before(round, bucket));
      last = min_of(last, starts[bucket + 1] + recents_before(round, bucket + 1));
    }
    const int32_t* order = p_.order + (index_ * p_.R + round) * p_.order_size;
    int64_t before = recents_ranked_before(round, first);
    for (int64_t k = first; k < last; ++k) {
      int64_t j;
      if (before < recents() && recent_rank(round, before) == k) {
        j = recent(round)[before++];
      } else {
        if (k < before || k - before >= min_of(total, p_.order_size)) return false;
        j = order[k - before];
      }
      if (j < 0 || j > position_) return false;
      add(j);
    }
    return true;
  }

  void add(int64_t j) {
    if (j == position_ && p_.rule.exclude_self) return;
    if (s_.met) {
      const auto entry = static_cast<uint32_t>(j) + 1;
      uint32_t place = entry * 2654435769u >> 7 & s_.table_mask;
      while (s_.met[place] && s_.met[place] != entry) place = (place + 1) & s_.table_mask;
      if (s_.met[place] == entry) return;
      s_.met[place] = entry;
    }
    s_.list[count_++] = static_cast<int32_t>(j < p_.room ? j : j % p_.room);
  }

  // The sorted order of a round: a recent token ranks after the merged ones of its bucket and of earlier
  // buckets, and after the recent ones sorted before it.
  int64_t recents() const { return p_.recent_count + 1; }  // the newest token included
  int32_t* recent(int64_t round) const { return p_.recent + (index_ * p_.R + round) * p_.recent_size; }
  int32_t* recent_buckets(int64_t round) const {
    return p_.recent_buckets + (index_ * p_.R + round) * p_.recent_size;
  }
  const int32_t* starts_of(int64_t round) const {
    return p_.starts + (index_ * p_.R + round) * p_.starts_size;
  }
  int32_t newest_bucket(int64_t round) const {
    return p_.buckets[(index_ * p_.R + round) * p_.capacity + position_];
  }
  int64_t recent_rank(int64_t round, int64_t i) const {
    return starts_of(round)[recent_buckets(round)[i] + 1] + i;
  }
  // The newest token stands last among the recent ones of its bucket.
  int64_t rank_of_newest(int64_t round) const {
    return recent_rank(round, recents_before(round, newest_bucket(round) + 1) - 1);
  }
  // How many recent tokens of a round have a bucket below `bucket`.
  int64_t recents_before(int64_t round, int32_t bucket) const {
    const int32_t* buckets = recent_buckets(round);
    return first_not_below(recents(), bucket, [&](int64_t i) { return buckets[i]; });
  }
  int64_t recents_ranked_before(int64_t round, int64_t rank) const {
    return first_not_below(recents(), rank, [&](int64_t i) { return recent_rank(round, i); });
  }
  // The first i in [0, n) at which the rising value(i) is not below `bound`, or n.
  template <typename Value>
  static int64_t first_not_below(int64_t n, int64_t bound, Value value) {
    int64_t low = 0;
    while (low < n) {
      const int64_t middle = (low + n) / 2;
      if (value(middle) < bound)
        low = middle + 1;
      else
        n = middle;
    }
    return low;
  }

  // out = softmax of the list's logits times the list's values; the token's own value if the list is empty,
  // which only the exclusion of the token itself can make it.
  void attend() {
    if (count_ == 0) {  // s_.row holds the query, once the token was hashed
      with_element(p_.dtype, [&](auto element) {
        using T = decltype(element);
        memcpy(row_of<T>(p_.out, b_, h_, 0), row_of<T>(p_.v, b_, h_, 0),
               sizeof(T) * static_cast<size_t>(p_.Dv));
      });
      return;
    }
    with_element(p_.key_dtype, [&](auto element) {
      using T = decltype(element);
      multiply_keys(static_cast<const T*>(p_.keys) + index_ * p_.room * p_.D);
    });
    const float sum = exponentiate();
    with_element(p_.value_dtype, [&](auto element) {
      using T = decltype(element);
      multiply_values(static_cast<const T*>(p_.values) + index_ * p_.room * p_.Dv);
    });
    with_element(p_.dtype, [&](auto element) {
      store_row(s_.sums, p_.Dv, 1.0f / sum, row_of<decltype(element)>(p_.out, b_, h_, 0));
    });
  }

  // logits = keys * query, for kLanes keys at a time: their partial sums are transposed and added.
  template <typename T>
  void multiply_keys(const T* keys) {
    const int64_t D = p_.D;
    float* transposed = s_.staging + kLanes * kLanes;
    for (int64_t first = 0; first < count_; first += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        if (first + lane + kLanes < count_)
          prefetch_row(keys + s_.list[first + lane + kLanes] * D, D * static_cast<int64_t>(sizeof(T)));
        const T* key = keys + s_.list[min_of(first + lane, count_ - 1)] * D;
        vfloat dot{};
        int64_t d = 0;
        for (; d + kLanes <= D; d += kLanes) dot += load(s_.query + d) * load_floats(key + d);
        for (; d < D; ++d) dot[0] += s_.query[d] * to_float(key[d]);
        store(s_.staging + lane * kLanes, dot);
      }
      transpose_lanes(s_.staging, kLanes, kLanes, transposed, kLanes);
      vfloat logits{};
      for (int lane = 0; lane < kLanes; ++lane) logits += load(transposed + lane * kLanes);
      store(s_.logits + first, logits);
    }
  }

  // Replaces the logits, which are in units of ln 2, by their powers of two, and returns the sum of these.
  float exponentiate() {
    float largest = s_.logits[0];
    for (int64_t i = 1; i < count_; ++i) largest = max_of(largest, s_.logits[i]);
    for (int64_t i = count_; i < round_up(count_, kLanes); ++i) s_.logits[i] = -kInfinity;
    vfloat sums{};
    for (int64_t i = 0; i < count_; i += kLanes) {
      const vfloat weights = exp2_of(load(s_.logits + i) - largest);
      store(s_.logits + i, weights);
      sums += weights;
    }
    return sum_of_lanes(sums);
  }

  template <typename T>
  void multiply_values(const T* values) {
    constexpr int kVectors = 4;
    const int64_t columns = p_.Dv;
    int64_t c = 0;
    for (; c + kVectors * kLanes <= columns; c += kVectors * kLanes) add_values<kVectors>(values, c);
    for (; c + kLanes <= columns; c += kLanes) add_values<1>(values, c);
    for (; c < columns; ++c) {
      s_.sums[c] = 0.0f;
      for (int64_t i = 0; i < count_; ++i)
        s_.sums[c] += s_.logits[i] * to_float(values[s_.list[i] * columns + c]);
    }
  }

  // The sums of kVectors vectors of columns from c on.
  template <int kVectors, typename T>
  void add_values(const T* values, int64_t c) {
    constexpr int64_t kAhead = 16;
    vfloat sums[kVectors] = {};
    for (int64_t i = 0; i < count_; ++i) {
      if (i + kAhead < count_)
        prefetch_row(values + s_.list[i + kAhead] * p_.Dv + c,
                     kVectors * kLanes * static_cast<int64_t>(sizeof(T)));
      const T* row = values + s_.list[i] * p_.Dv + c;
      const vfloat weight = splat(s_.logits[i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[v] += load_floats(row + v * kLanes) * weight;
    }
    for (int v = 0; v < kVectors; ++v) store(s_.sums + c + v * kLanes, sums[v]);
  }

  const DecodeParams& p_;
  const Scratch& s_;
  int64_t index_, b_, h_, position_, count_ = 0;
};

}  // namespace

Status decode_step(const DecodeParams& p) {
  const int64_t tasks = p.B * p.H;
  if (tasks == 0) return Status::kOk;
  if (p.R < 1 || p.room < 1 || (!p.rule.rank_window && p.rule.chunk_length < 1)) return Status::kEmpty;
  if (p.buckets && p.recent_count >= p.recent_size) return Status::kFull;
  int64_t longest = 0;
  for (int64_t b = 0; b < p.B; ++b) longest = max_of(longest, p.lengths[b] + 1);
  const int64_t keys = most_keys(p, longest);
  const bool shared = tasks * keys * (p.D + p.Dv) >= kSharedProducts;
  const auto threads = static_cast<int32_t>(shared ? min_of<int64_t>(p.threads, tasks) : 1);
  Arena size;
  for (int32_t thread = 0; thread < threads; ++thread) Scratch(p, keys, &size);
  Arena arena;
  arena.base = static_cast<char*>(allocate_scratch(size.used));
  char* const scratch_memory = arena.base;
  int32_t worst = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) reduction(max : worst)
  for (int32_t thread = 0; thread < threads; ++thread) {
    Arena own;
    own.base = scratch_memory;
    own.used = size.used / static_cast<size_t>(threads) * static_cast<size_t>(thread);
    const Scratch scratch(p, keys, &own);
    for (int64_t i = tasks * thread / threads; i < tasks * (thread + 1) / threads; ++i)
      worst = max_of(worst, static_cast<int32_t>(Task(p, scratch, i).run()));
  }
  free_scratch(scratch_memory);
  for (int64_t b = 0; b < p.B; ++b) p.lengths[b] += worst == 0 ? 1 : 0;
  return static_cast<Status>(worst);
}

}  // namespace REFORMER_ISA_NAMESPACE
