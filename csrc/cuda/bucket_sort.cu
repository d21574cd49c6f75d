// Stable counting sort of bucket ids on a GPU: order = argsort(buckets), for many segments at once.
//
// One pass sorts by a digit of up to 4097 values, which is the whole id in all but the longest sequences:
//   1. count_tiles    each segment is cut into tiles; a block counts the digits of one tile
//   2. place_tiles    a running sum over (digit, tile) turns counts into places in the order, and gives the
//                     bucket starts
//   3. scatter_tiles  a block ranks the elements of its tile stably and writes them
// More buckets take two or more passes, least significant digit first. A pass then hands the next one a word
// per element: the position in the low bits and the remaining digits above it. A word has 32 bits if they
// fit, else 64. The bucket starts are found by bisection at the end (bucket_starts).
//
// To rank elements, a warp owns consecutive elements of the tile and takes them 32 at a time. Lanes with the
// same digit find each other (match), and each lane counts those below it (popcount). The lowest lane adds
// their number to the warp's counter of the digit. A scan of the counters over the warps does the rest. Ranks
// use no atomics, so the order is stable by construction.
//
// Predicted memory traffic, not measured, as this has not yet run on a GPU: with 32-bit words, each pass
// moves 12 bytes per element (8 read, 4 written) and 20 * radix / tile_length for the counts, which are
// written by count_tiles, read twice and written by place_tiles, and read by scatter_tiles. Tiles have at
// least 3 * radix elements, and 12 * radix where that leaves enough blocks. This makes 13 to 14 bytes per
// pass in large problems, and up to 19 in small ones, whose counts stay in the L2 cache. With several passes
// the bisection adds about 10 reads per bucket.
#include "../kernels.h"
#include "primitives.h"

namespace reformer::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kItems = 16;  // elements that each thread holds in registers
constexpr int kWarpStep = kItems * kLanes;
constexpr int kStep = kWarps * kWarpStep;  // elements ranked at once; a warp's count fits in 16 bits
constexpr int kPlaceThreads = 512;
constexpr int kBatch = 8;  // loads that a thread of place_tiles has in flight

// One digit can hold 2^12 buckets and the extra one for padding.
constexpr int kDigitBits = 12;
constexpr int64_t kMaxRadix = (int64_t{1} << kDigitBits) + 1;
constexpr int64_t kMaxTiles = 256;          // per segment, since place_tiles goes through them one by one
constexpr int64_t kEnoughBlocks = 1024;     // enough to fill a GPU
constexpr int64_t kMaxBlocks = 2147483647;  // the most that one launch may have

// The sizes of one pass.
struct Pass {
  int64_t L, tiles;
  uint32_t tile_length;
  int32_t radix;
  uint32_t mask;  // the digit is key & mask
};

// What a pass reads. The first pass reads bucket ids: the key of an element is its id, clamped to the
// buckets.
struct Ids {
  using Value = int32_t;
  const int32_t* data;
  int32_t last;
  __device__ __forceinline__ uint32_t key(Value id) const {
    return static_cast<uint32_t>(id < 0 ? 0 : id > last ? last : id);
  }
  __device__ __forceinline__ uint32_t position(Value, uint32_t i) const { return i; }
};
// Later passes read words: (key << position_bits) | position.
template <typename Word>
struct Words {
  using Value = Word;
  const Word* data;
  int32_t position_bits;
  __device__ __forceinline__ uint32_t key(Value word) const {
    return static_cast<uint32_t>(word >> position_bits);
  }
  __device__ __forceinline__ uint32_t position(Value word, uint32_t) const {
    return static_cast<uint32_t>(word & ((Word{1} << position_bits) - 1));
  }
};

