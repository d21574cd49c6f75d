"""Malformed calls: each operator and public function gets arguments that fit, of which some are then spoiled.

A call must return or raise one of `REFUSALS` with a message. It must never end the process; under the address
sanitizer it must not read a byte that is not its own either.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bench.fuzz.calls import SIZES, attention_calls, other_calls
from reformer_kernels import Layout, LSHConfig
from reformer_kernels import functional as F
from reformer_kernels.testing import normal

REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, OverflowError, MemoryError)
"""What a refusal may be. ZeroDivisionError, AttributeError, AssertionError and the like are faults."""

MEMORY = 8 * 2**30
"""Bytes that a call may ask for before memory ends, so that huge sizes do not end the machine."""


@dataclass(frozen=True, kw_only=True)
class Malformed:
    """The `number`-th call of an operator or function, and what is done to which of its arguments."""

    call: str
    number: int = 0
    changes: tuple[tuple[int, str], ...] = ()
    seed: int = 0


def check_malformed(case: Malformed) -> None:
    function, arguments = valid_calls()[case.call][case.number]
    given = list(arguments)
    for place, change in case.changes:
        place %= len(given)
        changed = _changed(given[place], change, case)
        if changed is None and case.call.startswith("operator ") and isinstance(arguments[place], Tensor):
            continue  # torch takes None for a tensor that is required, and hands it on
        given[place] = changed
    try:
        with _limited_memory():
            function(*given)
    except REFUSALS as refusal:
        message = str(refusal)
    else:
        return
    assert message, "refused without a message"
    # Torch's fallback for negated views fails so for every operator that changes an argument (seen in 2.14).
    assert "INTERNAL ASSERT" not in message or "MathBitsFallback" in message, message


def valid_calls() -> dict[str, list[tuple[Callable[..., Any], tuple[Any, ...]]]]:
    """By name: the calls of an operator or function whose arguments fit."""
    calls: dict[str, list[tuple[Callable[..., Any], tuple[Any, ...]]]] = {}
    for make in (attention_calls, other_calls):
        for name, arguments in make(SIZES):
            operator = getattr(torch.ops.reformer_kernels, name)
            calls.setdefault(f"operator {name}", []).append((operator, arguments))
    for name, function, arguments in _functions():
        calls.setdefault(name, []).append((function, arguments))
    return calls


def _functions() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Public functions, their keyword arguments given by place."""
    q, k, v = (normal(1, 2, 8, 4, dtype=torch.float32, seed=n) for n in range(3))
    config, mask, seed = LSHConfig(n_hashes=2, chunk_length=4), torch.zeros(1, 8, dtype=torch.bool), 3
    rotations = F.sample_rotations(config, 2, 4, seed)
    layout = F.lsh_layout(q, config, seed=seed)
    options = ("key_padding_mask", "dropout_p", "seed", "backend", "return_lse")

    def by_place(function: Callable[..., Any], count: int, *names: str) -> Callable[..., Any]:
        return lambda *given: function(*given[:count], **dict(zip(names, given[count:], strict=True)))

    rest = (mask, 0.1, seed, "auto", True)
    for backend in ("auto", "reference"):
        rest = (mask, 0.1, seed, backend, True)
        yield "attend", by_place(F.attend, 4, "k", *options), (q, v, layout, config, k, *rest)
        lsh = by_place(F.lsh_attention, 3, "rotations", *options)
        yield "lsh_attention", lsh, (q, v, config, rotations, *rest)
        cross = by_place(F.lsh_cross_attention, 4, "rotations", *options)
        yield "lsh_cross_attention", cross, (q, k, v, config, rotations, *rest)
        local = ("chunk_length", "chunks_before", "chunks_after", "causal", "ring", "scale", *options)
        by_position = by_place(F.local_attention, 3, *local)
        yield "local_attention", by_position, (q, k, v, 4, 1, 0, True, False, 1.0, *rest)
        band = by_place(F.sliding_window_attention, 4, "causal", "scale", *options[:-1])
        yield "sliding_window_attention", band, (q, k, v, 3, True, 1.0, *rest[:-1])
        yield "lsh_hash", F.lsh_hash, (q, rotations, [4], mask, backend)
        yield "bucket_sort", F.bucket_sort, (torch.zeros(2, 8, dtype=torch.int32), 4, backend)
        places = ("rotations", "seed", "key_padding_mask", "backend")
        yield "lsh_layout", by_place(F.lsh_layout, 2, *places), (q, config, rotations, seed, mask, backend)
        pair = by_place(F.lsh_cross_layout, 3, *places)
        yield "lsh_cross_layout", pair, (q, k, config, rotations, seed, mask, backend)
    yield "sample_rotations", F.sample_rotations, (config, 2, 4, seed)
    w1, w2, bias = normal(8, 4).float(), normal(4, 8).float(), normal(8).float()
    hidden = ("activation", "dropout_p", "seed", "chunk_size", "memory_budget")
    yield (
        "chunked_feed_forward",
        by_place(F.chunked_feed_forward, 5, *hidden),
        (q[0], w1, bias, w2, None, "gelu", 0.1, seed, 3, None),
    )
    loss = ("class_weights", "ignore_index", "label_smoothing", "z_loss", "reduction", *hidden[3:])
    yield (
        "linear_cross_entropy",
        by_place(F.linear_cross_entropy, 4, *loss),
        (q[0], w1, torch.zeros(2, 8, dtype=torch.int64), bias, bias.abs(), -100, 0.1, 0.1, "mean", 3, None),
    )


