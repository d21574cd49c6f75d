// Stable counting sort of bucket ids: order = argsort(buckets), O(L + n_buckets) per segment.
//
// A segment is cut into tiles, each with its own histogram. A running sum over (bucket, tile) turns the
// counts into offsets in the order, and each tile then writes its positions there. The result is the stable
// order for any number of tiles. Tiles have two uses. Four of them are walked side by side: neighbouring ids
// are often equal, and incrementing the same counter twice in a row would stall. And threads share a segment
// when there are fewer segments than threads.
//
// It is compiled once, not for each instruction set, as nothing here gains from vectors.
#include <algorithm>
#include <cstring>

#include "variants.h"

namespace reformer {
namespace {

constexpr int kTiles = 4;
// Threads share a segment only if each gets this many ids.
constexpr int64_t kSharedLength = 1 << 15;

// A part of a segment that one thread sorts, as kTiles tiles. The counters of a bucket are neighbours:
// counters[bucket * kTiles + tile].
struct Part {
  const int32_t* ids;
  int64_t first, length;  // positions in the segment
  int32_t* counters;
};

int32_t clamp(int32_t id, int32_t last) { return id < 0 ? 0 : id > last ? last : id; }

// Calls visit(counter, position) for each id, in turns from each tile; in rising order within a tile.
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

// Counts the ids of each bucket and tile.
void count_ids(const Part& part, int32_t n) {
  std::memset(part.counters, 0, sizeof(int32_t) * kTiles * static_cast<size_t>(n));
  for_each_id(part, n - 1, [](int32_t& counter, int64_t) { ++counter; });
}

// Turns the counts of all parts into the offset of each bucket and tile, and writes the bucket starts.
void counts_to_offsets(const Part* parts, int32_t n_parts, int32_t n, int32_t* starts) {
  int32_t total = 0;
  for (int32_t bucket = 0; bucket < n; ++bucket) {
    starts[bucket] = total;
    for (int32_t p = 0; p < n_parts; ++p)
      for (int tile = 0; tile < kTiles; ++tile) {
        int32_t& counter = parts[p].counters[bucket * int64_t{kTiles} + tile];
        const int32_t size = counter;
        counter = total;
        total += size;
      }
  }
}

// Writes each position to its place in the order.
void scatter(const Part& part, int32_t n, int32_t* order) {
  for_each_id(part, n - 1,
              [order](int32_t& counter, int64_t i) { order[counter++] = static_cast<int32_t>(i); });
}

// Sorts a segment that has about as many buckets as ids, where tiles would cost more than they save. The only
// table is `starts`: first the counts, then where the next id of each bucket goes. At the end starts[b] is
// the end of bucket b, which belongs one entry later.
void sort_sparse(const int32_t* ids, int64_t L, int32_t n, int32_t* order, int32_t* starts) {
  std::memset(starts, 0, sizeof(int32_t) * static_cast<size_t>(n));
  for (int64_t i = 0; i < L; ++i) ++starts[clamp(ids[i], n - 1)];
  int32_t total = 0;
  for (int32_t bucket = 0; bucket < n; ++bucket) {
    const int32_t size = starts[bucket];
    starts[bucket] = total;
    total += size;
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
  // Either `shared` threads work on one segment at a time, or each of `separate` threads on its own segments.
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
      for (int32_t i = 0; i < shared; ++i) count_ids(parts[i], n);
      counts_to_offsets(parts, shared, n, p.starts + s * p.starts_size);
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
          count_ids(part, n);
          counts_to_offsets(&part, 1, n, starts);
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
