// LSH hashing: bucket = argmax([xR; -xR]). With several factors of the number of buckets, each has its own R
// and argmax, and bucket = argmax_0 + factor_0 (argmax_1 + factor_1 (...)).
//
// A block of kTokens tokens is transposed to a panel [D][kTokens]. Rotation columns are multiplied with it
// kColumns at a time, and each token keeps only its running maximum and minimum, so no [L, n_buckets] array
// exists. A dot product is one chain of additions over d = 0, 1, ..., wherever the token lies in the block or
// the batch, so a token's bucket depends only on its own row.
#include "rotations.h"
#include "simd/elements.h"
#include "variants.h"

namespace REFORMER_ISA_NAMESPACE {
namespace {

// kVectors * kColumns accumulators, kVectors vectors of the panel and one broadcast value fill the 16 vector
// registers (32 with AVX-512).
constexpr int kVectors = 3;
constexpr int kColumns = kLanes == 16 ? 8 : 4;
constexpr int kTokens = kVectors * kLanes;

// The rotations of one (head, round, factor) are packed as groups of kColumns columns, [groups][D][kColumns],
// with zeros after the last column.
int64_t groups_of(int32_t factor) { return (factor / 2 + kColumns - 1) / kColumns; }

struct Plan {
  int64_t heads = 0, columns = 0;         // of the rotations that are read
  int64_t groups = 0;                     // groups of columns in one round
  int32_t buckets = 1;                    // without the one for padding
  int64_t group_size = 0, head_size = 0;  // in floats
  int64_t blocks = 0;                     // blocks of tokens in one (b, h)
};

Plan plan_of(const HashParams& p) {
  Plan plan;
  plan.heads = p.rotations ? p.rotation_heads : p.H;
  for (int32_t f = 0; f < p.n_factors; ++f) {
    plan.columns += p.factors[f] / 2;
    plan.groups += groups_of(p.factors[f]);
    plan.buckets *= p.factors[f];
  }
  plan.group_size = p.D * kColumns;
  plan.head_size = p.R * plan.groups * plan.group_size;
  plan.blocks = (p.L + kTokens - 1) / kTokens;
  return plan;
}

// Packs the rotations of one head and round. `drawn` is scratch for D rows of the plan's columns.
void pack_round(const HashParams& p, const Plan& plan, int64_t head, int64_t round, float* drawn,
                float* packed) {
  float* out = packed + head * plan.head_size + round * plan.groups * plan.group_size;
  const float* in = drawn;
  int64_t in_stride = plan.columns;
  if (p.rotations) {
    in = p.rotations + (head * p.D * p.R + round) * p.rotation_width;
    in_stride = p.R * p.rotation_width;
  } else {
    draw_rotations(p.seed, head, 0, p.D, round, 1, plan.columns, drawn);
  }
  for (int32_t f = 0; f < p.n_factors; ++f) {
    const int64_t half = p.factors[f] / 2;
    for (int64_t first = 0; first < half; first += kColumns, out += plan.group_size) {
      const int64_t columns = min_of<int64_t>(kColumns, half - first);
      for (int64_t d = 0; d < p.D; ++d)
        for (int64_t c = 0; c < kColumns; ++c)
          out[d * kColumns + c] = c < columns ? in[d * in_stride + first + c] : 0.0f;
    }
    in += half;
  }
}

// For each token of a block, the extreme projections on the columns of one factor so far.
struct Extremes {
  vfloat high[kVectors], low[kVectors];
  vint argmax[kVectors], argmin[kVectors];
};

// Projects a block on one group of columns and updates the extremes. The group's first column has number
// `first`, and only its first `columns` columns count. `not_finite` becomes NaN where a projection is not
// finite.
REFORMER_INLINE void add_group(const float* panel, const float* rotation, int64_t D, int32_t first,
                               int64_t columns, Extremes& best, vfloat* not_finite) {
  vfloat dot[kColumns][kVectors] = {};
  for (int64_t d = 0; d < D; ++d) {
    vfloat x[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) x[v] = load(panel + d * kTokens + v * kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      const vfloat r = splat(rotation[d * kColumns + c]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) dot[c][v] += x[v] * r;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    vfloat high = best.high[v], low = best.low[v], invalid = not_finite[v];
    vint argmax = best.argmax[v], argmin = best.argmin[v];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      if (c >= columns) break;
      const vfloat y = dot[c][v];
      const vint column = splat(first + c);
      // The comparisons are strict, so that the lowest column wins a tie.
      argmax = y > high ? column : argmax;
      high = y > high ? y : high;
      argmin = y < low ? column : argmin;
      low = y < low ? y : low;
      invalid += y * 0.0f;
    }
    best.high[v] = high, best.low[v] = low, not_finite[v] = invalid;
    best.argmax[v] = argmax, best.argmin[v] = argmin;
  }
}

// Transposes `rows` rows of x to panel[d][token], with zeros after the last row. `staging` is scratch for
// kLanes rows.
template <typename T>
REFORMER_INLINE void fill_panel(const T* x, int64_t row_stride, int64_t rows, int64_t D, float* staging,
                                float* panel) {
  const int64_t padded = round_up(D, kLanes);
  for (int64_t first = 0; first < kTokens; first += kLanes) {
    if constexpr (kIsFloat<T>) {
      if (first + kLanes <= rows) {
        transpose_lanes(x + first * row_stride, row_stride, D, panel + first, kTokens);
        continue;
      }
    }
    for (int64_t row = 0; row < kLanes; ++row) {
      const int64_t valid = first + row < rows ? D : 0;
      load_row(x + (valid ? (first + row) * row_stride : 0), valid, padded, staging + row * padded);
    }
    transpose_lanes(staging, padded, D, panel + first, kTokens);
  }
}

// Writes the buckets of `rows` tokens in every round. `packed` holds the rotations of their head, `out`
// points to the first token's bucket in round 0, and `padding` is null or non-zero for each token that is
// padding.
void hash_block(const HashParams& p, const Plan& plan, const float* panel, const float* packed, int64_t rows,
                const uint8_t* padding, int32_t* out) {
  for (int64_t round = 0; round < p.R; ++round) {
    vint id[kVectors] = {};
    vfloat not_finite[kVectors] = {};
    int32_t multiplier = 1;
    for (int32_t f = 0; f < p.n_factors; ++f) {
      const int32_t half = p.factors[f] / 2;
      Extremes best;
      for (int v = 0; v < kVectors; ++v) {
        best.high[v] = splat(-__builtin_inff()), best.low[v] = splat(__builtin_inff());
        best.argmax[v] = best.argmin[v] = vint{};
      }
      for (int32_t first = 0; first < half; first += kColumns, packed += plan.group_size)
        add_group(panel, packed, p.D, first, half - first, best, not_finite);
      for (int v = 0; v < kVectors; ++v)
        id[v] += multiplier * (best.high[v] >= -best.low[v] ? best.argmax[v] : half + best.argmin[v]);
      multiplier *= p.factors[f];
    }
    int32_t ids[kTokens];
    for (int v = 0; v < kVectors; ++v) {
      id[v] = not_finite[v] == 0.0f ? id[v] : vint{};
      memcpy(ids + v * kLanes, &id[v], sizeof(vint));
    }
    int32_t* round_out = out + round * p.L;
    for (int64_t row = 0; row < rows; ++row)
      round_out[row] = padding && padding[row] ? plan.buckets : ids[row];
  }
}

template <typename T>
void hash_all(const HashParams& p) {
  const Plan plan = plan_of(p);
  const int64_t blocks = p.B * p.H * plan.blocks;
  const auto threads = static_cast<int32_t>(min_of<int64_t>(p.threads, blocks));
  const int64_t rotations_size = round_up(plan.heads * plan.head_size, 16);
  const int64_t panel_size = round_up(p.D * kTokens, 16), staging_size = round_up(p.D, kLanes) * kLanes;
  const int64_t drawn_size = p.rotations ? 0 : round_up(p.D * plan.columns, 16);
  const int64_t thread_size = max_of(drawn_size, panel_size + staging_size);  // first one, then the other
  const int64_t total = rotations_size + threads * thread_size;
  auto* scratch = static_cast<float*>(allocate_scratch(sizeof(float) * static_cast<size_t>(total)));

#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int32_t thread = 0; thread < threads; ++thread) {
    const int64_t rounds = plan.heads * p.R;
    float* drawn = scratch + rotations_size + thread * thread_size;
    for (int64_t i = rounds * thread / threads; i < rounds * (thread + 1) / threads; ++i)
      pack_round(p, plan, i / p.R, i % p.R, drawn, scratch);
  }

#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int32_t thread = 0; thread < threads; ++thread) {
    float* panel = scratch + rotations_size + thread * thread_size;
    for (int64_t i = blocks * thread / threads; i < blocks * (thread + 1) / threads; ++i) {
      const int64_t b = i / plan.blocks / p.H, h = i / plan.blocks % p.H, first = i % plan.blocks * kTokens;
      const int64_t rows = min_of<int64_t>(kTokens, p.L - first);
      const T* x = row_of<const T>(p.x, b, h, first);
      fill_panel(x, p.x.row_stride, rows, p.D, panel + panel_size, panel);
      const float* packed = scratch + (plan.heads == 1 ? 0 : h) * plan.head_size;
      const uint8_t* padding = p.padding ? p.padding + b * p.L + first : nullptr;
      hash_block(p, plan, panel, packed, rows, padding, p.buckets + (b * p.H + h) * p.R * p.L + first);
    }
  }
  free_scratch(scratch);
}

}  // namespace

void lsh_hash(const HashParams& p) {
  if (p.B * p.H * p.L * p.R == 0) return;
  if (p.dtype == DType::kFloat32) hash_all<float>(p);
  if (p.dtype == DType::kBFloat16) hash_all<BFloat16>(p);
  if (p.dtype == DType::kFloat16) hash_all<Float16>(p);
}

}  // namespace REFORMER_ISA_NAMESPACE
