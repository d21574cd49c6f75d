// Times CUB's segmented radix sort of (bucket id, position) pairs, the peer of bucket_sort.
//
//   nvcc -O3 -arch=native cub_sort.cu -o cub_sort && ./cub_sort SEGMENTS LENGTH BITS
//
// Prints the median of 20 sorts in microseconds, and exits with 1 where the order is wrong.
#include <cub/cub.cuh>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                        \
  do {                                                                     \
    const cudaError_t status = (call);                                     \
    if (status != cudaSuccess) {                                           \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(status)); \
      return 1;                                                            \
    }                                                                      \
  } while (0)

int main(int count, char** arguments) {
  if (count != 4) {
    std::fprintf(stderr, "usage: cub_sort SEGMENTS LENGTH BITS\n");
    return 2;
  }
  const int segments = std::atoi(arguments[1]), length = std::atoi(arguments[2]),
            bits = std::atoi(arguments[3]);
  const int items = segments * length;
  std::vector<uint32_t> ids(items), positions(items), offsets(segments + 1), sorted(items), order(items);
  uint32_t state = 1;
  for (int i = 0; i < items; ++i) {
    state = state * 1664525u + 1013904223u;
    ids[i] = (state >> 8) & ((1u << bits) - 1);
    positions[i] = i % length;
  }
  for (int s = 0; s <= segments; ++s) offsets[s] = s * length;
  uint32_t *keys, *keys_out, *values, *values_out, *starts;
  const size_t bytes = sizeof(uint32_t) * items;
  CHECK(cudaMalloc(&keys, bytes));
  CHECK(cudaMalloc(&keys_out, bytes));
  CHECK(cudaMalloc(&values, bytes));
  CHECK(cudaMalloc(&values_out, bytes));
  CHECK(cudaMalloc(&starts, sizeof(uint32_t) * (segments + 1)));
  CHECK(cudaMemcpy(keys, ids.data(), bytes, cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(values, positions.data(), bytes, cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy(starts, offsets.data(), sizeof(uint32_t) * (segments + 1), cudaMemcpyHostToDevice));

  void* scratch = nullptr;
  size_t scratch_bytes = 0;
  const auto sort = [&] {
    return cub::DeviceSegmentedRadixSort::SortPairs(scratch, scratch_bytes, keys, keys_out, values,
                                                    values_out, items, segments, starts, starts + 1, 0, bits);
  };
  CHECK(sort());  // asks for the scratch memory
  CHECK(cudaMalloc(&scratch, scratch_bytes));
  cudaEvent_t first, last;
  CHECK(cudaEventCreate(&first));
  CHECK(cudaEventCreate(&last));
  std::vector<float> times;
  for (int repeat = 0; repeat < 23; ++repeat) {
    CHECK(cudaEventRecord(first));
    CHECK(sort());
    CHECK(cudaEventRecord(last));
    CHECK(cudaEventSynchronize(last));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, first, last));
    if (repeat >= 3) times.push_back(1e3f * milliseconds);  // the first ones warm up
  }
  CHECK(cudaMemcpy(sorted.data(), keys_out, bytes, cudaMemcpyDeviceToHost));
  CHECK(cudaMemcpy(order.data(), values_out, bytes, cudaMemcpyDeviceToHost));
  for (int i = 1; i < items; ++i) {
    const bool same = i / length == (i - 1) / length;
    if (same && (sorted[i - 1] > sorted[i] || (sorted[i - 1] == sorted[i] && order[i - 1] >= order[i]))) {
      std::fprintf(stderr, "wrong order at %d\n", i);
      return 1;
    }
  }
  std::sort(times.begin(), times.end());
  std::printf("%.2f\n", times[times.size() / 2]);
  return 0;
}