INTEGERS = (-1, 0, 1, 3, 2**31, 2**40, 2**63 - 1, -(2**63), 2**70)
NUMBERS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1.0, 1e300, 1e-300)
TENSOR_CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "one dimension more": lambda x: x[None],
    "one dimension less": lambda x: x[0] if x.dim() and len(x) else x.new_zeros(x.shape[1:]),
    "flat": lambda x: x.reshape(-1),
    "scalar": lambda x: x.reshape(-1)[:1].reshape(()) if x.numel() else x,
    "first dimension 0": lambda x: x[:0] if x.dim() else x,
    "last dimension 0": lambda x: x[..., :0] if x.dim() else x,
    "middle dimension 0": lambda x: x.narrow(x.dim() // 2, 0, 0) if x.dim() else x,
    "shorter": lambda x: x[..., :-1] if x.dim() else x,
    "longer": lambda x: torch.cat([x, x], -1) if x.dim() else x,
    "twice the rows": lambda x: torch.cat([x, x], -2) if x.dim() > 1 else x,
    "more heads": lambda x: torch.cat([x, x], 1) if x.dim() > 2 else x,
    "transposed": lambda x: x.mT if x.dim() > 1 else x,
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "huge": lambda x: x[:1].expand(2**40, *x.shape[1:]) if x.dim() else x,
    "wide": lambda x: x[..., :1].expand(*x.shape[:-1], 2**40) if x.dim() else x,
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "int64": lambda x: x.long(),
    "int32": lambda x: x.int(),
    "uint8": lambda x: x.to(torch.uint8),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "negated view": lambda x: torch._neg_view(x) if x.is_floating_point() else x,
    "requires grad": lambda x: x.detach().requires_grad_() if x.is_floating_point() else x,
    "parameter": lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x,
    "NaN": lambda x: torch.full_like(x, math.nan) if x.is_floating_point() else x,
    "infinite": lambda x: torch.full_like(x, -math.inf) if x.is_floating_point() else x,
    "largest": lambda x: _full(x, 1),
    "least": lambda x: _full(x, 0),
    "zeros": torch.zeros_like,
    "reversed": lambda x: x.flip(-1) if x.dim() else x,
}
OTHERS: tuple[Any, ...] = (None, "", "nonsense", (), [], {}, True, 1, 2.5, object, torch.float32)
CHANGES = (
    *(f"tensor {name}" for name in TENSOR_CHANGES),
    *(f"integer {n}" for n in range(len(INTEGERS))),
    *(f"number {n}" for n in range(len(NUMBERS))),
    *(f"other {n}" for n in range(len(OTHERS))),
)


def _full(x: Tensor, end: int) -> Tensor:
    if x.dtype == torch.bool:
        return torch.full_like(x, bool(end))
    limits: Any = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
    return torch.full_like(x, limits.max if end else limits.min)


def _changed(x: Any, change: str, case: Malformed) -> Any:
    """`x` spoiled as `change` says where that kind of change suits it, else another thing."""
    kind, _, what = change.partition(" ")
    seed = case.seed
    if isinstance(x, Layout):
        order = _changed(x.order, change, case) if seed & 1 else x.order
        starts = _changed(x.bucket_starts, change, case) if seed & 2 else x.bucket_starts
        return Layout(order, starts) if kind == "tensor" else _other(change)
    if isinstance(x, Tensor) and kind == "tensor":
        try:
            return TENSOR_CHANGES[what](x)
        except RuntimeError:  # of a tensor that an earlier change made
            return x
    if isinstance(x, list) and kind != "other":
        x = list(x)
        where = seed % max(1, len(x))
        match seed % 4:
            case 0:
                return x[:where]
            case 1:
                return x + x[:1]
        return [*x[:where], _other(change), *x[where + 1 :]] if kind != "tensor" else x[::-1]
    return _other(change) if kind != "tensor" else x


def _other(change: str) -> Any:
    kind, _, what = change.partition(" ")
    if kind == "tensor":
        return torch.zeros(1)
    return {"integer": INTEGERS, "number": NUMBERS, "other": OTHERS}[kind][int(what)]


@contextmanager
def _limited_memory() -> Iterator[None]:
    """At most `MEMORY` more of address space. A sanitizer maps far more, and has a limit of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if used > 2**40:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@st.composite
def malformed(draw: st.DrawFn, operators: bool) -> Malformed:
    names = [name for name in sorted(valid_calls()) if name.startswith("operator ") == operators]
    name = draw(st.sampled_from(names))
    calls = valid_calls()[name]
    number = draw(st.integers(0, len(calls) - 1))
    places = st.integers(0, len(calls[number][1]) - 1)
    changes = st.lists(st.tuples(places, st.sampled_from(CHANGES)), min_size=1, max_size=3)
    return Malformed(call=name, number=number, changes=tuple(draw(changes)), seed=draw(st.integers(0, 15)))
