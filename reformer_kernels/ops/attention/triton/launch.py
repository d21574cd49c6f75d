"""Launchers of the Triton attention kernels: they allocate, choose grids, and run on the current stream.

Nothing here waits for the device or reads what tensors hold, so that CUDA graphs can capture the calls.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from reformer_kernels._random import threshold as dropout_threshold
from reformer_kernels.gpu.architectures import architecture_of
from reformer_kernels.gpu.launching import alignment, check_programs, check_rows, on_device, row_strides
from reformer_kernels.gpu.tiles import Tile, padded_head_dim, tile
from reformer_kernels.ops.attention.triton.backward import (
    attention_backward_keys_kernel,
    attention_backward_queries_kernel,
)
from reformer_kernels.ops.attention.triton.forward import attention_forward_kernel
from reformer_kernels.ops.attention.triton.plan import (
    NO_BUCKETS,
    NO_DUPLICATES,
    Plan,
    device_seed,
    head_dims,
    heads_together,
    make_plan,
    precision,
    signed,
)
from reformer_kernels.ops.attention.triton.rowwise import attention_finish_kernel, attention_rows_kernel
from reformer_kernels.ops.attention.triton.tables import attention_cursors_kernel, attention_tables_kernel
from reformer_kernels.rule import AttentionRule

TABLE_BLOCK = 256
"""Ranks that one program of the table kernels takes."""

ROW_ELEMENTS = 4096
"""Numbers that one program of the row-wise kernels holds of each tensor."""


def rows_a_program(width: int) -> int:
    """How many rows of `width` numbers one program of the row-wise kernels takes."""
    return max(1, ROW_ELEMENTS // triton.next_power_of_2(width))


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call, as `reference.attention` takes them; the layout as `Layout` holds it.

    k is None where queries serve as keys; key_order and key_starts are None unless keys are sorted apart.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor
    order: Tensor
    starts: Tensor
    key_bias: Tensor | None
    seed: Tensor | None
    key_order: Tensor | None
    key_starts: Tensor | None

    @property
    def keys(self) -> Tensor:
        return self.q if self.k is None else self.k


@dataclass(frozen=True)
class Tables:
    """What `tables` and `rowwise` compute once a call, before the tile kernels. None where it is not read."""

    rank_buckets: Tensor | None = None
    lows: Tensor | None = None
    highs: Tensor | None = None
    key_lows: Tensor | None = None
    key_highs: Tensor | None = None
    codes: Tensor | None = None
    key_codes: Tensor | None = None
    inverse_norms: Tensor | None = None
    delta: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """A call that is ready to launch: its tensors, plan and tables."""

    inputs: Inputs
    plan: Plan
    tables: Tables
    scale: float
    dropout_p: float

    def tile(self, kernel: str) -> Tile:
        """The tile of `kernel` for this call's device, dtype, head dimensions and options."""
        q, v = self.inputs.q, self.inputs.v
        plain = self.inputs.key_bias is None and self.dropout_p == 0
        return tile(
            kernel,
            architecture=architecture_of(q.device),
            bits=8 * q.element_size(),
            head_dim=max(q.size(-1), v.size(-1)),
            options="off" if plain else "all",
        )

    def arguments(self, chosen: Tile, *others: Tensor, of_keys: bool = False) -> dict[str, Any]:
        """The arguments that the tile kernels have in common.

        `others` are further tensors whose rows the kernel reads or writes. `of_keys` says that its tiles are
        keys.
        """
        inputs, tables = self.inputs, self.tables
        q, keys, v = inputs.q, inputs.keys, inputs.v

        def or_unused(tensor: Tensor | None) -> Tensor:
            return inputs.order if tensor is None else tensor

        return {
            "q": q,
            "k": keys,
            "v": v,
            "order": inputs.order,
            "starts": inputs.starts,
            "key_order": or_unused(inputs.key_order),
            "rank_buckets": or_unused(tables.rank_buckets),
            "lows": or_unused(tables.key_lows if of_keys else tables.lows),
            "highs": or_unused(tables.key_highs if of_keys else tables.highs),
            "codes": or_unused(tables.codes),
            "key_codes": or_unused(tables.key_codes),
            "inverse_norms": or_unused(tables.inverse_norms),
            "key_bias": or_unused(inputs.key_bias),
            "seed": or_unused(inputs.seed),
            **named_strides("q", q),
            **named_strides("k", keys),
            **named_strides("v", v),
            **self.plan.integers(),
            "H": q.size(1),
            "threshold": signed(dropout_threshold(self.dropout_p)),
            "scale": self.scale,
            "keep_scale": 1.0 / (1.0 - self.dropout_p),
            **self.plan.constants(chosen),
            "NORM": 0 if tables.inverse_norms is None else self.plan.rule.key_norm,
            "HAS_BIAS": inputs.key_bias is not None,
            "DROPOUT": self.dropout_p > 0,
            **head_dims(q.size(-1), v.size(-1)),
            "ALIGN": alignment(q, keys, v, *others),
            "PRECISION": precision(q.dtype),
            "DIMS": min(chosen.dims, padded_head_dim(q.size(-1))),
            "num_warps": chosen.warps,
            "num_stages": chosen.stages,
        }


