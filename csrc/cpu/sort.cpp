// Stable counting sort of bucket ids: O(L + n) a segment.
#include <cstring>

#include "../kernels.h"

namespace reformer {
namespace {

int32_t clamp(int32_t id, int32_t last) {
  return id < 0 ? 0 : id > last ? last : id;
}

// `starts` is also the cursor of the scatter, after which starts[b] is the end of bucket b: one place early.
void sort_segment(const int32_t* ids, int64_t L, int32_t n, int32_t* order, int32_t* starts) {
  std::memset(starts, 0, sizeof(int32_t) * static_cast<size_t>(n));
  for (int64_t i = 0; i < L; ++i) ++starts[clamp(ids[i], n - 1)];
  int32_t total = 0;
  for (int32_t b = 0; b < n; ++b) {
    const int32_t count = starts[b];
    starts[b] = total;
    total += count;
  }
  for (int64_t i = 0; i < L; ++i) order[starts[clamp(ids[i], n - 1)]++] = static_cast<int32_t>(i);
  std::memmove(starts + 1, starts, sizeof(int32_t) * static_cast<size_t>(n));
  starts[0] = 0;
}

}  // namespace

void bucket_sort(const SortParams& p) {
  const auto n = static_cast<int32_t>(p.n_buckets);
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int64_t s = 0; s < p.segments; ++s) {
    int32_t* starts = p.starts + s * p.starts_size;
    sort_segment(p.buckets + s * p.L, p.L, n, p.order + s * p.L, starts);
    for (int64_t b = n + 1; b < p.starts_size; ++b) starts[b] = static_cast<int32_t>(p.L);
  }
}

}  // namespace reformer
