// The threads of a block as fibers; the schedule decides which one runs when.
#pragma once

#include <ucontext.h>

#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

inline stand_in::Index threadIdx, blockIdx;

namespace stand_in {

constexpr size_t kStackBytes = 64 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Operation waits_for = Operation::kNone;
  unsigned value = 0;  // what it passes to a warp operation, then the result
  int distance = 0;
  unsigned index = 0;
};
inline std::vector<Fiber> fibers(kMaxThreads);
inline Fiber* running = nullptr;
inline ucontext_t scheduler;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;
inline void (*call_kernel)(void*) = nullptr;
inline void* kernel = nullptr;

// The address sanitizer must hear of each change of stacks, before (leave_to) and after it (arrived).
inline void leave_to([[maybe_unused]] void** keep, [[maybe_unused]] const void* stack,
                     [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(keep, stack, bytes);
#endif
}
inline void arrived([[maybe_unused]] void* kept, [[maybe_unused]] const void** from,
                    [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(kept, from, bytes);
#endif
}

inline void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx.x = fiber.index;
  void* kept = nullptr;
  leave_to(&kept, fiber.stack.get(), kStackBytes);
  swapcontext(&scheduler, &fiber.context);
  arrived(kept, nullptr, nullptr);
}

inline void wait_for(Operation operation) {
  Fiber& fiber = *running;
  fiber.waits_for = operation;
  void* kept = nullptr;
  leave_to(operation == Operation::kDone ? nullptr : &kept, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&fiber.context, &scheduler);
  arrived(kept, nullptr, nullptr);
}

inline void begin() {
  arrived(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  call_kernel(kernel);
  wait_for(Operation::kDone);
}

inline void block_barrier() { wait_for(Operation::kBlockBarrier); }
inline void warp_barrier() { wait_for(Operation::kWarpBarrier); }
inline unsigned exchange(Operation operation, unsigned value, int distance) {
  Fiber& fiber = *running;
  fiber.value = value;
  fiber.distance = distance;
  wait_for(operation);
  return fiber.value;
}

// Runs a warp up to its next operation. False if it waits at a barrier of the block or is done.
inline bool step_warp(Fiber* lanes) {
  int order[kLanes];
  order_by_schedule(order, kLanes);
  for (int lane : order)
    if (lanes[lane].waits_for == Operation::kNone) resume(lanes[lane]);
  const Operation operation = lanes[0].waits_for;
  unsigned values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane].waits_for != operation) fail("lanes of a warp wait for different operations");
    values[lane] = lanes[lane].value;
  }
  if (operation == Operation::kBlockBarrier || operation == Operation::kDone) return false;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (operation != Operation::kWarpBarrier)
      lanes[lane].value = result_of(operation, values, lane, lanes[lane].distance);
    lanes[lane].waits_for = Operation::kNone;
  }
  return true;
}

// Not inlined, because the compiler takes getcontext for a function that may return twice.
[[gnu::noinline]] inline void prepare(Fiber& fiber, int thread) {
  fiber.waits_for = Operation::kNone;
  fiber.index = static_cast<unsigned>(thread);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &begin, 0);
}

inline void run_block(int threads) {
  const int warps = threads / kLanes;
  for (int thread = 0; thread < threads; ++thread) prepare(fibers[static_cast<size_t>(thread)], thread);
  for (bool done = false; !done;) {
    // A warp runs up to the barrier of the block before the next one starts, except when shuffled.
    int order[kMaxThreads / kLanes];
    order_by_schedule(order, warps);
    bool moving = true;
    while (moving) {
      moving = false;
      for (int i = 0; i < warps; ++i) {
        Fiber* lanes = &fibers[static_cast<size_t>(order[i] * kLanes)];
        while (lanes[0].waits_for == Operation::kNone && step_warp(lanes))
          if (schedule == Schedule::kShuffled && random_numbers() % 4 == 0) {
            moving = true;
            break;
          }
      }
    }
    const Operation operation = fibers[0].waits_for;
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = fibers[static_cast<size_t>(thread)];
      if (fiber.waits_for != operation) fail("threads of a block do not reach the same barrier");
      fiber.waits_for = Operation::kNone;
    }
    done = operation == Operation::kDone;
  }
}

// Runs all blocks, also in the schedule's order.
template <typename Kernel>
void run(int64_t blocks, int threads, Garbage& memory, Kernel body) {
  std::vector<int> order(static_cast<size_t>(blocks));
  order_by_schedule(order.data(), static_cast<int>(blocks));
  kernel = &body;
  call_kernel = [](void* body_) { (*static_cast<Kernel*>(body_))(); };
  for (int block : order) {
    blockIdx.x = static_cast<unsigned>(block);
    memory.refill();
    run_block(threads);
  }
}

}  // namespace stand_in
