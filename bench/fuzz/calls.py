"""Calls of every operator with arguments that fit, to be spoiled: by sizes of 0, or by `malformed`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import reformer_kernels.functional
from reformer_kernels.call import cross_attention_rule, self_attention_rule
from reformer_kernels.config import LSHConfig
from reformer_kernels.rule import AttentionRule

assert reformer_kernels.functional is not None  # importing it defines the operators

SIZES = {"B": 1, "H": 2, "L": 8, "K": 8, "D": 4, "V": 4, "R": 2, "S": 3, "C": 5}
"""Batch, heads, queries, keys, head dimension, values' dimension, rounds, bucket starts, classes."""


def floats(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def longs(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def attention_arguments(n: dict[str, int], rule: AttentionRule, separate: bool) -> tuple[Any, ...]:
    B, H, L, K, D, V, R, S = (n[name] for name in "BHLKDVRS")
    keys = K if separate else L
    own = (ints(B, H, R, K), ints(B, H, R, S)) if separate else (None, None)
    return (
        floats(B, H, L, D),
        floats(B, H, keys, D) if separate else None,
        floats(B, H, keys, V),
        torch.arange(L, dtype=torch.int32).expand(B, H, R, L),
        (torch.arange(S) * L // max(1, S - 1)).int().expand(B, H, R, S),
        floats(B, keys),
        None,
        list(rule),
        1.0,
        0.0,
        *own,
    )


def attention_calls(n: dict[str, int]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    out, lse = floats(n["B"], n["H"], n["L"], n["V"]), floats(n["B"], n["H"], n["L"])
    config = LSHConfig(chunk_length=4)
    self_rule, cross_rule = self_attention_rule(config, 8), cross_attention_rule(config, 8)
    for rule, separate in (
        (self_rule, False),
        (self_rule._replace(ring=True), False),
        (self_rule._replace(chunk_length=0), False),
        (cross_rule, True),
    ):
        arguments = attention_arguments(n, rule, separate)
        for kind in ("native", "triton"):
            yield f"{kind}_attention", arguments
            yield f"{kind}_attention_backward", (out, lse, out, lse, *arguments)


def other_calls(n: dict[str, int]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    B, H, L, D, R, C = (n[name] for name in "BHLDRC")
    for kind in ("native", "triton"):
        yield f"{kind}_sample_rotations", (torch.tensor(0), H, D, R, C)
        for factors, span, length in (([4], 0, None), ([], 4, None), ([], 4, 0), ([], 0, 0)):
            x, rotations = floats(B, H, L, D), floats(H, D, R, 8)
            yield (
                f"{kind}_lsh_hash",
                (x, rotations, factors, span, torch.zeros(B, L, dtype=torch.bool), length),
            )
            yield f"{kind}_lsh_hash", (x, None, factors, span, None, length, torch.tensor(0), R)
        for norm in ("none", "layer", "rms"):
            stream = floats(B, L, C)
            step = (stream, floats(B, L, C), 1, None, None, torch.float32, norm, None, None, 1e-5)
            yield f"{kind}_residual_step", step
    for buckets, starts in ((2, 3), (0, 1), (2, 0), (0, 0)):
        for kind in ("native", "triton"):
            yield f"{kind}_bucket_sort", (ints(B, H, R, L), buckets, starts)
    x, weight, target = floats(L, D), floats(C, D), longs(L)
    for chunk in (4, 0):
        loss = (x, weight, target, floats(C), None, -100, 0.0, 0.0, chunk)
        yield "linear_cross_entropy_sum", (*loss, [True, True, True])
        yield "linear_cross_entropy_rows", loss
        yield "linear_cross_entropy_rows_backward", (floats(L), *loss, [True, True, True])
        w1, w2 = floats(C, D), floats(D, C)
        rest = (None, "gelu", 0.0, chunk)
        yield "chunked_feed_forward", (floats(L, D), w1, floats(C), w2, floats(D), *rest)
        needs = [True] * 5
        yield "chunked_feed_forward_backward", (floats(L, D), floats(L, D), w1, floats(C), w2, *rest, needs)
    yield "linear_cross_entropy_scale", (floats(L, D), torch.tensor(1.0), x, torch.float32)


def operator_names() -> set[str]:
    """The operators that the package defines."""
    return {
        schema.name.split("::")[1]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("reformer_kernels::")
    }