// What a pass writes. The last pass writes positions.
struct ToOrder {
  int32_t* data;
  __device__ __forceinline__ void store(int64_t at, uint32_t, uint32_t position) const {
    data[at] = static_cast<int32_t>(position);
  }
};
// Earlier passes write words without the digit that they sorted by.
template <typename Word>
struct ToWords {
  Word* data;
  int32_t digit_bits, position_bits;
  __device__ __forceinline__ void store(int64_t at, uint32_t key, uint32_t position) const {
    data[at] = static_cast<Word>(key >> digit_bits) << position_bits | position;
  }
};

// The index in its segment of this thread's element number `item`. The elements of a warp are consecutive,
// and so are the warps.
__device__ __forceinline__ uint32_t element_of(uint32_t step, int item) {
  const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  return step + warp * kWarpStep + static_cast<uint32_t>(item) * kLanes + lane;
}

// Loads this thread's elements of a step; those beyond `end` are 0.
template <typename Source>
__device__ __forceinline__ void load_step(typename Source::Value (&values)[kItems], const Source& source,
                                          int64_t segment_start, uint32_t step, uint32_t end) {
#pragma unroll
  for (int item = 0; item < kItems; ++item) {
    const uint32_t i = element_of(step, item);
    values[item] = i < end ? source.data[segment_start + i] : 0;
  }
}

// A tile: the first element of its segment, and where in the segment the tile begins and ends.
struct Tile {
  int64_t segment_start;
  uint32_t first, end;
};
__device__ __forceinline__ Tile tile_of_block(const Pass& pass) {
  const int64_t segment = blockIdx.x / pass.tiles, tile = blockIdx.x % pass.tiles;
  const int64_t first = tile * pass.tile_length, end = first + pass.tile_length;
  return {segment * pass.L, static_cast<uint32_t>(first), static_cast<uint32_t>(end < pass.L ? end : pass.L)};
}

// Counts the digits of each tile: counts (segments, tiles, radix). A block counts one tile.
template <typename Source>
__global__ void __launch_bounds__(kThreads) count_tiles(Source source, Pass pass, int32_t* counts) {
  auto* counters = shared_memory<int32_t>();  // (radix,)
  const Tile tile = tile_of_block(pass);
  for (int32_t digit = threadIdx.x; digit < pass.radix; digit += kThreads) counters[digit] = 0;
  __syncthreads();
  for (uint32_t step = tile.first; step < tile.end; step += kStep) {
    typename Source::Value values[kItems];
    load_step(values, source, tile.segment_start, step, tile.end);
#pragma unroll
    for (int item = 0; item < kItems; ++item)
      if (element_of(step, item) < tile.end) atomicAdd(&counters[source.key(values[item]) & pass.mask], 1);
  }
  __syncthreads();
  counts += int64_t{blockIdx.x} * pass.radix;
  for (int32_t digit = threadIdx.x; digit < pass.radix; digit += kThreads) counts[digit] = counters[digit];
}

// Returns the sum of `mine` over the threads before this one; `all` becomes the sum over all threads. `sums`
// is shared memory, one entry per warp.
__device__ __forceinline__ int32_t sum_before(int32_t mine, int32_t* sums, int32_t& all) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  int32_t through = mine;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const int32_t lower = __shfl_up_sync(kAllLanes, through, distance);
    if (lane >= distance) through += lower;
  }
  if (lane == kLanes - 1) sums[warp] = through;
  __syncthreads();
  int32_t before = through - mine;
  all = 0;
#pragma unroll
  for (int other = 0; other < kPlaceThreads / kLanes; ++other) {
    before += other < warp ? sums[other] : 0;
    all += sums[other];
  }
  __syncthreads();
  return before;
}

