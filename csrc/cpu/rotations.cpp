// Random rotations, drawn by counter: see rotations.h.
#include "rotations.h"

#include "variants.h"

namespace REFORMER_ISA_NAMESPACE {

void sample_rotations(const RotationParams& p) {
  const int64_t rows = p.heads * p.D, row_size = p.R * p.width;  // a row for each head and dimension
  if (rows * row_size == 0) return;
  // So many numbers take as long as starting a thread does.
  constexpr int64_t kPerThread = 1 << 14;
  const auto threads = static_cast<int32_t>(
      max_of<int64_t>(1, min_of(min_of<int64_t>(p.threads, rows), rows * row_size / kPerThread)));
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int32_t thread = 0; thread < threads; ++thread) {
    const int64_t end = rows * (thread + 1) / threads;
    for (int64_t row = rows * thread / threads; row < end;) {
      const int64_t head = row / p.D, dim = row % p.D, dims = min_of(end - row, p.D - dim);
      draw_rotations(p.seed, head, dim, dims, 0, p.R, p.width, p.out + row * row_size);
      row += dims;
    }
  }
}

}  // namespace REFORMER_ISA_NAMESPACE
