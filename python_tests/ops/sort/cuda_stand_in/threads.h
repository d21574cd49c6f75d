// The threads of a block as threads of the operating system, for the thread sanitizer.
//
// Only barriers order memory. Matching and shuffling are relaxed atomics, because CUDA does not promise that
// they order the other accesses of the lanes.
#pragma once

#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

inline thread_local stand_in::Index threadIdx, blockIdx;

namespace stand_in {

class Barrier {
 public:
  void expect(int threads) { threads_ = threads; }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t round = round_;
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++round_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  int threads_ = 0, arrived_ = 0;
  int64_t round_ = 0;
};
inline Barrier block;
inline void block_barrier() { block.wait(); }

// What each lane passes to its warp's operations, with the number of the operation; even and odd ones apart.
inline std::atomic<uint64_t> slots[kMaxThreads / kLanes][2][kLanes];
inline thread_local uint32_t warp_round = 0;

inline void meet(std::memory_order store, std::memory_order load, unsigned value, unsigned* values) {
  const uint64_t round = ++warp_round;
  auto& lanes = slots[threadIdx.x / kLanes][round % 2];
  lanes[threadIdx.x % kLanes].store(round << 32 | value, store);
  for (int lane = 0; lane < kLanes; ++lane) {
    uint64_t numbered;
    while ((numbered = lanes[lane].load(load)) >> 32 != round) sched_yield();
    if (values) values[lane] = static_cast<unsigned>(numbered);
  }
}

inline void warp_barrier() { meet(std::memory_order_release, std::memory_order_acquire, 0, nullptr); }
inline unsigned exchange(Operation operation, unsigned value, int distance) {
  unsigned values[kLanes];
  meet(std::memory_order_relaxed, std::memory_order_relaxed, value, values);
  return result_of(operation, values, static_cast<int>(threadIdx.x) % kLanes, distance);
}

template <typename Kernel>
void run(int64_t blocks, int threads, Garbage& memory, Kernel body) {
  block.expect(threads);
  for (auto& warp : slots)
    for (auto& parity : warp)
      for (auto& lane : parity) lane = 0;
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread)
    pool.emplace_back([&, thread] {
      threadIdx.x = static_cast<unsigned>(thread);
      for (int64_t index = 0; index < blocks; ++index) {
        if (thread == 0) memory.refill();
        block.wait();
        blockIdx.x = static_cast<unsigned>(index);
        body();
        block.wait();
      }
    });
  for (std::thread& thread : pool) thread.join();
}

}  // namespace stand_in
