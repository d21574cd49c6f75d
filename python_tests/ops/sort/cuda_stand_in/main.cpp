// Sorts the cases of a file with one of the variants of bucket_sort.cu.
//
// stand_in VARIANT SCHEDULE SEED INPUT OUTPUT
//   SCHEDULE  0 in order, 1 reversed, 2 shuffled (by SEED)
//   INPUT     for each case: int64 segments, L, n_buckets, starts_size, then the int32 ids
//   OUTPUT    for each case: the int32 order and starts
#include <vector>

#include "cuda/primitives.h"
#include "kernels.h"
// Written by the test: the variants, each in a namespace of its own, and the table kVariants.
#include "variants.h"

int main(int count, char** arguments) {
  if (count != 6) return 3;
  const Variant& variant = kVariants[std::atoi(arguments[1])];
  stand_in::schedule = static_cast<stand_in::Schedule>(std::atoi(arguments[2]));
  stand_in::random_numbers.seed(static_cast<unsigned>(std::atoi(arguments[3])));
  std::FILE* input = std::fopen(arguments[4], "rb");
  std::FILE* output = std::fopen(arguments[5], "wb");
  if (!input || !output) return 3;
  int64_t header[4];
  while (std::fread(header, sizeof(int64_t), 4, input) == 4) {
    reformer::SortParams p;
    p.segments = header[0];
    p.L = header[1];
    p.n_buckets = header[2];
    p.starts_size = header[3];
    const auto elements = static_cast<size_t>(p.segments * p.L);
    const auto entries = static_cast<size_t>(p.segments * p.starts_size);
    const stand_in::Garbage buckets(elements * sizeof(int32_t)), order(elements * sizeof(int32_t)),
        starts(entries * sizeof(int32_t)), workspace(variant.workspace_bytes(p));
    if (std::fread(buckets.data(), sizeof(int32_t), elements, input) != elements) return 3;
    p.buckets = static_cast<const int32_t*>(buckets.data());
    p.order = static_cast<int32_t*>(order.data());
    p.starts = static_cast<int32_t*>(starts.data());
    p.workspace = workspace.data();
    if (variant.sort(p)) return 4;
    std::fwrite(order.data(), sizeof(int32_t), elements, output);
    std::fwrite(starts.data(), sizeof(int32_t), entries, output);
  }
  return std::fclose(output) == 0 ? 0 : 3;
}
