// Attention over sorted orders, backward. With p_ij = exp(s_ij - lse_i) / N_ij, where lse_i is the
// log-sum-exp over all rounds and N_ij how often the pair is counted (more than once only if duplicates are
// corrected on a ring), delta_i = out_i . dout_i - dlse_i and m_ij the dropout factor, each round adds its
// part:
//
//   dv_j += p_ij m_ij dout_i          ds_ij = p_ij (m_ij dout_i . v_j - delta_i)
//   dq_i += ds_ij k_j                 dk_j += ds_ij q_i
//
// Here are the workspace and the order of the work; backward_worker.h has the arithmetic of tiles, and
// gradient_rows.h that of single rows before and after. One task is a segment of one head's sorted queries in
// one round. Even segments run first, then odd ones, then the tiles whose keys belong to another round. So no
// two tasks that run at the same time add to the same row, and the order of additions to a row does not
// depend on the number of threads.
#include "../threads.h"
#include "backward_worker.h"

namespace reformer {
namespace REFORMER_ISA {
namespace {

template <typename T>
struct Workspace {
  const AttentionParams& p;
  const AttentionGradients& g;
  float *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr, *delta = nullptr;  // (heads, L, ...)
  uint8_t* seen = nullptr;                                                          // (heads, R, L)
  HeadTables tables;
  char* workers = nullptr;
  size_t worker_bytes = 0;

  Workspace(const AttentionParams& params, const AttentionGradients& gradients, const Plan& plan,
            Arena* arena)
      : p(params), g(gradients), tables(p, plan, arena) {
    if (!kIsFloat<T>) {
      grad_q = arena->take<float>(plan.heads * p.L * p.D);
      grad_v = arena->take<float>(plan.heads * p.Lk * p.Dv);
    }
    if (!kIsFloat<T> || !p.k.data) grad_k = arena->take<float>(plan.heads * p.Lk * p.D);
    delta = arena->take<float>(plan.heads * p.L);
    seen = arena->take<uint8_t>(plan.heads * p.R * max_of(p.L, p.Lk));
    Arena counter;
    BackwardWorker<T>(p, g, plan, &counter);
    worker_bytes = counter.used;
    workers = arena->take<char>(static_cast<int64_t>(worker_bytes) * p.threads);
  }

  Head head_at(int64_t first, int64_t slot) const { return tables.head(p, first, slot); }
  GradientSums sums_at(const Head& head, int64_t slot) const {
    GradientSums sums;
    sums.grad_q = pick(grad_q, g.grad_q, head, slot * p.L, p.D, &sums.grad_q_stride);
    sums.grad_k = pick(grad_k, g.grad_k, head, slot * p.Lk, p.D, &sums.grad_k_stride);
    sums.grad_v = pick(grad_v, g.grad_v, head, slot * p.Lk, p.Dv, &sums.grad_v_stride);
    sums.delta = delta + slot * p.L;
    return sums;
  }

