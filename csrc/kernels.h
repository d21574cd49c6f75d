// The whole C++ API of reformer-kernels: parameter structs and functions over raw pointers.
//
// The library knows neither torch nor Python and allocates no tensors: the caller passes pointers, sizes,
// strides (in elements) and a workspace. In shapes, B is batch, H heads, L length, Lk the keys' length, D the
// head dimension, Dv the values' dimension and R hash rounds. An array without strides is contiguous.
#pragma once

#include <cstddef>
#include <cstdint>

namespace reformer {

constexpr int kMaxHeadDim = 256;  // the largest D and Dv, as MAX_HEAD_DIM in reformer_kernels/_limits.py

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The result of a call that checks its input as it runs. bindings.cpp turns errors into exceptions.
enum class Status : int32_t {
  kOk = 0,
  kBadOrder = 1,      // an order is not a permutation of its positions
  kBadStarts = 2,     // bucket starts do not rise from 0 to L
  kUnsorted = 3,      // positions do not rise within a bucket, which the kernel needs here
  kTooManyCodes = 4,  // so many buckets with so wide a window that duplicates cannot be counted in 32 bits
  kEmpty = 5,  // no token, key, round or bucket, or a chunk length below 1, where the kernel divides by it
  kFull = 6,   // a row of a cache has no room for another token
};

// A (B, H, L, D) array with a contiguous last dimension.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};

// Random rotations, out (heads, D, R, width): numbers of mean 0, variance 1 and nearly normal distribution.
// Each depends on the seed and on its place (head, dimension, round, column) alone, so that it is the same
// however many are drawn.
struct RotationParams {
  int64_t heads = 0, D = 0, R = 0, width = 0;
  uint64_t seed = 0;
  float* out = nullptr;
  int32_t threads = 1;
};
void sample_rotations(const RotationParams& params);

// buckets (B, H, R, L) = argmax([xR; -xR]) for x (B, H, L, D) and rotations of shape
// (rotation_heads, D, R, rotation_width), where rotation_heads is 1 or H. `factors` are the even factors of
// the number of buckets. Each takes the next factor / 2 of a round's rotation_width columns; columns that are
// left over are not read. Where `rotations` is null, those that sample_rotations draws from `seed` for H
// heads are meant.
struct HashParams {
  int64_t B = 0, H = 0, L = 0, D = 0, R = 0;
  DType dtype = DType::kFloat32;
  Rows x;
  const float* rotations = nullptr;
  int64_t rotation_heads = 0, rotation_width = 0;  // not read where rotations are drawn
  uint64_t seed = 0;
  const int32_t* factors = nullptr;
  int32_t n_factors = 0;
  const uint8_t* padding = nullptr;  // (B, L), non-zero: the extra last bucket; may be null
  int32_t* buckets = nullptr;
  int32_t threads = 1;
};
void lsh_hash(const HashParams& params);

// Sorts the positions of each segment by (bucket, position): buckets (segments, L) to order (segments, L) and
// starts (segments, starts_size). starts[b] is where bucket b begins in the order; starts_size is at least
// n_buckets + 1, and entries from n_buckets on hold L. Ids below 0 or above n_buckets - 1 count as the
// nearest bucket. L and n_buckets are below 2^31 - 1.
struct SortParams {
  int64_t segments = 0, L = 0, n_buckets = 0, starts_size = 0;
  const int32_t* buckets = nullptr;
  int32_t* order = nullptr;
  int32_t* starts = nullptr;
  int32_t threads = 1;  // only for the CPU
  // Only for a GPU:
  int32_t device = 0;
  void* stream = nullptr;     // a cudaStream_t
  void* workspace = nullptr;  // bucket_sort_workspace_bytes() bytes, 256-byte aligned
};
void bucket_sort(const SortParams& params);

// Kernels for NVIDIA GPUs, defined only if the build has CUDA. Pointers are to memory of `device`. A call
// enqueues its work in `stream` without waiting for it. It returns null, or CUDA's error message.
namespace cuda {
size_t bucket_sort_workspace_bytes(const SortParams& params);
const char* bucket_sort(const SortParams& params);
}  // namespace cuda

enum class KeyNorm : int32_t { kNone = 0, kRms = 1, kL2 = 2 };

// Which keys a query sees. The fields are those of reformer_kernels.config.AttentionRule.
struct AttentionRule {
  bool rank_window = false;
  int64_t chunk_length = 0, chunks_before = 0, chunks_after = 0;
  int64_t window_before = 0, window_after = 0;
  bool bucket_mask = false, causal = false, exclude_self = false, correct_duplicates = false, ring = false;
  KeyNorm key_norm = KeyNorm::kNone;
};

// out_i = sum_j p_ij v_j, where p_i is the softmax of scale * q_i . k_j + key_bias_j over the keys j that
// query i sees in any round, and lse_i is the log of its denominator. Keys are k or, if k.data is null, q
// normalised by rule.key_norm.
//
// If key_order is given, keys are sorted apart from the queries. The window of query i then lies around its
// cursor: the number of sorted keys that are not after (its bucket, its position), the position being i if
// causal, else i * Lk / L. The rule must then have rank_window, no ring and no exclude_self. Otherwise
// Lk = L, and a padding key is a padding query too.
struct AttentionParams {
  int64_t B = 0, H = 0, L = 0, Lk = 0, D = 0, Dv = 0, R = 0;
  DType dtype = DType::kFloat32;
  Rows q, k, v;
  const int32_t* order = nullptr;       // (B, H, R, L)
  const int32_t* starts = nullptr;      // (B, H, R, starts_size)
  const int32_t* key_order = nullptr;   // (B, H, R, Lk); null unless keys are sorted apart
  const int32_t* key_starts = nullptr;  // (B, H, R, starts_size); null where key_order is
  int64_t starts_size = 0;
  const float* key_bias = nullptr;  // (B, Lk), -inf for padding; may be null
  AttentionRule rule;
  float scale = 1.0f;
  // A probability is kept, and multiplied by keep_scale, if its Philox word is at least dropout_threshold.
  uint32_t dropout_threshold = 0;
  float keep_scale = 1.0f;
  uint64_t seed = 0;
  Rows out;                   // written by forward, read by backward
  float* lse = nullptr;       // (B, H, L), likewise
  void* workspace = nullptr;  // attention_*_workspace_bytes() bytes, 64-byte aligned
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

// One step of cached generation in one layer: takes in a token of each row of the batch and attends from it.
// The cache is written in place and `lengths` rise by 1. A row's new token has position t = lengths[b] and
// sees what the last token of a sequence of t + 1 tokens sees by `rule`, without padding and dropout.
//
// With `buckets` the tokens are sorted by bucket, as in lsh_hash and bucket_sort; else they are in order of
// position, in one round. The sorted order of a round is kept in two parts: `order`, of the tokens up to the
// last sort, and the `recent_count` tokens since, sorted by (bucket, position).
struct DecodeParams {
  int64_t B = 0, H = 0, D = 0, Dv = 0, R = 0;
  DType dtype = DType::kFloat32;  // of the rows
  Rows q, k, v, hashed, out;      // (B, H, 1, D or Dv); if k.data is null, keys are q normalised
  DType key_dtype = DType::kFloat32, value_dtype = DType::kFloat32;  // of the cache
  void* keys = nullptr;    // (B, H, room, D); position j is in slot j % room
  void* values = nullptr;  // (B, H, room, Dv)
  int64_t room = 0;
  int64_t capacity = 0;              // the largest length of a row
  int64_t* lengths = nullptr;        // (B)
  const float* rotations = nullptr;  // these four as in HashParams
  int64_t rotation_heads = 0, rotation_width = 0;
  const int32_t* factors = nullptr;
  int32_t n_factors = 0;
  int32_t* buckets = nullptr;       // (B, H, R, capacity); null where tokens are in order of position
  const int32_t* order = nullptr;   // (B, H, R, order_size), of which the merged tokens are used
  const int32_t* starts = nullptr;  // (B, H, R, starts_size), where each bucket begins among them
  int64_t order_size = 0, starts_size = 0;
  int32_t* recent = nullptr;          // (B, H, R, recent_size), the positions of the recent tokens
  int32_t* recent_buckets = nullptr;  // and their buckets
  int64_t recent_size = 0, recent_count = 0;
  AttentionRule rule;
  float scale = 1.0f;
  int32_t threads = 1;
};
Status decode_step(const DecodeParams& params);

enum class Normalization : int32_t { kNone = 0, kLayer = 1, kRms = 2 };

// One step of a residual stream (rows, columns): stream += sign * delta in place. In the same pass, value is
// the stream in `dtype`, and normed = weight * (value - mean) * rstd + bias for each row (with mean 0 for
// kRms). A floating-point stream has dtype `dtype`. A fixed-point stream holds int32 multiples of 1 / scale;
// it adds sign * round(delta * scale) and wraps around.
struct ResidualParams {
  int64_t rows = 0, columns = 0;
  bool fixed_point = false;
  float scale = 1.0f;  // a power of two; only for fixed point
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
  int32_t* flag = nullptr;  // becomes 1 if a fixed-point sum wraps around or a delta does not fit in int32
  int32_t threads = 1;
};
void residual_step(const ResidualParams& params);

// Asks the system for large pages for the whole 2 MiB pages of a range that is not in use yet. A hint: where
// the system has none, nothing changes.
void prefer_huge_pages(void* memory, size_t bytes);

// The instruction set in use: "avx512bf16", "avx512", "avx2" or "portable".
const char* active_isa();
// Why that one: what a better one lacks here, or that it was asked for by name.
const char* active_isa_reason();
// Chooses an instruction set, or the best one for "". Returns false if the machine or the build lacks it.
bool select_isa(const char* name);

}  // namespace reformer
