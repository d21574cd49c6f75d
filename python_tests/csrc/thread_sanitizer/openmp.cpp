// An OpenMP runtime of std::thread, for the thread sanitizer: the entries of GCC's that the kernels call.
//
// The sanitizer does not see how libgomp synchronises and reports races where there are none. Here it sees
// everything. Iterations are handed out by relaxed atomics, because a lock would order the tasks of a loop
// one after another in its eyes, and so hide races between them; only the barrier and the end of a region
// order anything, as in OpenMP's own rules.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr size_t kLoops = 1 << 14;  // loops that one region may run

struct Team {
  int size;
  std::vector<std::atomic<long>> handed_out;  // for each loop, in the order in which they run
  std::mutex mutex;
  std::condition_variable all_here;
  int waiting = 0;
  long passed = 0;
  explicit Team(int threads) : size(threads), handed_out(kLoops) {}

  void barrier() {
    std::unique_lock<std::mutex> lock(mutex);
    const long before = passed;
    if (++waiting == size) {
      waiting = 0;
      ++passed;
      all_here.notify_all();
    } else {
      all_here.wait(lock, [&] { return passed != before; });
    }
  }
};

struct Loop {
  size_t number = 0;  // 1 for the region's first
  long start = 0, end = 0, step = 0, chunk = 0;
};

thread_local Team* team = nullptr;
thread_local int thread_number = 0;
thread_local Loop loop;

// Runs `body` on each thread of a new team, at loop `first` of the region.
void run_region(void (*body)(void*), void* data, unsigned threads, const Loop& first) {
  Team members(static_cast<int>(threads));
  const auto run = [&](int number) {
    team = &members;
    thread_number = number;
    loop = first;
    body(data);
    team = nullptr;
    thread_number = 0;
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(run, static_cast<int>(i));
  run(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return thread_number; }
int omp_get_num_threads() { return team ? team->size : 1; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  run_region(body, data, threads, Loop());
}

// A region that is one loop, at which its body already is.
void GOMP_parallel_loop_nonmonotonic_dynamic(void (*body)(void*), void* data, unsigned threads, long start,
                                             long end, long step, long chunk, unsigned) {
  run_region(body, data, threads, {1, start, end, step, chunk});
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* begin, long* end) {
  const long first = loop.start + team->handed_out[loop.number].fetch_add(1, std::memory_order_relaxed) *
                                      loop.chunk * loop.step;
  if (first >= loop.end) return false;
  *begin = first;
  *end = std::min(loop.end, first + loop.chunk * loop.step);
  std::this_thread::yield();  // so that few cores still give each thread a share
  return true;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* begin,
                                          long* last) {
  loop = {loop.number + 1, start, end, step, chunk};
  if (loop.number >= kLoops || step <= 0) {
    std::fprintf(stderr, "a region with too many loops, or with one that counts down\n");
    std::abort();
  }
  return GOMP_loop_nonmonotonic_dynamic_next(begin, last);
}

void GOMP_loop_end() { team->barrier(); }
void GOMP_loop_end_nowait() {}

}  // extern "C"
