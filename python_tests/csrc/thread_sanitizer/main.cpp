// Calls every native kernel on several threads, for the thread sanitizer. Prints the name of each case.
//
// With the argument "race" it runs a loop with a race in it, which the sanitizer must find.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../../csrc/cpu/variants.h"

using namespace reformer;

namespace {

constexpr int kThreads = 4;

std::mt19937 generator(0);

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> draw;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = draw(generator);
  return values;
}

// A (B, H, L, D) array of a dtype whose numbers are float32, or the upper halves of float32.
struct Array {
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  Rows rows;
  Array(int64_t H, int64_t L, int64_t D, DType dtype, int64_t B) : wide(normal(B * H * L * D)) {
    rows = {wide.data(), H * L * D, L * D, D};
    if (dtype == DType::kFloat32) return;
    for (float value : wide) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      narrow.push_back(static_cast<uint16_t>(bits >> 16));
    }
    rows.data = narrow.data();
  }
};

struct Layout {
  std::vector<int32_t> order, starts;
  int64_t starts_size;
};

Layout make_layout(const Array& x, int64_t B, int64_t H, int64_t L, int64_t D, int64_t R, DType dtype,
                   const uint8_t* padding) {
  const int32_t factors[] = {8};
  std::vector<int32_t> buckets(static_cast<size_t>(B * H * R * L));
  const std::vector<float> rotations = normal(H * D * R * 4);
  HashParams hash;
  hash.B = B, hash.H = H, hash.L = L, hash.D = D, hash.R = R, hash.dtype = dtype, hash.x = x.rows;
  hash.rotations = rotations.data(), hash.rotation_heads = H, hash.rotation_width = 4;
  hash.factors = factors, hash.n_factors = 1, hash.padding = padding, hash.buckets = buckets.data();
  hash.threads = kThreads;
  lsh_hash(hash);
  Layout layout{std::vector<int32_t>(buckets.size()), {}, 10};
  layout.starts.resize(static_cast<size_t>(B * H * R * layout.starts_size));
  SortParams sort;
  sort.segments = B * H * R, sort.L = L, sort.n_buckets = 9, sort.starts_size = layout.starts_size;
  sort.buckets = buckets.data(), sort.order = layout.order.data(), sort.starts = layout.starts.data();
  sort.threads = kThreads;
  bucket_sort(sort);
  return layout;
}

struct Workspace {
  void* memory;
  explicit Workspace(size_t bytes) : memory(allocate_scratch(bytes)) {}
  ~Workspace() { free_scratch(memory); }
};

bool attention(const AttentionRule& rule, int64_t H, int64_t L, int64_t Lk, DType dtype, bool own_keys,
               bool padded, bool dropout) {
  constexpr int64_t B = 2, D = 8, R = 2;
  Array q(H, L, D, dtype, B), k(H, Lk, D, dtype, B), v(H, Lk, D, dtype, B), grad(H, L, D, dtype, B);
  Array out(H, L, D, dtype, B), dq(H, L, D, dtype, B), dk(H, Lk, D, dtype, B), dv(H, Lk, D, dtype, B);
  std::vector<uint8_t> padding(static_cast<size_t>(B * Lk));
  std::vector<float> bias(padding.size());
  for (size_t i = 0; i < padding.size(); ++i) {
    padding[i] = padded && generator() % 4 == 0;
    bias[i] = padding[i] ? -std::numeric_limits<float>::infinity() : 0.0f;
  }
  const bool apart = Lk != L;
  const Layout queries = make_layout(q, B, H, L, D, R, dtype, apart ? nullptr : padding.data());
  const Layout keys = apart ? make_layout(k, B, H, Lk, D, R, dtype, padding.data()) : queries;
  std::vector<float> lse(static_cast<size_t>(B * H * L)), grad_lse = normal(B * H * L);
  AttentionParams p;
  p.B = B, p.H = H, p.L = L, p.Lk = Lk, p.D = D, p.Dv = D, p.R = R, p.dtype = dtype;
  p.q = q.rows, p.v = v.rows;
  if (own_keys) p.k = k.rows;
  p.order = queries.order.data(), p.starts = queries.starts.data(), p.starts_size = queries.starts_size;
  if (apart) p.key_order = keys.order.data(), p.key_starts = keys.starts.data();
  if (padded) p.key_bias = bias.data();
  p.rule = rule;
  if (dropout) p.dropout_threshold = 1u << 30, p.keep_scale = 4.0f / 3, p.seed = 7;
  p.out = out.rows, p.lse = lse.data(), p.threads = kThreads;
  const Workspace forward(attention_forward_workspace_bytes(p));
  p.workspace = forward.memory;
  if (attention_forward(p) != Status::kOk) return false;
  AttentionGradients g;
  g.grad_out = grad.rows, g.grad_lse = grad_lse.data(), g.grad_q = dq.rows, g.grad_v = dv.rows;
  if (own_keys) g.grad_k = dk.rows;
  const Workspace backward(attention_backward_workspace_bytes(p));
  p.workspace = backward.memory;
  return attention_backward(p, g) == Status::kOk;
}

