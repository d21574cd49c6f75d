"""Fuzzed problems of attention as plain values, and how they are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bench.fuzz.values import (
    DTYPES,
    ISAS,
    KERNEL_DTYPES,
    STRIDES,
    VALUES,
    floats,
    head_dims,
    made,
    seeds,
    small_lengths,
    spoiled,
)
from reformer_kernels import LSHConfig
from reformer_kernels.config import KEY_NORMS, local_attention_config
from reformer_kernels.ops.attention.op import LARGEST_KEY_BIAS
from reformer_kernels.rule import AttentionRule
from reformer_kernels.testing import normal

MASKS = ("none", "tail", "some", "rows", "bias", "bias with NaN", "least bias")

SPOILED = ("padding", "head")
"""Kinds of values beside `VALUES`: NaN and infinities in padding rows, or all over the first head, where only
the other heads have a defined result."""


SMALL = ("zeros", "zero rows", "denormal", "integers")
"""Kinds of values whose rows have, or may have, no length."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a call of attention attends over, and on what."""

    B: int = 1
    H: int = 1
    L: int = 8
    key_length: int | None = None  # of keys that are sorted apart from the queries
    D: int = 4
    Dv: int = 4
    mask: str = "none"
    values: str = "normal"
    strides: str = "dense"
    gradient: str = "all"
    dropout_p: float = 0.0
    dtype: str = "float32"
    backend: str = "native"
    isa: str = "none"
    threads: int = 1
    seed: int = 0

    @property
    def keys(self) -> int:
        return self.L if self.key_length is None else self.key_length

    def inputs(self, own_keys: bool) -> list[Tensor]:
        """Leaves q, v and, with `own_keys`, k."""
        sizes = [(self.L, self.D), (self.keys, self.Dv)] + [(self.keys, self.D)] * own_keys
        dtype, tensors = DTYPES[self.dtype], []
        padding = self.padding()
        for n, size in enumerate(sizes):
            kind = "normal" if self.values in SPOILED else self.values
            strides = "dense" if self.values in SPOILED else self.strides
            x = made(self.B, self.H, *size, dtype=dtype, seed=self.seed + n, values=kind, strides=strides)
            read_as_zeros = n > 0 or self.key_length is None  # queries of keys sorted apart have no padding
            if self.values == "padding" and padding is not None and read_as_zeros:
                x = spoiled(x, padding[:, None].expand(x.shape[:3]), self.seed + n)
            if self.values == "head":
                first = torch.zeros(x.shape[:3], dtype=torch.bool)
                first[:1, :1] = normal(1, 1, size[0], seed=self.seed % 2**31) > 1
                x = spoiled(x, first, self.seed + n)
            tensors.append(x.detach().requires_grad_())
        return tensors

    def key_padding_mask(self) -> Tensor | None:
        shape, generator = (self.B, self.keys), torch.Generator().manual_seed(self.seed % 2**31 + 1)
        random = torch.rand(shape, generator=generator)
        match self.mask:
            case "none":
                return None
            case "tail":
                return torch.arange(self.keys) >= (random[:, :1] * (self.keys + 1)).long()
            case "some":
                return random < 0.3
            case "rows":
                return (torch.arange(self.B) % 2 == 0)[:, None].expand(shape)
            case "least bias":
                return torch.where(random < 0.3, torch.finfo(torch.float32).min, 0.0)
        bias = normal(*shape, seed=self.seed % 2**31 + 2, dtype=torch.float32)
        nothing = math.nan if self.mask == "bias with NaN" else -math.inf
        return bias.masked_fill(random < 0.2, nothing)

    def padding(self) -> Tensor | None:
        mask = self.key_padding_mask()
        if mask is None or mask.dtype == torch.bool:
            return mask
        return mask.isnan() | (mask == -math.inf)

    def bias(self) -> Tensor | None:
        """The finite part of the mask, as kernels take it."""
        mask = self.key_padding_mask()
        if mask is None or mask.dtype == torch.bool:
            return None
        return mask.masked_fill(~mask.isfinite(), 0).clamp(-LARGEST_KEY_BIAS, LARGEST_KEY_BIAS)

    def key_bias(self) -> Tensor | None:
        """What the operators take: -inf for padding."""
        padding, bias = self.padding(), self.bias()
        if padding is None:
            return None
        return (torch.zeros(padding.shape) if bias is None else bias).masked_fill(padding, -math.inf)


@dataclass(frozen=True, kw_only=True)
class Function(Problem):
    """A call of a public function of attention."""

    function: str = "lsh_attention"
    config: LSHConfig = field(default_factory=LSHConfig)
    given: str = "seed"  # or "rotations" or "layout"
    own_keys: bool = False  # of `attend`


@dataclass(frozen=True, kw_only=True)
class Band(Problem):
    """A call of `sliding_window_attention`."""

    window: int = 3
    causal: bool = False
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Operator(Problem):
    """A call of an operator of attention, whose layout has random buckets."""

    operator: str = "native_attention"
    rule: AttentionRule
    scale: float = 1.0
    R: int = 1
    n_buckets: int = 4
    own_keys: bool = False


_windows = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 33, 64, 300]))


