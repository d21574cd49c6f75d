"""Every Triton kernel of attention, described as its launcher compiles it: see `gpu.specializations`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from reformer_kernels.gpu.specializations import TRITON_TYPES, Specialization
from reformer_kernels.gpu.tiles import Tile, padded_head_dim, tile
from reformer_kernels.ops.attention.triton.backward import (
    BACKWARD_INTEGERS,
    attention_backward_keys_kernel,
    attention_backward_queries_kernel,
)
from reformer_kernels.ops.attention.triton.forward import FORWARD_INTEGERS, attention_forward_kernel
from reformer_kernels.ops.attention.triton.launch import TABLE_BLOCK, rows_a_program
from reformer_kernels.ops.attention.triton.plan import INSIDE_BUCKET, NO_BUCKETS, head_dims, precision
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
    *, architecture: str, dtype: torch.dtype, head_dim: int, options: str, tiles: Mapping[str, Tile]
) -> list[Specialization]:
    """The kernels for tensors of `dtype` and `head_dim`: see `gpu.specializations`.

    With options "off" they do one round of local attention with separate keys and no mask; with "all" a
    middle round of causal LSH attention inside buckets that corrects duplicates, with key bias and dropout.
    """
    everything = options == "all"
    pointers = {
        **dict.fromkeys(_ROW_TENSORS, "*" + TRITON_TYPES[dtype]),
        **dict.fromkeys(_FLOAT_TENSORS, "*fp32"),
        **dict.fromkeys(_INT_TENSORS, "*i32"),
        "seed": "*i64",
    }
    sizes = {**head_dims(head_dim, head_dim), "ALIGN": 16 // dtype.itemsize}
    flags = {"NORM": int(everything), "HAS_BIAS": everything, "EXCLUDE_SELF": everything}

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
            divisible=tuple(name for name in names if name in pointers),
            multiplies=chosen is not None and (dtype != torch.float32 or values["PRECISION"] == "tf32"),
            gathers=any(name in _ROW_TENSORS for name in names),
        )

    listed = []
    for name, kernel in TILED.items():
        chosen = tiles.get(name) or tile(
            name, architecture=architecture, bits=8 * dtype.itemsize, head_dim=head_dim
        )
        rounds = {"FIRST": not everything}
        integers: tuple[str, ...] = BACKWARD_INTEGERS
        if kernel is attention_forward_kernel:
            rounds["LAST"] = not everything
            integers = FORWARD_INTEGERS
        constants = {
            "SEPARATE": False,
            "RANK_WINDOW": False,
            "RING": False,
            "BUCKETS": INSIDE_BUCKET if everything else NO_BUCKETS,
            "UNIFORM": not everything,
            "CAUSAL": everything,
            "DUPLICATES": everything,
            "DROPOUT": everything,
            "PRECISION": precision(dtype),
            "M": chosen.rows,
            "N": chosen.keys,
            "DIMS": min(chosen.dims, padded_head_dim(head_dim)),
        }
        listed.append(specialization(kernel, name, integers, chosen, **rounds, **constants, **flags, **sizes))
    block = rows_a_program(head_dim)
    tables = {"RANK_WINDOW": False, "BUCKETS": everything, "CODES": True, "BLOCK": TABLE_BLOCK}
    listed.append(specialization(attention_tables_kernel, "attention_tables", TABLE_INTEGERS, None, **tables))
    for keys in (False, True):
        cursors = {
            "KEYS": keys,
            "CAUSAL": everything,
            "BUCKETS": everything,
            "CODES": True,
            "BLOCK": TABLE_BLOCK,
        }
        name = f"attention_cursors_of_{'keys' if keys else 'queries'}"
        listed.append(specialization(attention_cursors_kernel, name, CURSOR_INTEGERS, None, **cursors))
    rows = {"NORM": int(everything), "DELTA": True, "HAS_GRAD_LSE": everything, "BLOCK": block, **sizes}
    listed.append(specialization(attention_rows_kernel, "attention_rows", ROW_INTEGERS, None, **rows))
    finish = {"SEPARATE": False, "SHARED": everything, "BLOCK": block, **flags, **sizes}
    listed.append(
        specialization(attention_finish_kernel, "attention_finish", FINISH_INTEGERS, None, **finish)
    )
    return listed
