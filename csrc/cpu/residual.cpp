// One step of a residual stream in a single pass over memory: stream += sign * delta, then the stream's value
// in the next module's dtype, and its normalisation.
//
// A fixed-point stream holds int32 multiples of 1 / scale. Its step is round(delta * scale), ties to even,
// and the sum wraps around, so a step with the other sign undoes it exactly. Each block of elements stays in
// the cache while it is added, converted and normalised. The sums of a row are added in a fixed order, so
// results do not depend on the number of threads.
#include "simd/elements.h"
#include "variants.h"

namespace REFORMER_ISA_NAMESPACE {
namespace {

constexpr int64_t kBlock = 2048;              // elements per block where nothing is normalised
constexpr int64_t kSharedElements = 1 << 15;  // fewer elements are not worth a second thread

// Calls visit with `data`, cast to the type that `dtype` names and advanced by `offset` elements.
template <typename Visit>
REFORMER_INLINE void with_dtype(DType dtype, void* data, int64_t offset, Visit visit) {
  switch (dtype) {
    case DType::kFloat32:
      visit(static_cast<float*>(data) + offset);
      break;
    case DType::kBFloat16:
      visit(static_cast<BFloat16*>(data) + offset);
      break;
    case DType::kFloat16:
      visit(static_cast<Float16*>(data) + offset);
      break;
  }
}

REFORMER_INLINE vfloat magnitude_of(vfloat x) {
  vuint bits;
  memcpy(&bits, &x, sizeof(bits));
  bits &= 0x7fffffffu;
  memcpy(&x, &bits, sizeof(bits));
  return x;
}

// Rounds to the nearest integer, ties to even. Below 2^23 the addition does it; above, floats are integers.
REFORMER_INLINE vfloat round_even(vfloat x) {
  const vfloat magnitude = magnitude_of(x);
  const vfloat rounded = (magnitude + 0x1p23f) - 0x1p23f;
  const vfloat whole = select(magnitude < 0x1p23f, rounded, magnitude);
  return select(x < 0.0f, -whole, whole);
}

// Returns s + round(delta * factor) for kLanes elements. The sign bits of `invalid` collect where the sum
// wrapped around, or where the rounded delta does not fit in int32; it then counts as 0.
REFORMER_INLINE vint add_fixed(vint s, vfloat delta, float factor, vint& invalid) {
  const vfloat scaled = round_even(delta * factor);
  const vint representable = magnitude_of(scaled) < 0x1p31f;  // false for NaN
  const vint step = __builtin_convertvector(select(representable, scaled, vfloat{}), vint);
  const vint sum = (vint)((vuint)s + (vuint)step);
  invalid |= ((s ^ sum) & (step ^ sum)) | ~representable;
  return sum;
}

// Steps n elements of a fixed-point stream; `values` receives its values after the step in float32. `delta`
// may be null: the stream then stays as it is.
REFORMER_INLINE void step_fixed(int32_t* stream, const float* delta, int64_t n, float factor,
                                float inverse_scale, float* values, vint& invalid) {
  int64_t i = 0;
  for (; i < n; i += kLanes) {
    // The last vector of a block may be partial; its other lanes are zeros.
    const int64_t lanes = min_of<int64_t>(kLanes, n - i);
    vint s{};
    vfloat d{};
    if (lanes == kLanes) {
      s = load(stream + i);
      if (delta) d = load(delta + i);
    } else {
      memcpy(&s, stream + i, static_cast<size_t>(lanes) * 4);
      if (delta) memcpy(&d, delta + i, static_cast<size_t>(lanes) * 4);
    }
    if (delta) {
      s = add_fixed(s, d, factor, invalid);
      memcpy(stream + i, &s, static_cast<size_t>(lanes) * 4);
    }
    const vfloat value = __builtin_convertvector(s, vfloat) * inverse_scale;
    memcpy(values + i, &value, static_cast<size_t>(lanes) * 4);
  }
}

// The same for a floating-point stream.
template <typename T>
REFORMER_INLINE void step_float(T* stream, const float* delta, int64_t n, float sign, float* values) {
  load_row(stream, n, n, values);
  if (!delta) return;
  for (int64_t i = 0; i < n; ++i) values[i] += sign * delta[i];
  store_row(values, n, 1.0f, stream);
  load_row(stream, n, n, values);  // as they were rounded
}

// Rounds values to T and back.
template <typename T>
REFORMER_INLINE void round_through(float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    T rounded;
    from_float(values[i], &rounded);
    values[i] = to_float(rounded);
  }
}

// The sum of x - centre or, if `squares`, of (x - centre)^2.
REFORMER_INLINE float sum_of(const float* x, int64_t n, float centre, bool squares) {
  vfloat total{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vfloat v = load(x + i) - centre;
    total += squares ? v * v : v;
  }
  float sum = sum_of_lanes(total);
  for (; i < n; ++i) sum += squares ? (x[i] - centre) * (x[i] - centre) : x[i] - centre;
  return sum;
}

// values = weight * (values - mean) * rstd + bias for one row.
REFORMER_INLINE void normalise(const ResidualParams& p, int64_t row, float* values) {
  const int64_t n = p.columns;
  const float count = static_cast<float>(n);
  const bool centred = p.normalization == Normalization::kLayer;
  const float mean = centred ? sum_of(values, n, 0.0f, false) / count : 0.0f;
  const float rstd = 1.0f / __builtin_sqrtf(sum_of(values, n, mean, true) / count + p.epsilon);
  if (p.mean) p.mean[row] = mean;
  if (p.rstd) p.rstd[row] = rstd;
  for (int64_t i = 0; i < n; ++i) {
    const float normal = (values[i] - mean) * rstd;
    const float scaled = p.norm_weight ? normal * p.norm_weight[i] : normal;
    values[i] = p.norm_bias ? scaled + p.norm_bias[i] : scaled;
  }
}

}  // namespace

