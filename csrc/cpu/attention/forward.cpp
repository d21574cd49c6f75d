// Attention over sorted orders, forward: out_i = sum_j p_ij v_j, p_i = softmax over the keys of all rounds.
//
// Here are the workspace and the order of the work; forward_worker.h has the arithmetic. One task is a
// segment of one head's tiles in one round. A round starts when the one before is done, so a row's rounds are
// added in order, and results do not depend on the number of threads.
#include "../threads.h"
#include "forward_worker.h"

namespace reformer {
namespace REFORMER_ISA {
namespace {

template <typename T>
struct Workspace {
  const AttentionParams& p;
  HeadTables tables;
  float *maximum = nullptr, *sum = nullptr, *out = nullptr;  // (heads, L, ...): see RunningRows
  uint8_t* seen = nullptr;                                   // (heads, R, L)
  char* workers = nullptr;
  size_t worker_bytes = 0;

  Workspace(const AttentionParams& params, const Plan& plan, Arena* arena)
      : p(params), tables(p, plan, arena) {
    if (p.R > 1) {
      maximum = arena->take<float>(plan.heads * p.L);
      sum = arena->take<float>(plan.heads * p.L);
      if (!kIsFloat<T>) out = arena->take<float>(plan.heads * p.L * p.Dv);
    }
    seen = arena->take<uint8_t>(plan.heads * p.R * max_of(p.L, p.Lk));
    Arena counter;
    ForwardWorker<T>(p, plan, &counter);
    worker_bytes = counter.used;
    workers = arena->take<char>(static_cast<int64_t>(worker_bytes) * p.threads);
  }

  RunningRows running_rows(int64_t slot) const {
    RunningRows rows;
    if (maximum) rows.maximum = maximum + slot * p.L;
    if (sum) rows.sum = sum + slot * p.L;
    if (out) rows.out = out + slot * p.L * p.Dv;
    return rows;
  }
};

template <typename T>
Status forward(const AttentionParams& p) {
  const Plan plan = make_plan(p);
  Arena arena{static_cast<char*>(p.workspace), 0};
  const Workspace<T> workspace(p, plan, &arena);
  Status status = Status::kOk;
#pragma omp parallel num_threads(p.threads)
  {
    Arena own{workspace.workers + static_cast<size_t>(thread_index()) * workspace.worker_bytes, 0};
    ForwardWorker<T> worker(p, plan, &own);
    for (int64_t first = 0; first < p.B * p.H; first += plan.heads) {
      const int64_t heads = min_of(plan.heads, p.B * p.H - first);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t task = 0; task < heads * plan.segments; ++task) {
        const Head head = workspace.tables.head(p, first, task / plan.segments);
        const int64_t begin = task % plan.segments * plan.segment_tiles * kTileRows;
        if (!head.inverse_norms) continue;
        for (int64_t i = begin; i < min_of(begin + plan.segment_tiles * kTileRows, p.L); ++i)
          head.inverse_norms[i] = inverse_norm<T>(p, head, i);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < heads * p.R; ++task) {
        const Head head = workspace.tables.head(p, first, task / p.R);
        const Status round_status =
            prepare_layout(p, plan, head, task % p.R, workspace.seen + task * max_of(p.L, p.Lk));
        if (round_status != Status::kOk) {
#pragma omp atomic write
          status = round_status;
        }
      }
      // After the barrier at the end of the loop above, all threads read the same `status`.
      if (status != Status::kOk) break;
      for (int64_t round = 0; round < p.R; ++round) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < heads * plan.segments; ++task) {
          const int64_t slot = task / plan.segments;
          worker.run_segment(workspace.tables.head(p, first, slot), workspace.running_rows(slot), round,
                             task % plan.segments);
        }
      }
    }
  }
  return status;
}

template <typename T>
size_t workspace_bytes(const AttentionParams& p) {
  const Plan plan = make_plan(p);
  Arena arena;
  const Workspace<T> workspace(p, plan, &arena);
  return arena.used;
}

}  // namespace

size_t attention_forward_workspace_bytes(const AttentionParams& p) {
  if (!can_plan(p)) return 0;
  return with_element(p.dtype, [&](auto element) { return workspace_bytes<decltype(element)>(p); });
}

Status attention_forward(const AttentionParams& p) {
  if (!can_plan(p)) return Status::kEmpty;
  if (p.B * p.H == 0) return Status::kOk;
  return with_element(p.dtype, [&](auto element) { return forward<decltype(element)>(p); });
}

}  // namespace REFORMER_ISA
}  // namespace reformer