@st.composite
def configurations(draw: st.DrawFn) -> LSHConfig:
    ring = draw(st.sampled_from(["none", "rounds"]))
    return LSHConfig(
        n_hashes=draw(st.integers(1, 4)),
        chunk_length=draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 31, 64]))),
        chunks_before=draw(st.integers(0, 2)),
        chunks_after=draw(st.integers(0, 2)),
        window=draw(st.sampled_from(["chunks", "chunks", "bucket"])),
        bucket_window=draw(st.one_of(st.none(), _windows)),
        bucket_factors=draw(st.sampled_from([None, None, (2,), (4,), (6,), (2, 4), (8, 2, 2), (64,)])),
        causal=draw(st.booleans()),
        attend_across_buckets=draw(st.booleans()),
        correct_duplicates=draw(st.booleans()),
        ring=ring,
        key_norm=draw(st.sampled_from(KEY_NORMS)),
        scale=draw(st.sampled_from([None, None, 0.0, 0.3, 1.0, 2.0])),
    )


@st.composite
def functions(draw: st.DrawFn, function: str) -> Function:
    config = draw(configurations())
    if function == "local_attention":
        config = local_attention_config(
            config.chunk_length, config.chunks_before, config.chunks_after,
            causal=config.causal, ring=config.ring == "rounds", scale=config.scale,
        )  # fmt: skip
    own = function == "attend" and draw(st.booleans())
    cross = function == "lsh_cross_attention"
    shared = function == "lsh_attention" or (function == "attend" and not own)
    problem = draw(_problems(shared=shared, l2=config.key_norm == "l2"))
    if problem["dtype"] == "float64":
        problem["backend"] = "reference"
    return Function(
        function=function,
        config=config,
        given=draw(st.sampled_from(["seed", "rotations", "layout"])),
        own_keys=own,
        key_length=draw(small_lengths) if cross else None,
        **problem,
    )


@st.composite
def bands(draw: st.DrawFn) -> Band:
    problem = draw(_problems(shared=False, l2=False))
    problem["values"] = draw(st.sampled_from(["normal", "normal", "zeros", "zero rows", "padding"]))
    if problem["mask"] in ("none", "least bias"):
        problem |= {"mask": "none", "values": problem["values"].replace("padding", "normal")}
    if problem["dtype"] == "float64":
        problem["backend"] = "reference"
    return Band(
        window=draw(_windows),
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from([0.0, 0.3, 1.0])),
        **problem,
    )


@st.composite
def operators(draw: st.DrawFn, operator: str) -> Operator:
    by_rank = draw(st.sampled_from([False, False, True]))
    key_length = draw(st.one_of(st.none(), st.none(), small_lengths))
    by_rank = by_rank or key_length is not None
    own = draw(st.booleans()) or key_length is not None
    window = st.one_of(st.integers(0, 9), st.sampled_from([16, 33, 64, 100, 300, 2**24]))
    rule = AttentionRule(
        rank_window=by_rank,
        chunk_length=draw(st.one_of(st.integers(1, 20), st.sampled_from([32, 63, 64, 65, 200]))),
        chunks_before=draw(st.integers(0, 3)),
        chunks_after=draw(st.integers(0, 3)),
        window_before=draw(window),
        window_after=draw(window),
        bucket_mask=(by_rank and key_length is None) or draw(st.booleans()),
        causal=draw(st.booleans()),
        exclude_self=key_length is None and draw(st.booleans()),
        correct_duplicates=draw(st.booleans()),
        ring=not by_rank and draw(st.booleans()),
        key_norm=draw(st.integers(0, len(KEY_NORMS) - 1)),
    )
    problem = draw(_problems(shared=not own, l2=rule.key_norm == 2))
    problem["dtype"] = draw(st.sampled_from(KERNEL_DTYPES))
    if operator == "triton_attention":  # Triton's interpreter is slow
        problem |= {"backend": "triton", "isa": "none", "B": 1, "H": 1, "threads": 1}
        problem |= {name: min(problem[name], 17) for name in ("L", "D", "Dv")}
        key_length = key_length and min(key_length, 17)
    else:
        problem["backend"] = "native"
    return Operator(
        operator=operator,
        rule=rule,
        scale=draw(st.sampled_from([1.0, 0.3, 0.0, 2.0, -1.0])),
        R=draw(st.integers(1, 2 if operator == "triton_attention" else 3)),
        n_buckets=draw(st.sampled_from([1, 2, 3, 5, 30])),
        own_keys=own,
        key_length=key_length,
        **problem,
    )


@st.composite
def _problems(draw: st.DrawFn, shared: bool, l2: bool) -> dict[str, Any]:
    mask = draw(st.sampled_from(MASKS))
    # Gradients through the length of a denormal query-key are beyond every dtype.
    values = [kind for kind in VALUES if not (kind == "denormal" and shared and l2)]
    values += ["head"] + ["padding"] * (mask not in ("none", "least bias"))
    return {
        "B": draw(st.integers(1, 2)),
        "H": draw(st.integers(1, 2)),
        "L": draw(small_lengths),
        "D": draw(head_dims),
        "Dv": draw(head_dims),
        "mask": mask,
        "values": draw(st.sampled_from(["normal"] * 4 + values)),
        "strides": draw(st.sampled_from(STRIDES)),
        "gradient": draw(st.sampled_from(["all", "all", "first", "last", "ones"])),
        "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.99])),
        "dtype": draw(floats),
        "backend": draw(st.sampled_from(["native", "native", "native", "reference"])),
        "isa": draw(st.sampled_from(ISAS)),
        "threads": draw(st.sampled_from([1, 1, 2, 3])),
        "seed": draw(seeds),
    }