// Turns the counts into places: where in its segment the first element of (tile, digit) goes. A block does
// one segment. Unless `starts` is null, it receives the start of each digit, and L in its remaining entries.
__global__ void __launch_bounds__(kPlaceThreads)
    place_tiles(Pass pass, int32_t* counts, int32_t* starts, int64_t starts_size) {
  auto* sums = shared_memory<int32_t>();
  counts += int64_t{blockIdx.x} * pass.tiles * pass.radix;
  if (starts) starts += int64_t{blockIdx.x} * starts_size;
  int32_t done = 0;  // elements whose digits were handled in earlier rounds
  for (int32_t first = 0; first < pass.radix; first += kPlaceThreads) {
    const int32_t digit = first + static_cast<int32_t>(threadIdx.x);
    const int64_t tiles = digit < pass.radix ? pass.tiles : 0;
    int32_t mine = 0;
#pragma unroll kBatch
    for (int64_t tile = 0; tile < tiles; ++tile) mine += counts[tile * pass.radix + digit];
    int32_t all;
    int32_t place = done + sum_before(mine, sums, all);
    done += all;
    if (starts && digit < pass.radix) starts[digit] = place;
    for (int64_t batch = 0; batch < tiles; batch += kBatch) {
      int32_t here[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        here[i] = batch + i < tiles ? counts[(batch + i) * pass.radix + digit] : 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (batch + i < tiles) counts[(batch + i) * pass.radix + digit] = place;
        place += here[i];
      }
    }
  }
  if (starts)
    for (int64_t bucket = pass.radix + int64_t{threadIdx.x}; bucket < starts_size; bucket += kPlaceThreads)
      starts[bucket] = static_cast<int32_t>(pass.L);
}

// Writes each element of each tile to its place. A block does one tile.
template <typename Source, typename Target>
__global__ void __launch_bounds__(kThreads)
    scatter_tiles(Source source, Target target, Pass pass, const int32_t* places) {
  // Where the next element of a digit goes. While a step is being written, it is already where the first
  // element of the next step goes.
  auto* next = shared_memory<int32_t>();  // (radix,)
  // First, how many elements of a digit a warp has met in this step; then, how many this warp and the later
  // ones have together.
  auto* counters = reinterpret_cast<uint16_t*>(next + pass.radix);  // (kWarps, radix)
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const unsigned lanes_below = (1u << lane) - 1;
  uint16_t* own = counters + warp * pass.radix;
  const Tile tile = tile_of_block(pass);
  places += int64_t{blockIdx.x} * pass.radix;
  for (int32_t digit = threadIdx.x; digit < pass.radix; digit += kThreads) next[digit] = places[digit];

  for (uint32_t step = tile.first; step < tile.end; step += kStep) {
    typename Source::Value values[kItems];
    int32_t ranks[kItems];
    load_step(values, source, tile.segment_start, step, tile.end);
    for (int32_t i = threadIdx.x; i < kWarps * pass.radix; i += kThreads) counters[i] = 0;
    __syncthreads();

    // Elements beyond the tile's end count as zeros. They come after all others, so they move none of them.
#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const uint32_t digit = source.key(values[item]) & pass.mask;
      const unsigned peers = __match_any_sync(kAllLanes, digit);
      const int32_t met = own[digit];
      ranks[item] = met + __popc(peers & lanes_below);
      __syncwarp();
      if ((peers & lanes_below) == 0) own[digit] = static_cast<uint16_t>(met + __popc(peers));
      __syncwarp();
    }
    __syncthreads();

    for (int32_t digit = threadIdx.x; digit < pass.radix; digit += kThreads) {
      int32_t from_here = 0;
#pragma unroll
      for (int other = kWarps - 1; other >= 0; --other) {
        from_here += counters[other * pass.radix + digit];
        counters[other * pass.radix + digit] = static_cast<uint16_t>(from_here);
      }
      next[digit] += from_here;
    }
    __syncthreads();

#pragma unroll
    for (int item = 0; item < kItems; ++item) {
      const uint32_t i = element_of(step, item);
      if (i >= tile.end) continue;
      const uint32_t key = source.key(values[item]), digit = key & pass.mask;
      const int32_t place = next[digit] - own[digit] + ranks[item];
      target.store(tile.segment_start + place, key, source.position(values[item], i));
    }
    __syncthreads();
  }
}

