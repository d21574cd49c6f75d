"""Fuzzed calls that must give the same bits on any number of threads: attention and its gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from bench.fuzz.values import DTYPES, ISAS, KERNEL_DTYPES, gradients, made, seeds
from reformer_kernels import LSHConfig
from reformer_kernels import functional as F
from reformer_kernels.testing import isa, normal, torch_threads

THREADS = (1, 2, 3, 4, 7)


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """Native attention of one input, once on each number of `THREADS`."""

    function: str = "lsh_attention"
    config: LSHConfig = field(default_factory=LSHConfig)
    B: int = 1
    H: int = 2
    L: int = 300
    D: int = 8
    padded: bool = False
    dropout_p: float = 0.0
    dtype: str = "float32"
    isa: str = "none"
    seed: int = 0


def check_repeated(case: Repeated) -> None:
    with isa(case.isa):
        first = _results(case, THREADS[0])
        for threads in THREADS[1:]:
            for name, one, other in zip(("out", "q", "v", "k"), first, _results(case, threads), strict=False):
                assert torch.equal(one, other), f"{name} on {threads} threads differs from that on one"


def _results(case: Repeated, threads: int) -> list[Tensor]:
    count = 2 if case.function == "lsh_attention" else 3
    leaves = [
        made(case.B, case.H, case.L, case.D, dtype=DTYPES[case.dtype], seed=case.seed + n).requires_grad_()
        for n in range(count)
    ]
    mask = normal(case.B, case.L, seed=case.seed % 2**31) > 0.8 if case.padded else None
    options = {"key_padding_mask": mask, "dropout_p": case.dropout_p, "seed": case.seed, "backend": "native"}
    with torch_threads(threads):
        match case.function:
            case "lsh_attention":
                out = F.lsh_attention(*leaves, case.config, **options)  # type: ignore[call-overload]
            case "lsh_cross_attention":
                out = F.lsh_cross_attention(*leaves, case.config, **options)  # type: ignore[call-overload]
            case _:
                out = F.local_attention(
                    *leaves, chunk_length=case.config.chunk_length, causal=case.config.causal, **options
                )  # type: ignore[call-overload]
        # The coefficients of this sum are drawn and multiplied by torch, element by element.
        return [out.detach(), *gradients([out], leaves, case.seed, "all")]


@st.composite
def repeated(draw: st.DrawFn) -> Repeated:
    preset = draw(st.sampled_from([LSHConfig.paper, LSHConfig.trax, LSHConfig.lucidrains]))
    return Repeated(
        function=draw(st.sampled_from(["lsh_attention", "lsh_attention", "lsh_cross_attention", "local"])),
        config=preset(
            n_hashes=draw(st.integers(1, 3)),
            chunk_length=draw(st.sampled_from([8, 31, 64])),
            window=draw(st.sampled_from(["chunks", "chunks", "bucket"])),
            causal=draw(st.booleans()),
        ),
        B=draw(st.integers(1, 2)),
        H=draw(st.integers(1, 3)),
        # From about 1,000 tokens on, the backward pass divides a head among threads.
        L=draw(st.sampled_from([65, 300, 1100, 1500, 2300])),
        D=draw(st.sampled_from([1, 4, 8, 16, 33])),
        padded=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3])),
        dtype=draw(st.sampled_from(KERNEL_DTYPES)),
        isa=draw(st.sampled_from(ISAS)),
        seed=draw(seeds),
    )