bool all_attention() {
  AttentionRule paper;
  paper.chunk_length = 32, paper.chunks_before = 1, paper.bucket_mask = paper.exclude_self = true;
  paper.correct_duplicates = true, paper.key_norm = KeyNorm::kRms;
  AttentionRule trax = paper;
  trax.bucket_mask = trax.correct_duplicates = false, trax.ring = trax.causal = true, trax.chunks_after = 1;
  AttentionRule corrected_ring = trax;
  corrected_ring.correct_duplicates = true, corrected_ring.key_norm = KeyNorm::kL2;
  AttentionRule bucket = paper;
  bucket.rank_window = bucket.causal = true, bucket.window_before = 60;
  AttentionRule cross = bucket;
  cross.exclude_self = false, cross.key_norm = KeyNorm::kNone;
  AttentionRule local = trax;
  local.exclude_self = local.ring = false, local.key_norm = KeyNorm::kNone;
  bool ok = true;
  const auto run = [&](const char* name, const AttentionRule& rule, int64_t H, int64_t L, int64_t Lk,
                       DType dtype, bool own_keys, bool padded, bool dropout) {
    std::printf("attention, %s, %d heads, %d tokens\n", name, static_cast<int>(H), static_cast<int>(L));
    ok &= attention(rule, H, L, Lk, dtype, own_keys, padded, dropout);
  };
  // Two lengths: many heads of one segment, and one head that threads share.
  for (const int64_t L : {130, 2500}) {
    const int64_t H = L < 1000 ? 3 : 1;
    run("paper", paper, H, L, L, DType::kFloat32, false, true, true);
    run("paper", paper, H, L, L, DType::kBFloat16, false, false, false);
    run("trax", trax, H, L, L, DType::kFloat32, false, true, false);
    run("ring, duplicates corrected", corrected_ring, H, L, L, DType::kFloat32, false, false, true);
    run("bucket", bucket, H, L, L, DType::kFloat32, false, true, false);
    run("local", local, H, L, L, DType::kFloat32, true, true, true);
    run("cross", cross, H, L, L + 77, DType::kFloat32, true, true, false);
  }
  return ok;
}

void long_sort() {
  std::printf("sort, one segment that threads share\n");
  const int64_t L = 1 << 17;
  std::vector<int32_t> buckets(static_cast<size_t>(L)), order(buckets.size()), starts(34);
  for (int32_t& id : buckets) id = static_cast<int32_t>(generator() % 33);
  SortParams sort;
  sort.segments = 1, sort.L = L, sort.n_buckets = 33, sort.starts_size = 34;
  sort.buckets = buckets.data(), sort.order = order.data(), sort.starts = starts.data();
  sort.threads = kThreads;
  bucket_sort(sort);
}

void residual() {
  std::printf("residual steps\n");
  const int64_t rows = 301, columns = 33;
  std::vector<int32_t> stream(static_cast<size_t>(rows * columns));
  const std::vector<float> delta = normal(rows * columns), weight = normal(columns);
  std::vector<float> value(delta.size()), normed(delta.size()), mean(rows), rstd(rows);
  int32_t flag = 0;
  ResidualParams p;
  p.rows = rows, p.columns = columns, p.fixed_point = true, p.scale = 1048576.0f;
  p.stream = stream.data(), p.delta = delta.data(), p.value = value.data();
  p.normalization = Normalization::kLayer, p.epsilon = 1e-5f, p.norm_weight = weight.data();
  p.normed = normed.data(), p.mean = mean.data(), p.rstd = rstd.data(), p.flag = &flag;
  p.threads = kThreads;
  residual_step(p);
}

// The last thing that each thread writes stays: what the sanitizer must call a race. The schedule is static,
// as otherwise one quick thread may write everything.
int race() {
  int last = 0;
#pragma omp parallel num_threads(kThreads)
#pragma omp for schedule(static)
  for (int i = 0; i < 100; ++i) last = i;
  return last;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::string(arguments[1]) == "race") return race() < 0;
  if (count > 1 && !select_isa(arguments[1])) return 3;
  std::printf("instruction set %s\n", active_isa());
  if (!all_attention()) return 2;
  long_sort();
  residual();
  std::printf("finished\n");
  return 0;
}