def named_strides(name: str, tensor: Tensor) -> dict[str, int]:
    """The strides of a tensor's rows, by the names that kernels give them."""
    return dict(zip((f"{name}_batch", f"{name}_head", f"{name}_row"), row_strides(tensor), strict=True))


def prepare(
    inputs: Inputs,
    rule: AttentionRule,
    scale: float,
    dropout_p: float,
    *,
    gradients: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> Problem:
    """Checks the rows of q, k and v, and computes the tables of a call.

    `gradients` are out, grad_out and grad_lse in a backward pass, which needs their delta.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    L, LK, R, S = q.size(2), v.size(2), inputs.order.size(2), inputs.starts.size(3)
    plan = make_plan(rule, R, L, LK, S, separate=inputs.key_order is not None)
    check_rows([("q", q), ("v", v), *([] if k is None else [("k", k)])])
    tables = _layout_tables(inputs, plan)
    tables |= _row_tables(inputs, 0 if k is not None else rule.key_norm, gradients)
    if dropout_p > 0:
        assert inputs.seed is not None
        inputs = dataclasses.replace(inputs, seed=device_seed(inputs.seed, q.device))
    if inputs.key_order is None:
        inputs = dataclasses.replace(inputs, key_order=inputs.order)
    return Problem(inputs, plan, Tables(**tables), scale, dropout_p)


def _layout_tables(inputs: Inputs, plan: Plan) -> dict[str, Tensor]:
    """The fields of `Tables` that the layout decides."""
    B, H, L, _ = inputs.q.shape
    R, S, LK = plan.R, plan.S, plan.LK
    unused = inputs.order

    def empty(*shape: int) -> Tensor:
        return torch.empty((B, H, *shape), dtype=torch.int32, device=inputs.q.device)

    def grid(length: int) -> tuple[int]:
        return (check_programs(B * H * R * triton.cdiv(length, TABLE_BLOCK)),)

    has_codes = plan.duplicates != NO_DUPLICATES
    tables = {"codes": empty(L, R)} if has_codes else {}
    if inputs.key_order is not None and inputs.key_starts is not None:
        if has_codes:
            tables["key_codes"] = empty(LK, R)
        cursors = empty(R, L)
        for keys, prefix in ((False, ""), (True, "key_")):
            length, other = (LK, L) if keys else (L, LK)
            lows, highs = empty(R, length), empty(R, length)
            tables |= {f"{prefix}lows": lows, f"{prefix}highs": highs}
            attention_cursors_kernel[grid(length)](
                inputs.order,
                inputs.starts,
                inputs.key_order,
                inputs.key_starts,
                cursors,
                lows,
                highs,
                tables.get(f"{prefix}codes", unused),
                L,
                LK,
                R,
                S,
                (S - 1).bit_length(),
                other.bit_length(),
                plan.before,
                plan.after,
                plan.jump,
                KEYS=keys,
                CAUSAL=plan.rule.causal,
                BUCKETS=plan.rule.bucket_mask,
                CODES=has_codes,
                BLOCK=TABLE_BLOCK,
            )
        return tables
    has_buckets = plan.buckets != NO_BUCKETS
    if has_buckets:
        tables["rank_buckets"] = empty(R, L)
    if tables:
        attention_tables_kernel[grid(L)](
            inputs.order,
            inputs.starts,
            tables.get("rank_buckets", unused),
            tables.get("codes", unused),
            L,
            R,
            S,
            (S - 1).bit_length(),
            plan.chunk_length,
            plan.jump,
            RANK_WINDOW=plan.rank_window,
            BUCKETS=has_buckets,
            CODES=has_codes,
            BLOCK=TABLE_BLOCK,
        )
    if has_codes:
        tables["key_codes"] = tables["codes"]
    return tables


def _row_tables(
    inputs: Inputs, norm: int, gradients: tuple[Tensor, Tensor, Tensor | None] | None
) -> dict[str, Tensor]:
    """The fields of `Tables` that the rows decide; `norm` is `AttentionRule.key_norm`, 0 for none."""
    q, v = inputs.q, inputs.v
    B, H, L, _ = q.shape
    out, grad_out, grad_lse = gradients or (q, q, None)
    tables = {}
    if norm:
        tables["inverse_norms"] = torch.empty((B, H, L), dtype=torch.float32, device=q.device)
    if gradients is not None:
        tables["delta"] = torch.empty((B, H, L), dtype=torch.float32, device=q.device)
    if not tables:
        return tables
    block = rows_a_program(max(q.size(-1), v.size(-1)))
    attention_rows_kernel[(check_programs(B * H * triton.cdiv(L, block)),)](
        q,
        out,
        grad_out,
        q if grad_lse is None else grad_lse,
        tables.get("inverse_norms", q),
        tables.get("delta", q),
        *row_strides(q),
        *row_strides(out),
        *row_strides(grad_out),
        H,
        L,
        NORM=norm,
        DELTA=gradients is not None,
        HAS_GRAD_LSE=grad_lse is not None,
        **head_dims(q.size(-1), v.size(-1)),
        ALIGN=alignment(q, out, grad_out),
        BLOCK=block,
    )
    return tables


def forward(
    inputs: Inputs, rule: AttentionRule, scale: float, dropout_p: float, out: Tensor, lse: Tensor
) -> None:
    """Writes `out` (B, H, L, Dv) and `lse` (B, H, L): see `reference.attention`."""
    if not lse.numel():
        return
    q, v = inputs.q, inputs.v
    with on_device(q):
        problem = prepare(inputs, rule, scale, dropout_p)
        chosen = problem.tile("attention_forward")
        (B, H, L, D), (LK, DV) = q.shape, v.shape[2:]
        R = problem.plan.R
        tiles = triton.cdiv(L, chosen.rows)
        running_bytes = 4 * DV if q.dtype != torch.float32 else 0
        bytes_a_head = L * ((D + DV) * q.element_size() + running_bytes) + LK * DV * q.element_size()
        bytes_a_head += 0 if inputs.k is None else LK * D * q.element_size()
        group = heads_together(q.device, B * H, tiles, bytes_a_head) if R > 1 else B * H
        # Rounds are merged in float32: inside `out` where that is float32, else in memory of their own.
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
    inputs: Inputs,
    rule: AttentionRule,
    scale: float,
    dropout_p: float,
    grad_q: Tensor,
    grad_k: Tensor | None,
    grad_v: Tensor,
) -> None:
    """Writes the gradients of q, v and k; grad_k is None where queries serve as keys."""
    if not lse.numel():
        return
    q, k, v = inputs.q, inputs.k, inputs.v
    with on_device(q):
        check_rows([("out", out), ("grad_out", grad_out)])
        problem = prepare(inputs, rule, scale, dropout_p, gradients=(out, grad_out, grad_lse))
        (B, H, L, D), (LK, DV), R = q.shape, v.shape[2:], problem.plan.R
        by_queries, by_keys = (problem.tile(f"attention_backward_{side}") for side in ("queries", "keys"))
        query_tiles, key_tiles = triton.cdiv(L, by_queries.rows), triton.cdiv(LK, by_keys.rows)
        query_arguments = problem.arguments(by_queries, grad_out)
        key_arguments = problem.arguments(by_keys, grad_out, of_keys=True)
        bytes_a_head = (L + LK) * (D + DV) * q.element_size() + 4 * (L * D + LK * (D + DV))
        group = heads_together(q.device, B * H, min(query_tiles, key_tiles), bytes_a_head)
        q_sums, k_sums, v_sums = (
            torch.empty((group, *shape), dtype=torch.float32, device=q.device)
            for shape in ((L, D), (LK, D), (LK, DV))
        )
        shared: dict[str, Any] = {"grad_out": grad_out, "lse": lse, "delta": problem.tables.delta}
        shared |= named_strides("grad", grad_out)
        inverse_norms = problem.tables.inverse_norms
        block = rows_a_program(max(D, DV))
        for first in range(0, B * H, group):
            heads = min(group, B * H - first)
            for round_ in range(R):
                launch = {"first_head": first, "round_": round_, "FIRST": round_ == 0}
                attention_backward_queries_kernel[(check_programs(heads * query_tiles),)](
                    **query_arguments, **shared, **launch, q_sums=q_sums
                )
                attention_backward_keys_kernel[(check_programs(heads * key_tiles),)](
                    **key_arguments, **shared, **launch, k_sums=k_sums, v_sums=v_sums
                )
            attention_finish_kernel[(check_programs(heads * triton.cdiv(max(L, LK), block)),)](
                q=q,
                grad_out=grad_out,
                key_bias=q if inputs.key_bias is None else inputs.key_bias,
                inverse_norms=q if inverse_norms is None else inverse_norms,
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
                LK=LK,
                scale=scale,
                SEPARATE=problem.plan.separate,
                NORM=0 if inverse_norms is None else rule.key_norm,
                SHARED=k is None,
                HAS_BIAS=inputs.key_bias is not None,
                EXCLUDE_SELF=rule.exclude_self,
                **head_dims(D, DV),
                ALIGN=alignment(q, grad_out, grad_q, grad_q if grad_k is None else grad_k, grad_v),
                BLOCK=block,
            )