 private:
  // The array for a head's sums: the scratch where there is one, else the gradient tensor itself.
  float* pick(float* scratch, const Rows& rows, const Head& head, int64_t row, int64_t d,
              int64_t* stride) const {
    *stride = scratch ? d : rows.row_stride;
    return scratch ? scratch + row * d : row_of<float>(rows, head.b, head.h, 0);
  }
};

template <typename T>
Status backward(const AttentionParams& p, const AttentionGradients& g) {
  using Part = typename BackwardWorker<T>::Part;
  constexpr int64_t kRowsPerTask = 256;
  const Plan plan = make_plan(p);
  Arena arena{static_cast<char*>(p.workspace), 0};
  const Workspace<T> workspace(p, g, plan, &arena);
  const int64_t rows = max_of(p.L, p.Lk), row_tasks = ceil_div(rows, kRowsPerTask);
  const int64_t all_segments = backward_segments(p, plan);
  const bool crossings = p.rule.ring && !plan.inside_bucket;
  Status status = Status::kOk;
#pragma omp parallel num_threads(p.threads)
  {
    Arena own{workspace.workers + static_cast<size_t>(thread_index()) * workspace.worker_bytes, 0};
    BackwardWorker<T> worker(p, g, plan, &own);
    alignas(64) float key[kMaxHeadDim + kLanes], grad[kMaxHeadDim + kLanes];
    for (int64_t first = 0; first < p.B * p.H; first += plan.heads) {
      const int64_t heads = min_of(plan.heads, p.B * p.H - first);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < heads * row_tasks; ++task) {
        const int64_t slot = task / row_tasks, begin = task % row_tasks * kRowsPerTask;
        const Head head = workspace.head_at(first, slot);
        const GradientSums sums = workspace.sums_at(head, slot);
        for (int64_t i = begin; i < min_of(begin + kRowsPerTask, rows); ++i) {
          if (i < p.L) prepare_query<T>(p, g, head, sums, i);
          if (i < p.Lk) prepare_key(p, sums, i);
        }
      }
      // The layout is checked again, since the caller may have changed it after the forward pass.
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < heads * p.R; ++task) {
        const Head head = workspace.head_at(first, task / p.R);
        const Status round_status = prepare_layout(p, plan, head, task % p.R, workspace.seen + task * rows);
        if (round_status != Status::kOk) {
#pragma omp atomic write
          status = round_status;
        }
      }
      if (status != Status::kOk) break;  // the same for all threads, after the barrier
      for (int64_t round = 0; round < p.R; ++round) {
        for (int64_t parity = 0; parity < 2; ++parity) {
          const int64_t segments = (all_segments + 1 - parity) / 2;
#pragma omp for schedule(dynamic, 1)
          for (int64_t task = 0; task < heads * segments; ++task) {
            const int64_t slot = task / segments;
            const Head head = workspace.head_at(first, slot);
            worker.run_segment(head, workspace.sums_at(head, slot), round, 2 * (task % segments) + parity,
                               Part::kInner);
          }
        }
        if (!crossings) continue;
#pragma omp for schedule(dynamic, 1)
        for (int64_t slot = 0; slot < heads; ++slot) {
          const Head head = workspace.head_at(first, slot);
          const GradientSums sums = workspace.sums_at(head, slot);
          for (int64_t segment = 0; segment < plan.segments; ++segment)
            worker.run_segment(head, sums, round, segment, Part::kCrossing);
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < heads * row_tasks; ++task) {
        const int64_t slot = task / row_tasks, begin = task % row_tasks * kRowsPerTask;
        const Head head = workspace.head_at(first, slot);
        const GradientSums sums = workspace.sums_at(head, slot);
        for (int64_t i = begin; i < min_of(begin + kRowsPerTask, rows); ++i) {
          if (i < p.Lk) finish_key<T>(p, g, plan, head, sums, i, key, grad);
          if (i < p.L) finish_query<T>(p, g, head, sums, i);
        }
      }
    }
  }
  return status;
}

template <typename T>
size_t workspace_bytes(const AttentionParams& p) {
  const Plan plan = make_plan(p);
  const AttentionGradients none;
  Arena arena;
  const Workspace<T> workspace(p, none, plan, &arena);
  return arena.used;
}

}  // namespace

size_t attention_backward_workspace_bytes(const AttentionParams& p) {
  if (!can_plan(p)) return 0;
  return with_element(p.dtype, [&](auto element) { return workspace_bytes<decltype(element)>(p); });
}

Status attention_backward(const AttentionParams& p, const AttentionGradients& g) {
  if (!can_plan(p)) return Status::kEmpty;
  if (p.B * p.H == 0) return Status::kOk;
  return with_element(p.dtype, [&](auto element) { return backward<decltype(element)>(p, g); });
}

}  // namespace REFORMER_ISA
}  // namespace reformer
