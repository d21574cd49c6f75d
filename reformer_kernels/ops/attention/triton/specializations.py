"""Every Triton kernel of attention, described as its launcher compiles it: see `gpu.specializations`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from reformer_kernels.gpu.presets import PRESETS
from reformer_kernels.gpu.specializations import TRITON_TYPES, Specialization
from reformer_kernels.gpu.tiles import Tile, padded_head_dim, tile
from reformer_kernels.ops.attention.triton.backward import (
    BACKWARD_INTEGERS,
    attention_backward_keys_kernel,
    attention_backward_queries_kernel,
)
from reformer_kernels.ops.attention.triton.forward import FORWARD_INTEGERS, attention_forward_kernel
from reformer_kernels.ops.attention.triton.launch import TABLE_BLOCK, rows_a_program
from reformer_kernels.ops.attention.triton.plan import NO_BUCKETS, head_dims, make_plan, precision
from reformer_kernels.ops.attention.triton.rowwise import (
    FINISH_INTEGERS,
    ROW_INTEGERS,
    attention_finish_kernel,
    attention_rows_kernel,
)
from reformer_kernels.ops.attention.triton.tables import (
    CURSOR_INTEGERS,
    TABLE_INTEGERS,
    attention_cursors_kernel,
    attention_tables_kernel,
)

TILED = {
    "attention_forward": attention_forward_kernel,
    "attention_backward_queries": attention_backward_queries_kernel,
    "attention_backward_keys": attention_backward_keys_kernel,
}
"""The kernels that have rows in the table of tiles."""

PRODUCTS = {"attention_forward": 2, "attention_backward_queries": 3, "attention_backward_keys": 4}
"""How many matrix products a kernel computes over its pairs."""

LENGTH, CHUNK_LENGTH = 4096, 64
"""The tokens and the chunk length for which kernels are described. Others have the same constants."""

_ROW_TENSORS = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
_FLOAT_TENSORS = (
    "lse",
    "delta",
    "inverse_norms",
    "key_bias",
    "running",
    "q_sums",
    "k_sums",
    "v_sums",
    "grad_lse",
)
_INT_TENSORS = (
    *("order", "starts", "key_order", "key_starts", "rank_buckets", "codes", "key_codes"),
    *("lows", "highs", "cursors"),
)


def specializations(
    *,
    architecture: str,
    dtype: torch.dtype,
    head_dim: int,
    options: str,
    tiles: Mapping[str, Tile],
    preset: str,
    rounds: int,
) -> list[Specialization]:
    """The kernels for tensors of `dtype` and `head_dim`: see `gpu.specializations`.

    With options "off" there is no padding and no dropout; with "all" there are both, and a gradient of the
    log-sum-exp. Of several rounds, "off" takes a middle one and "all" the last one.
    """
    kind, everything = PRESETS[preset], options == "all"
    rounds = kind.rounds(rounds)
    rule, starts = kind.rule(LENGTH, CHUNK_LENGTH), kind.buckets(LENGTH, CHUNK_LENGTH) + 2
    plan = make_plan(rule, rounds, LENGTH, LENGTH, starts, separate=kind.keys == "apart")
    norm = rule.key_norm if kind.keys == "shared" else 0
    pointers = {
        **dict.fromkeys(_ROW_TENSORS, "*" + TRITON_TYPES[dtype]),
        **dict.fromkeys(_FLOAT_TENSORS, "*fp32"),
        **dict.fromkeys(_INT_TENSORS, "*i32"),
        "seed": "*i64",
    }
    sizes = {**head_dims(head_dim, head_dim), "ALIGN": 16 // dtype.itemsize}
    flags = {"NORM": norm, "HAS_BIAS": everything}

    def specialization(kernel: Any, name: str, integers: tuple[str, ...], chosen: Tile | None, **values: Any):  # type: ignore[no-untyped-def]
        names = [name for name in kernel.arg_names if name not in values]
        types = dict.fromkeys(integers, "i32") | dict.fromkeys(("scale", "keep_scale"), "fp32") | pointers
        return Specialization(
            kernel=kernel,
            name=name,
            signature={name: types[name] for name in names},
            constexprs=values,
            tile=chosen,
            architecture=architecture,
            dtype=dtype,
            head_dim=head_dim,
            options=options,
            preset=preset,
            rounds=rounds,
            products=PRODUCTS.get(name, 0),
            divisible=tuple(name for name in names if name in pointers),
            multiplies=chosen is not None and (dtype != torch.float32 or values["PRECISION"] == "tf32"),
            gathers=any(name in _ROW_TENSORS for name in names),
        )

    listed = []
    for name, kernel in TILED.items():
        chosen = tiles.get(name) or tile(
            name, architecture=architecture, bits=8 * dtype.itemsize, head_dim=head_dim
        )
        place: dict[str, bool] = {"FIRST": rounds == 1}
        integers: tuple[str, ...] = BACKWARD_INTEGERS
        if kernel is attention_forward_kernel:
            place["LAST"] = rounds == 1 or everything
            integers = FORWARD_INTEGERS
        constants = {
            **plan.constants(chosen),
            "DROPOUT": everything,
            "PRECISION": precision(dtype),
            "DIMS": min(chosen.dims, padded_head_dim(head_dim)),
        }
        listed.append(specialization(kernel, name, integers, chosen, **place, **constants, **flags, **sizes))
    block = rows_a_program(head_dim)
    codes = {"CODES": rule.correct_duplicates and plan.meets_again, "BLOCK": TABLE_BLOCK}
    if plan.separate:
        for keys in (False, True):
            cursors = {"KEYS": keys, "CAUSAL": rule.causal, "BUCKETS": rule.bucket_mask, **codes}
            name = f"attention_cursors_of_{'keys' if keys else 'queries'}"
            listed.append(specialization(attention_cursors_kernel, name, CURSOR_INTEGERS, None, **cursors))
    elif plan.buckets != NO_BUCKETS or codes["CODES"]:
        tables = {"RANK_WINDOW": plan.rank_window, "BUCKETS": plan.buckets != NO_BUCKETS, **codes}
        listed.append(
            specialization(attention_tables_kernel, "attention_tables", TABLE_INTEGERS, None, **tables)
        )
    rows = {"NORM": norm, "DELTA": True, "HAS_GRAD_LSE": everything, "BLOCK": block, **sizes}
    listed.append(specialization(attention_rows_kernel, "attention_rows", ROW_INTEGERS, None, **rows))
    finish = {"SEPARATE": plan.separate, "SHARED": kind.keys == "shared", "BLOCK": block}
    finish |= {"EXCLUDE_SELF": rule.exclude_self, **flags, **sizes}
    listed.append(
        specialization(attention_finish_kernel, "attention_finish", FINISH_INTEGERS, None, **finish)
    )
    return listed