void residual_step(const ResidualParams& p) {
  const int64_t elements = p.rows * p.columns;
  if (elements == 0) return;
  const bool whole_rows = p.normalization != Normalization::kNone;
  const int64_t length = whole_rows ? p.columns : kBlock;
  const int64_t blocks = (elements + length - 1) / length;
  const int32_t threads = elements < kSharedElements ? 1 : p.threads;
  const int64_t buffer_size = round_up(length, 16);
  float* scratch =
      static_cast<float*>(allocate_scratch(static_cast<size_t>(2 * buffer_size * threads) * sizeof(float)));
  const float factor = p.scale * static_cast<float>(p.sign);
  int32_t any_invalid = 0;
#pragma omp parallel for schedule(static, 1) num_threads(threads) reduction(| : any_invalid)
  for (int32_t thread = 0; thread < threads; ++thread) {
    float* values = scratch + 2 * buffer_size * thread;
    float* delta_buffer = values + buffer_size;
    vint invalid{};
    for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; ++block) {
      const int64_t offset = block * length, n = min_of(length, elements - offset);
      const float* delta = nullptr;
      if (p.delta) {
        delta = delta_buffer;
        with_dtype(p.delta_dtype, const_cast<void*>(p.delta), offset,
                   [&](const auto* source) { load_row(source, n, n, delta_buffer); });
      }
      if (p.fixed_point) {
        step_fixed(static_cast<int32_t*>(p.stream) + offset, delta, n, factor, 1.0f / p.scale, values,
                   invalid);
      } else {
        with_dtype(p.dtype, p.stream, offset,
                   [&](auto* stream) { step_float(stream, delta, n, static_cast<float>(p.sign), values); });
      }
      if (p.value)
        with_dtype(p.dtype, p.value, offset, [&](auto* value) { store_row(values, n, 1.0f, value); });
      if (whole_rows) {
        // The module would read the value in its own dtype, so that is what is normalised.
        if (p.fixed_point && p.dtype == DType::kBFloat16) round_through<BFloat16>(values, n);
        if (p.fixed_point && p.dtype == DType::kFloat16) round_through<Float16>(values, n);
        normalise(p, block, values);
        with_dtype(p.dtype, p.normed, offset, [&](auto* normed) { store_row(values, n, 1.0f, normed); });
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) any_invalid |= invalid[lane] < 0;
  }
  free_scratch(scratch);
  if (any_invalid && p.flag) *p.flag = 1;
}

}  // namespace REFORMER_ISA_NAMESPACE
