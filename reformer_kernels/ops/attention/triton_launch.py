"""Launchers of the Triton attention kernels: allocate, choose grids, run, on the current stream.

Nothing here waits for the device or looks at what tensors hold, so that calls can be captured in CUDA
graphs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from reformer_kernels.config import AttentionRule
from reformer_kernels.ops.attention import triton_plan
from reformer_kernels.ops.attention.philox import threshold
from reformer_kernels.ops.attention.triton_backward import (
    attention_backward_keys_kernel,
    attention_backward_queries_kernel,
)
from reformer_kernels.ops.attention.triton_forward import attention_forward_kernel
from reformer_kernels.ops.attention.triton_plan import Plan, make_plan
from reformer_kernels.ops.attention.triton_tables import (
    attention_finish_kernel,
    attention_rows_kernel,
    attention_tables_kernel,
)
from reformer_kernels.ops.tiles import Tile, architecture_of, tile
from reformer_kernels.ops.triton_tools import alignment, check_programs, check_rows, on_device, row_strides

TABLE_BLOCK = 256
ROW_ELEMENTS = 4096
"""Of the rows that one program of the row-wise kernels holds."""


def rows_a_program(width: int) -> int:
    return max(1, ROW_ELEMENTS // triton.next_power_of_2(width))


@dataclass(frozen=True)
class Problem:
    """The arguments of a call, with what is worked out of them once: see triton_tables."""

    q: Tensor
    k: Tensor | None
    v: Tensor
    order: Tensor
    starts: Tensor
    key_bias: Tensor | None
    seed: Tensor | None
    plan: Plan
    scale: float
    dropout_p: float
    rank_buckets: Tensor | None
    codes: Tensor | None
    inverse_norms: Tensor | None
    delta: Tensor | None

    @property
    def heads(self) -> int:
        return self.q.size(0) * self.q.size(1)

    @property
    def keys(self) -> Tensor:
        return self.q if self.k is None else self.k

    def tile(self, kernel: str) -> Tile:
        head_dim = max(self.q.size(-1), self.v.size(-1))
        architecture = architecture_of(self.q.device)
        return tile(kernel, architecture=architecture, bits=8 * self.q.element_size(), head_dim=head_dim)

    def arguments(self, chosen: Tile, *others: Tensor) -> dict[str, Any]:
        """What the tile kernels have in common. `others` are tensors whose rows they read or write too."""
        q, keys, v = self.q, self.keys, self.v
        unused = self.order
        D, DV = q.size(-1), v.size(-1)
        return {
            **{"q": q, "k": keys, "v": v, "order": self.order, "starts": self.starts},
            "rank_buckets": unused if self.rank_buckets is None else self.rank_buckets,
            "codes": unused if self.codes is None else self.codes,
            "inverse_norms": unused if self.inverse_norms is None else self.inverse_norms,
            "key_bias": unused if self.key_bias is None else self.key_bias,
            "seed": unused if self.seed is None else self.seed,
            **named_strides("q", q),
            **named_strides("k", keys),
            **named_strides("v", v),
            **self.plan.integers(),
            "H": q.size(1),
            "threshold": triton_plan.signed(threshold(self.dropout_p)),
            "scale": self.scale,
            "keep_scale": 1.0 / (1.0 - self.dropout_p),
            **self.plan.constants(chosen),
            "NORM": 0 if self.inverse_norms is None else self.plan.rule.key_norm,
            "HAS_BIAS": self.key_bias is not None,
            "DROPOUT": self.dropout_p > 0,
            **triton_plan.head_dims(D, DV),
            "ALIGN": alignment(q, keys, v, *others),
            "PRECISION": triton_plan.precision(q.dtype),
            "DIMS": min(chosen.dims, triton.next_power_of_2(max(16, D))),
            "num_warps": chosen.warps,
            "num_stages": chosen.stages,
        }


def named_strides(name: str, tensor: Tensor) -> dict[str, int]:
    return dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row"), row_strides(tensor), strict=True))


def prepare(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: Tensor,
    starts: Tensor,
    key_bias: Tensor | None,
    seed: Tensor | None,
    rule: AttentionRule,
    scale: float,
    dropout_p: float,
    *,
    gradients: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> Problem:
    """`gradients`: out, grad_out and grad_lse, where delta is wanted."""
    B, H, L, _ = q.shape
    R, S = order.size(2), starts.size(3)
    plan = make_plan(rule, R, L, S)
    check_rows([("q", q), ("v", v), *([] if k is None else [("k", k)])])
    device = q.device
    rank_buckets = codes = inverse_norms = delta = None
    if plan.buckets != triton_plan.NO_BUCKETS:
        rank_buckets = torch.empty((B, H, R, L), dtype=torch.int32, device=device)
    if rule.correct_duplicates and plan.meets_again:
        codes = torch.empty((B, H, L, R), dtype=torch.int32, device=device)
    if k is None and rule.key_norm:
        inverse_norms = torch.empty((B, H, L), dtype=torch.float32, device=device)
    if gradients is not None:
        delta = torch.empty((B, H, L), dtype=torch.float32, device=device)
    if rank_buckets is not None or codes is not None:
        attention_tables_kernel[(check_programs(B * H * R * triton.cdiv(L, TABLE_BLOCK)),)](
            order,
            starts,
            order if rank_buckets is None else rank_buckets,
            order if codes is None else codes,
            L,
            R,
            S,
            (S - 1).bit_length(),
            plan.chunk_length,
            plan.jump,
            WINDOW=plan.window,
            BUCKETS=rank_buckets is not None,
            CODES=codes is not None,
            BLOCK=TABLE_BLOCK,
        )
    if inverse_norms is not None or delta is not None:
        out, grad_out, grad_lse = gradients or (q, q, None)
        block = rows_a_program(max(q.size(-1), v.size(-1)))
        attention_rows_kernel[(check_programs(B * H * triton.cdiv(L, block)),)](
            q,
            out,
            grad_out,
            q if grad_lse is None else grad_lse,
            q if inverse_norms is None else inverse_norms,
            q if delta is None else delta,
            *row_strides(q),
            *row_strides(out),
            *row_strides(grad_out),
            H,
            L,
            NORM=0 if inverse_norms is None else rule.key_norm,
            DELTA=delta is not None,
            HAS_GRAD_LSE=grad_lse is not None,
            **triton_plan.head_dims(q.size(-1), v.size(-1)),
            ALIGN=alignment(q, out, grad_out),
            BLOCK=block,
        )
    if dropout_p > 0:
        assert seed is not None
        seed = triton_plan.device_seed(seed, device)
    return Problem(
        q, k, v, order, starts, key_bias, seed, plan, scale, dropout_p, rank_buckets, codes, inverse_norms, delta
    )  # fmt: skip


def forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: Tensor,
    starts: Tensor,
    key_bias: Tensor | None,
    seed: Tensor | None,
    rule: AttentionRule,
    scale: float,
    dropout_p: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Writes `out` (B, H, L, Dv) and `lse` (B, H, L)."""
    if not lse.numel():
        return
    with on_device(q):
        problem = prepare(q, k, v, order, starts, key_bias, seed, rule, scale, dropout_p)
        chosen = problem.tile("attention_forward")
        B, H, L, DV = v.shape
        R = problem.plan.R
        tiles = triton.cdiv(L, chosen.rows)
        running_bytes = 4 * DV if q.dtype != torch.float32 else 0
        bytes_a_head = L * (sum(x.size(-1) for x in (q, v, v)) * q.element_size() + running_bytes)
        group = triton_plan.heads_together(q.device, B * H, tiles, bytes_a_head) if R > 1 else B * H
        # Rounds are summed in float32: in place where results are float32.
        in_place = R == 1 or out.dtype == torch.float32
        running = out if in_place else out.new_empty((1, group, L, DV), dtype=torch.float32)
        strides = named_strides("running", running)
        if not in_place:
            strides |= {"running_head": L * DV, "running_batch": H * L * DV, "running_row": DV}
        arguments = problem.arguments(chosen, out, running)
        for first in range(0, B * H, group):
            heads = min(group, B * H - first)
            for round_ in range(R):
                attention_forward_kernel[(check_programs(heads * tiles),)](
                    **arguments,
                    out=out,
                    lse=lse,
                    running=running,
                    **named_strides("out", out),
                    **strides,
                    running_first=0 if in_place else first,
                    first_head=first,
                    round_=round_,
                    FIRST=round_ == 0,
                    LAST=round_ == R - 1,
                )


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    order: Tensor,
    starts: Tensor,
    key_bias: Tensor | None,
    seed: Tensor | None,
    rule: AttentionRule,
    scale: float,
    dropout_p: float,
    grad_q: Tensor,
    grad_k: Tensor | None,
    grad_v: Tensor,
) -> None:
    """Writes the gradients of q, v and, where keys are given apart, k."""
    if not lse.numel():
        return
    with on_device(q):
        check_rows([("out", out), ("grad_out", grad_out)])
        problem = prepare(
            q, k, v, order, starts, key_bias, seed, rule, scale, dropout_p, gradients=(out, grad_out, grad_lse)
        )  # fmt: skip
        (B, H, L, D), DV, R = q.shape, v.size(-1), problem.plan.R
        passes = []
        for name, kernel in (
            ("attention_backward_queries", attention_backward_queries_kernel),
            ("attention_backward_keys", attention_backward_keys_kernel),
        ):
            chosen = problem.tile(name)
            passes.append((kernel, triton.cdiv(L, chosen.rows), problem.arguments(chosen, grad_out)))
        bytes_a_head = L * ((2 * D + 2 * DV) * q.element_size() + 4 * (2 * D + DV))
        tiles = min(tiles for _, tiles, _ in passes)
        group = triton_plan.heads_together(q.device, B * H, tiles, bytes_a_head)
        q_sums, k_sums, v_sums = (
            torch.empty((group, L, width), dtype=torch.float32, device=q.device) for width in (D, D, DV)
        )
        block = rows_a_program(max(D, DV))
        for first in range(0, B * H, group):
            heads = min(group, B * H - first)
            for round_ in range(R):
                for kernel, tiles, arguments in passes:
                    by_queries = kernel is attention_backward_queries_kernel
                    kernel[(check_programs(heads * tiles),)](
                        **arguments,
                        **({"q_sums": q_sums} if by_queries else {"k_sums": k_sums, "v_sums": v_sums}),
                        grad_out=grad_out,
                        lse=lse,
                        delta=problem.delta,
                        **named_strides("grad", grad_out),
                        first_head=first,
                        round_=round_,
                        FIRST=round_ == 0,
                    )
            attention_finish_kernel[(check_programs(heads * triton.cdiv(L, block)),)](
                q=q,
                grad_out=grad_out,
                key_bias=q if key_bias is None else key_bias,
                inverse_norms=q if problem.inverse_norms is None else problem.inverse_norms,
                lse=lse,
                q_sums=q_sums,
                k_sums=k_sums,
                v_sums=v_sums,
                grad_q=grad_q,
                grad_k=grad_q if grad_k is None else grad_k,
                grad_v=grad_v,
                **named_strides("q", q),
                **named_strides("grad", grad_out),
                **named_strides("grad_q", grad_q),
                **named_strides("grad_k", grad_q if grad_k is None else grad_k),
                **named_strides("grad_v", grad_v),
                first_head=first,
                H=H,
                L=L,
                scale=scale,
                NORM=0 if problem.inverse_norms is None else rule.key_norm,
                SHARED=k is None,
                HAS_BIAS=key_bias is not None,
                EXCLUDE_SELF=rule.exclude_self,
                **triton_plan.head_dims(D, DV),
                ALIGN=alignment(q, grad_out),
                BLOCK=block,
            )
