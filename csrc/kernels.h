// The whole C++ API of reformer-kernels: parameter structs and functions over raw pointers.
//
// No torch header, no Python, no tensor is allocated here: the caller passes pointers, sizes, strides
// (in elements) and a workspace. Shapes use B batch, H heads, L length, D head dimension, Dv value
// dimension, R hash rounds, Lk the keys' length. Arrays whose strides are not listed are contiguous.
#pragma once

#include <cstddef>
#include <cstdint>

namespace reformer {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Results of a call that checks its input as it runs; bindings.cpp turns them into exceptions.
enum class Status : int32_t {
  kOk = 0,
  kBadOrder = 1,      // an order is not a permutation of its positions
  kBadStarts = 2,     // bucket starts do not rise from 0 to L
  kUnsorted = 3,      // positions do not rise within a bucket, where the kernels rely on it
  kTooManyCodes = 4,  // too many buckets and too wide a window to count duplicates in 32 bits
};

// A (B, H, L, D) array with a contiguous last dimension.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

// x (B, H, L, D) and rotations (rotation_heads, D, R, rotation_width), rotation_heads 1 or H, to bucket ids
// (B, H, R, L). `factors` has one even number a factor; their halves are consecutive columns of a round's
// rotation_width columns, of which the rest are not read.
struct HashParams {
  int64_t B = 0, H = 0, L = 0, D = 0, R = 0;
  DType dtype = DType::kFloat32;
  Rows x;
  const float* rotations = nullptr;
  int64_t rotation_heads = 0, rotation_width = 0;
  const int32_t* factors = nullptr;
  int32_t n_factors = 0;
  const uint8_t* padding = nullptr;  // (B, L), non-zero: the extra last bucket; may be null
  int32_t* buckets = nullptr;
  int32_t threads = 1;
};
void lsh_hash(const HashParams& params);

// buckets (segments, L) to order (segments, L), stable by (bucket, position), and starts
// (segments, starts_size), starts_size >= n_buckets + 1; entries after n_buckets hold L.
// Ids below 0 or above n_buckets - 1 count as the nearest bucket. L and n_buckets are below 2^31 - 1.
struct SortParams {
  int64_t segments = 0, L = 0, n_buckets = 0, starts_size = 0;
  const int32_t* buckets = nullptr;
  int32_t* order = nullptr;
  int32_t* starts = nullptr;
  int32_t threads = 1;  // on the CPU
  // On a GPU:
  int32_t device = 0;
  void* stream = nullptr;     // a cudaStream_t
  void* workspace = nullptr;  // bucket_sort_workspace_bytes() long, 256-byte aligned
};
void bucket_sort(const SortParams& params);

// Kernels of NVIDIA GPUs, defined where the build has CUDA. Pointers are to memory of `device`; a call
// enqueues its work in `stream` and does not wait for it. It returns null, or what CUDA said went wrong.
namespace cuda {
size_t bucket_sort_workspace_bytes(const SortParams& params);
const char* bucket_sort(const SortParams& params);
}  // namespace cuda

enum class KeyNorm : int32_t { kNone = 0, kRms = 1, kL2 = 2 };

// Which keys a query sees: see reformer_kernels.config.AttentionRule, whose fields these are.
struct AttentionRule {
  bool rank_window = false;
  int64_t chunk_length = 0, chunks_before = 0, chunks_after = 0;
  int64_t window_before = 0, window_after = 0;
  bool bucket_mask = false, causal = false, exclude_self = false, correct_duplicates = false, ring = false;
  KeyNorm key_norm = KeyNorm::kNone;
};

// out_i = sum_j p_ij v_j, p = softmax over all rounds' visible keys of scale * q_i . k_j, with k the keys as
// given or, where k.data is null, q normalised by rule.key_norm.
//
// Where key_order is given, keys are sorted apart from the queries, and a query's window lies around its
// cursor: the number of sorted keys not after (its bucket, its position i if causal, else i * Lk / L). Such a
// rule has rank_window, no ring and no exclude_self. Elsewhere Lk = L, and padding keys are queries too.
struct AttentionParams {
  int64_t B = 0, H = 0, L = 0, Lk = 0, D = 0, Dv = 0, R = 0;
  DType dtype = DType::kFloat32;
  Rows q, k, v;
  const int32_t* order = nullptr;       // (B, H, R, L)
  const int32_t* starts = nullptr;      // (B, H, R, starts_size)
  const int32_t* key_order = nullptr;   // (B, H, R, Lk), may be null
  const int32_t* key_starts = nullptr;  // (B, H, R, starts_size), null where key_order is
  int64_t starts_size = 0;
  const float* key_bias = nullptr;  // (B, Lk), -inf: padding; may be null
  AttentionRule rule;
  float scale = 1.0f;
  // Keep a probability where its Philox word >= dropout_threshold (0: keep all), then multiply by keep_scale.
  uint32_t dropout_threshold = 0;
  float keep_scale = 1.0f;
  uint64_t seed = 0;
  Rows out;                   // written by forward, read by backward
  float* lse = nullptr;       // (B, H, L), likewise
  void* workspace = nullptr;  // attention_workspace_bytes() long, 64-byte aligned
  int32_t threads = 1;
};
struct AttentionGradients {
  Rows grad_out;
  const float* grad_lse = nullptr;  // (B, H, L); may be null
  Rows grad_q, grad_k, grad_v;      // grad_k.data is null where k.data is
};
size_t attention_forward_workspace_bytes(const AttentionParams& params);
Status attention_forward(const AttentionParams& params);
size_t attention_backward_workspace_bytes(const AttentionParams& params);
Status attention_backward(const AttentionParams& params, const AttentionGradients& gradients);

enum class Normalization : int32_t { kNone = 0, kLayer = 1, kRms = 2 };

// One step of a residual stream: stream += sign * delta in place; then, in the same pass, value = the stream
// in `dtype` and normed = weight * (value - mean) * rstd + bias by rows (kRms: mean 0). A floating-point
// stream has dtype `dtype`; a fixed-point one is int32 multiples of 1 / scale, takes round(delta * scale),
// and wraps around.
struct ResidualParams {
  int64_t rows = 0, columns = 0;
  bool fixed_point = false;
  float scale = 1.0f;  // fixed point only: a power of two
  int32_t sign = 1;    // 1 or -1
  DType dtype = DType::kFloat32, delta_dtype = DType::kFloat32;
  void* stream = nullptr;
  const void* delta = nullptr;  // null: the stream stays as it is
  void* value = nullptr;        // may be null
  Normalization normalization = Normalization::kNone;
  float epsilon = 0.0f;
  const float* norm_weight = nullptr;  // (columns,); may be null, as may the bias
  const float* norm_bias = nullptr;
  void* normed = nullptr;
  float* mean = nullptr;  // (rows,), as rstd; may be null
  float* rstd = nullptr;
  int32_t* flag = nullptr;  // becomes 1 if a fixed-point sum wraps around or a delta has no int32
  int32_t threads = 1;
};
void residual_step(const ResidualParams& params);

// The instruction set in use: "avx512bf16", "avx512", "avx2" or "portable"; select_isa("") goes back to the
// best.
// Returns false where the machine lacks it.
const char* active_isa();
bool select_isa(const char* name);

}  // namespace reformer
