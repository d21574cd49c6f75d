// Stable counting sort of bucket ids: O(L + n) a segment.
//
// A segment is cut into tiles, each with its own histogram. A running sum over (bucket, tile) turns the
// counts into places, and each tile then writes its positions: the order is the stable one however many tiles
// there are. Tiles serve two ends: four of them are walked side by side, because a counter that was just
// written must not be waited for (ids in a row are often equal); and threads share a segment when there are
// fewer segments than threads.
#include <algorithm>
#include <cstring>

#include "variants.h"

namespace reformer {
namespace {

constexpr int kTiles = 4;
// A segment shorter than this many ids a thread is not worth sharing.
constexpr int64_t kSharedLength = 1 << 15;

// The n counters of kTiles tiles are kept together: counters[bucket * kTiles + tile].
struct Part {
  const int32_t* ids;
  int64_t first, length;  // positions in the segment
  int32_t* counters;
};

int32_t clamp(int32_t id, int32_t last) { return id < 0 ? 0 : id > last ? last : id; }

template <typename Visit>
void for_each_id(const Part& part, int32_t last, Visit visit) {
  const int64_t tile_length = part.length / kTiles;
  const int32_t* ids = part.ids + part.first;
  for (int64_t i = 0; i < tile_length; ++i)
    for (int tile = 0; tile < kTiles; ++tile) {
      const int64_t at = tile * tile_length + i;
      visit(part.counters[clamp(ids[at], last) * int64_t{kTiles} + tile], part.first + at);
    }
  for (int64_t at = kTiles * tile_length; at < part.length; ++at)
    visit(part.counters[clamp(ids[at], last) * int64_t{kTiles} + kTiles - 1], part.first + at);
}

void count(const Part& part, int32_t n) {
  std::memset(part.counters, 0, sizeof(int32_t) * kTiles * static_cast<size_t>(n));
  for_each_id(part, n - 1, [](int32_t& counter, int64_t) { ++counter; });
}

void place(const Part* parts, int32_t n_parts, int32_t n, int32_t* starts) {
  int32_t total = 0;
  for (int32_t bucket = 0; bucket < n; ++bucket) {
    starts[bucket] = total;
    for (int32_t p = 0; p < n_parts; ++p)
      for (int tile = 0; tile < kTiles; ++tile) {
        int32_t& counter = parts[p].counters[bucket * int64_t{kTiles} + tile];
        const int32_t here = counter;
        counter = total;
        total += here;
      }
  }
}

void scatter(const Part& part, int32_t n, int32_t* order) {
  for_each_id(part, n - 1,
              [order](int32_t& counter, int64_t i) { order[counter++] = static_cast<int32_t>(i); });
}

// With about as many buckets as ids, tiles would cost more than they save. `starts` is the only table: it
// counts, then is the cursor of the scatter, after which starts[b] is the end of bucket b, one entry early.
void sort_sparse(const int32_t* ids, int64_t L, int32_t n, int32_t* order, int32_t* starts) {
  std::memset(starts, 0, sizeof(int32_t) * static_cast<size_t>(n));
  for (int64_t i = 0; i < L; ++i) ++starts[clamp(ids[i], n - 1)];
  int32_t total = 0;
  for (int32_t bucket = 0; bucket < n; ++bucket) {
    const int32_t here = starts[bucket];
    starts[bucket] = total;
    total += here;
  }
  for (int64_t i = 0; i < L; ++i) order[starts[clamp(ids[i], n - 1)]++] = static_cast<int32_t>(i);
  std::memmove(starts + 1, starts, sizeof(int32_t) * static_cast<size_t>(n));
  starts[0] = 0;
}

}  // namespace

void bucket_sort(const SortParams& p) {
  if (p.segments == 0) return;
  const auto n = static_cast<int32_t>(p.n_buckets);
  const bool sparse = p.L < 2 * kTiles * p.n_buckets;
  // Threads that share one segment, and threads that take segments of their own.
  int32_t shared = 1;
  if (!sparse && p.segments < p.threads) {
    const int64_t worthwhile = std::min(p.L / kSharedLength, p.L / (2 * kTiles * p.n_buckets));
    shared = static_cast<int32_t>(std::clamp<int64_t>(worthwhile, 1, p.threads));
  }
  const auto separate = shared > 1 ? 1 : static_cast<int32_t>(std::min<int64_t>(p.threads, p.segments));
  const int64_t counters_size = sparse ? 0 : kTiles * p.n_buckets;
  const int32_t n_parts = std::max(shared, separate);
  const size_t parts_bytes = (sizeof(Part) * static_cast<size_t>(n_parts) + 63) / 64 * 64;
  void* scratch =
      allocate_scratch(parts_bytes + sizeof(int32_t) * static_cast<size_t>(n_parts * counters_size));
  auto* parts = static_cast<Part*>(scratch);
  auto* counters = reinterpret_cast<int32_t*>(static_cast<char*>(scratch) + parts_bytes);

  if (shared > 1) {
    for (int64_t s = 0; s < p.segments; ++s) {
      int32_t* order = p.order + s * p.L;
      for (int32_t i = 0; i < shared; ++i) {
        const int64_t first = p.L * i / shared, end = p.L * (i + 1) / shared;
        parts[i] = {p.buckets + s * p.L, first, end - first, counters + i * counters_size};
      }
#pragma omp parallel for schedule(static, 1) num_threads(shared)
      for (int32_t i = 0; i < shared; ++i) count(parts[i], n);
      place(parts, shared, n, p.starts + s * p.starts_size);
#pragma omp parallel for schedule(static, 1) num_threads(shared)
      for (int32_t i = 0; i < shared; ++i) scatter(parts[i], n, order);
    }
  } else {
#pragma omp parallel for schedule(static, 1) num_threads(separate)
    for (int32_t i = 0; i < separate; ++i) {
      for (int64_t s = p.segments * i / separate; s < p.segments * (i + 1) / separate; ++s) {
        const int32_t* ids = p.buckets + s * p.L;
        int32_t* order = p.order + s * p.L;
        int32_t* starts = p.starts + s * p.starts_size;
        if (sparse) {
          sort_sparse(ids, p.L, n, order, starts);
        } else {
          const Part part{ids, 0, p.L, counters + i * counters_size};
          count(part, n);
          place(&part, 1, n, starts);
          scatter(part, n, order);
        }
      }
    }
  }
  free_scratch(scratch);

  for (int64_t s = 0; s < p.segments; ++s)
    std::fill(p.starts + s * p.starts_size + n, p.starts + (s + 1) * p.starts_size,
              static_cast<int32_t>(p.L));
}

}  // namespace reformer