// Finds the bucket starts after the last of several passes: starts[x] is the number of ids below x. The digit
// of bucket x in that pass, x >> digit_shift, says between which places to search. A block finds kThreads
// starts of one segment.
__global__ void __launch_bounds__(kThreads)
    bucket_starts(Ids ids, const int32_t* order, Pass pass, const int32_t* places, int32_t digit_shift,
                  int32_t* starts, int64_t starts_size) {
  const int64_t blocks = (starts_size + kThreads - 1) / kThreads;
  const int64_t segment = blockIdx.x / blocks;
  const int64_t bucket = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (bucket >= starts_size) return;
  int64_t low = pass.L;
  if (bucket <= ids.last) {
    places += segment * pass.tiles * pass.radix;
    const int64_t digit = bucket >> digit_shift;
    int64_t high = digit + 1 < pass.radix ? places[digit + 1] : pass.L;
    low = places[digit];
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      const bool below = ids.key(ids.data[segment * pass.L + order[segment * pass.L + middle]]) < bucket;
      low = below ? middle + 1 : low;
      high = below ? high : middle;
    }
  }
  starts[segment * starts_size + bucket] = static_cast<int32_t>(low);
}

// The number of bits that `value` takes.
int bit_length(int64_t value) {
  int bits = 0;
  for (; value > 0; value >>= 1) ++bits;
  return bits;
}

int64_t ceil_divide(int64_t value, int64_t by) { return (value + by - 1) / by; }

// How a problem is divided into passes, tiles and groups of segments, and how much workspace it takes.
struct Plan {
  int passes, digit_bits, position_bits;
  bool wide;  // words have 64 bits
  int32_t max_radix;
  int64_t tile_length, tiles;
  int64_t group;  // segments that are sorted together
  int64_t counts_bytes, words_bytes;

  explicit Plan(const SortParams& p) {
    const int bits = bit_length(p.n_buckets - 1);
    passes = p.n_buckets <= kMaxRadix ? 1 : static_cast<int>(ceil_divide(bits, kDigitBits));
    digit_bits = bits / passes;
    if (bits - (passes - 1) * digit_bits > kDigitBits) ++digit_bits;
    position_bits = bit_length(p.L - 1);
    wide = passes > 2 || bits - digit_bits + position_bits > 32;
    max_radix = 1;
    for (int pass = 0; pass < passes; ++pass)
      if (radix(pass, p.n_buckets) > max_radix) max_radix = radix(pass, p.n_buckets);

    tile_length = kStep;
    while (tile_length < 3 * int64_t{max_radix}) tile_length *= 2;
    const auto blocks = [&] { return p.segments * ceil_divide(p.L, tile_length); };
    while (tile_length < 12 * int64_t{max_radix} && blocks() >= 2 * kEnoughBlocks) tile_length *= 2;
    while (ceil_divide(p.L, tile_length) > kMaxTiles) tile_length *= 2;
    tiles = p.L > 0 ? ceil_divide(p.L, tile_length) : 1;

    const int64_t starts_blocks = ceil_divide(p.starts_size, kThreads);
    group = kMaxBlocks / (tiles > starts_blocks ? tiles : starts_blocks);
    if (group > p.segments) group = p.segments;
    if (group < 1) group = 1;
    counts_bytes = aligned(group * tiles * max_radix * int64_t{sizeof(int32_t)});
    words_bytes = passes == 1 ? 0 : aligned(group * p.L * (wide ? 8 : 4));
  }

  // The number of values of a pass's digit.
  int32_t radix(int pass, int64_t n_buckets) const {
    if (passes == 1) return static_cast<int32_t>(n_buckets);
    if (pass < passes - 1) return int32_t{1} << digit_bits;
    return static_cast<int32_t>(((n_buckets - 1) >> (digit_bits * pass)) + 1);
  }

  int64_t bytes() const { return counts_bytes + words_bytes * (passes > 2 ? 2 : 1); }

  static int64_t aligned(int64_t bytes) { return ceil_divide(bytes, 256) * 256; }
};

