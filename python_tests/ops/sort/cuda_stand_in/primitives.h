// CUDA on the host, for tests: it takes the place of csrc/cuda/primitives.h and of the names that nvcc knows.
//
// Blocks run one after another. With STAND_IN_THREADS, the threads of a block are threads of the operating
// system, for the thread sanitizer. Otherwise they are fibers, and a schedule decides which thread runs first
// between two barriers: the first, the last, or one drawn at random. If the threads of a kernel depend on
// each other without a barrier between them, one of the schedules gives another result.
//
// It is stricter than a GPU. Warp operations must name all lanes, and all of them must arrive. A barrier that
// some threads of the block do not reach ends the program. Shared memory has exactly the size that the launch
// asked for, and starts out as garbage.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <utility>

#define __global__
#define __device__
#define __forceinline__
#define __launch_bounds__(threads)

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }

namespace stand_in {

constexpr int kLanes = 32, kMaxThreads = 1024;

struct Index {
  unsigned x = 0;
};
enum class Schedule { kInOrder, kReversed, kShuffled };
inline Schedule schedule = Schedule::kInOrder;
inline std::minstd_rand random_numbers;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "stand-in: %s\n", what);
  std::_Exit(2);
}

// Writes the numbers 0..count-1 in the schedule's order.
inline void order_by_schedule(int* order, int count) {
  for (int i = 0; i < count; ++i) order[i] = schedule == Schedule::kReversed ? count - 1 - i : i;
  if (schedule == Schedule::kShuffled)
    for (int i = count - 1; i > 0; --i) std::swap(order[i], order[random_numbers() % (i + 1)]);
}

// Exactly `bytes` bytes, filled with garbage. The address sanitizer sees each access beyond the end.
class Garbage {
 public:
  explicit Garbage(size_t bytes) : bytes_(bytes), data_(std::malloc(bytes)) { refill(); }
  ~Garbage() { std::free(data_); }
  Garbage(const Garbage&) = delete;
  Garbage& operator=(const Garbage&) = delete;
  void refill() { std::memset(data_, 0x5b, bytes_); }
  void* data() const { return data_; }

 private:
  size_t bytes_;
  void* data_;
};
inline void* shared = nullptr;

enum class Operation { kNone, kBlockBarrier, kWarpBarrier, kMatch, kShuffle, kDone };
// The result of a warp operation for one lane, from the values that all lanes passed.
inline unsigned result_of(Operation operation, const unsigned* values, int lane, int distance) {
  if (operation == Operation::kShuffle) return values[lane >= distance ? lane - distance : lane];
  unsigned peers = 0;
  for (int other = 0; other < kLanes; ++other)
    if (values[other] == values[lane]) peers |= 1u << other;
  return peers;
}

}  // namespace stand_in

#ifdef STAND_IN_THREADS
#include "threads.h"
#else
#include "fibers.h"
#endif

inline void __syncthreads() { stand_in::block_barrier(); }
inline void __syncwarp() { stand_in::warp_barrier(); }
inline unsigned __match_any_sync(unsigned mask, unsigned value) {
  if (mask != ~0u) stand_in::fail("a warp operation must name all lanes");
  return stand_in::exchange(stand_in::Operation::kMatch, value, 0);
}
inline int __shfl_up_sync(unsigned mask, int value, int distance) {
  if (mask != ~0u) stand_in::fail("a warp operation must name all lanes");
  return static_cast<int>(
      stand_in::exchange(stand_in::Operation::kShuffle, static_cast<unsigned>(value), distance));
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int32_t atomicAdd(int32_t* address, int32_t value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

namespace reformer::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

template <typename Element>
Element* shared_memory() {
  return static_cast<Element*>(stand_in::shared);
}

template <typename Type>
struct NotDeduced {
  using type = Type;
};

template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void*,
                   typename NotDeduced<Parameters>::type... arguments) {
  if (blocks < 1 || blocks > 2147483647) stand_in::fail("a launch of too few or too many blocks");
  if (threads % stand_in::kLanes || threads > stand_in::kMaxThreads) stand_in::fail("threads of a block");
  if (shared_bytes > 99 << 10) stand_in::fail("more shared memory than each GPU has");
  stand_in::Garbage memory(static_cast<size_t>(shared_bytes));
  stand_in::shared = memory.data();
  stand_in::run(blocks, threads, memory, [&] { kernel(arguments...); });
  return cudaSuccess;
}

struct DeviceGuard {
  explicit DeviceGuard(int) {}
  cudaError_t error() const { return cudaSuccess; }
};

}  // namespace reformer::cuda