// The sort of one group of segments.
struct Sort {
  const SortParams& p;
  const Plan& plan;
  const int32_t* buckets;
  int32_t* order;
  int32_t* starts;
  int64_t segments;
  int32_t* counts;

  template <typename Source, typename Target>
  cudaError_t run_pass(int number, const Source& source, const Target& target) const {
    const bool last = number == plan.passes - 1;
    Pass pass{};
    pass.L = p.L;
    pass.tiles = plan.tiles;
    pass.tile_length = static_cast<uint32_t>(plan.tile_length);
    pass.radix = plan.radix(number, p.n_buckets);
    pass.mask = last ? ~uint32_t{0} : (uint32_t{1} << plan.digit_bits) - 1;
    const int64_t blocks = segments * plan.tiles;
    const int64_t radix = pass.radix;
    const int64_t counters_bytes = radix * int64_t{sizeof(int32_t)};
    cudaError_t error =
        launch(&count_tiles<Source>, blocks, kThreads, counters_bytes, p.stream, source, pass, counts);
    if (error != cudaSuccess) return error;
    error = launch(&place_tiles, segments, kPlaceThreads, kPlaceThreads / kLanes * sizeof(int32_t), p.stream,
                   pass, counts, plan.passes == 1 ? starts : nullptr, p.starts_size);
    if (error != cudaSuccess) return error;
    error = launch(&scatter_tiles<Source, Target>, blocks, kThreads,
                   counters_bytes + kWarps * radix * int64_t{sizeof(uint16_t)}, p.stream, source, target,
                   pass, counts);
    if (error != cudaSuccess || !last || plan.passes == 1) return error;
    return launch(&bucket_starts, segments * ceil_divide(p.starts_size, kThreads), kThreads, 0, p.stream,
                  ids(), order, pass, counts, plan.digit_bits * number, starts, p.starts_size);
  }

  // Two or more passes. Words alternate between the two halves of their workspace.
  template <typename Word>
  cudaError_t run_passes() const {
    char* memory = reinterpret_cast<char*>(counts) + plan.counts_bytes;
    const auto words = [&](int pass) {
      return reinterpret_cast<Word*>(memory + (pass % 2 ? plan.words_bytes : 0));
    };
    const auto from = [&](int pass) { return Words<Word>{words(pass - 1), plan.position_bits}; };
    const auto to = [&](int pass) { return ToWords<Word>{words(pass), plan.digit_bits, plan.position_bits}; };
    cudaError_t error = run_pass(0, ids(), to(0));
    if constexpr (sizeof(Word) == 8)
      for (int pass = 1; pass < plan.passes - 1 && error == cudaSuccess; ++pass)
        error = run_pass(pass, from(pass), to(pass));
    if (error != cudaSuccess) return error;
    return run_pass(plan.passes - 1, from(plan.passes - 1), ToOrder{order});
  }

  cudaError_t run() const {
    if (plan.passes == 1) return run_pass(0, ids(), ToOrder{order});
    return plan.wide ? run_passes<uint64_t>() : run_passes<uint32_t>();
  }

  Ids ids() const { return {buckets, static_cast<int32_t>(p.n_buckets - 1)}; }
};

}  // namespace

size_t bucket_sort_workspace_bytes(const SortParams& params) {
  return params.segments == 0 ? 0 : static_cast<size_t>(Plan(params).bytes());
}

const char* bucket_sort(const SortParams& p) {
  if (p.segments == 0) return nullptr;
  const DeviceGuard guard(p.device);
  cudaError_t error = guard.error();
  const Plan plan(p);
  for (int64_t first = 0; first < p.segments && error == cudaSuccess; first += plan.group) {
    const int64_t left = p.segments - first;
    error = Sort{p,
                 plan,
                 p.buckets + first * p.L,
                 p.order + first * p.L,
                 p.starts + first * p.starts_size,
                 left < plan.group ? left : plan.group,
                 static_cast<int32_t*>(p.workspace)}
                .run();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace reformer::cuda
