"""One benchmark problem: its shape and rules, and the work in it, counted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from reformer_kernels.config import LSHConfig, automatic_factors

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

FORWARD_PRODUCTS = 2
"""Matrix products over the pairs: logits, output."""

BACKWARD_PRODUCTS = 5
"""Matrix products over the pairs: logits again, gradients of p, v, q and k."""


@dataclass(frozen=True)
class Problem:
    """B, H, L, D, rounds, chunk length, causality, dtype and place of one benchmark problem."""

    batch: int = 1
    heads: int = 8
    length: int = 1024
    head_dim: int = 64
    n_hashes: int = 4
    chunk_length: int = 64
    causal: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    backend: str = "auto"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def rows(self) -> int:
        """Vectors in an input: B * H * L."""
        return self.batch * self.heads * self.length

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one (B, H, L, D) tensor."""
        return self.rows * self.head_dim * self.torch_dtype.itemsize

    @property
    def factors(self) -> tuple[int, ...]:
        return automatic_factors(self.length, self.chunk_length)

    def config(self, preset: str) -> LSHConfig:
        """The configuration of a row of the table: "trax", "paper", "lucidrains" or "bucket"."""
        rules: dict[str, Any] = {
            "n_hashes": self.n_hashes,
            "chunk_length": self.chunk_length,
            "causal": self.causal,
        }
        if preset == "bucket":
            return LSHConfig.paper(window="bucket", **rules)
        return {"trax": LSHConfig.trax, "paper": LSHConfig.paper, "lucidrains": LSHConfig.lucidrains}[preset](
            **rules
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Work:
    """Floating-point operations and compulsory bytes of one call; None where a rate would say nothing."""

    forward_flops: float | None = None
    backward_flops: float | None = None
    forward_bytes: float | None = None

    def flops(self, phase: str) -> float | None:
        if self.forward_flops is None:
            return None
        if phase == "forward":
            return self.forward_flops
        if self.backward_flops is None:
            return None
        return self.backward_flops + (self.forward_flops if phase == "forward+backward" else 0.0)

    def bytes(self, phase: str) -> float | None:
        return self.forward_bytes if phase == "forward" else None


def attention_work(problem: Problem, config: LSHConfig) -> Work:
    """Work of the attention over a layout.

    FLOPs are those of dense tile pairs: every query meets every key of its chunk and its chunks before and
    after (window "bucket": its w keys), masked or not. Bytes: each round reads q and v once, and out is
    written once.
    """
    chunk = min(config.chunk_length, problem.length)
    keys = chunk * (1 + config.chunks_before + config.chunks_after)
    if config.window == "bucket" and config.bucket_window is not None:
        keys = config.bucket_window
    rounds = 1 if config.window == "chunks" and problem.length <= config.chunk_length else config.n_hashes
    pairs = problem.rows * rounds * min(keys, problem.length)
    product = 2.0 * pairs * problem.head_dim
    return Work(
        FORWARD_PRODUCTS * product,
        BACKWARD_PRODUCTS * product,
        problem.tensor_bytes * (2.0 * rounds + 1),
    )


def full_attention_work(problem: Problem) -> Work:
    """Work of full attention: L * L pairs, half of them where causal."""
    pairs = problem.rows * problem.length * (0.5 if problem.causal else 1.0)
    product = 2.0 * pairs * problem.head_dim
    return Work(FORWARD_PRODUCTS * product, BACKWARD_PRODUCTS * product, 4.0 * problem.tensor_bytes)


def hash_work(problem: Problem) -> Work:
    """Work of hashing: x times half the factors' sum of columns a round; reads x, writes int32 ids."""
    columns = problem.n_hashes * sum(problem.factors) / 2
    return Work(
        2.0 * problem.rows * problem.head_dim * columns, None, problem.tensor_bytes + id_bytes(problem)
    )


def sort_work(problem: Problem) -> Work:
    """Work of the bucket sort: reads the ids, writes the order."""
    return Work(None, None, 2.0 * id_bytes(problem))


def id_bytes(problem: Problem) -> float:
    return 4.0 * problem.rows * problem.n_hashes


def lsh_work(problem: Problem, config: LSHConfig) -> Work:
    """Work of the whole call: the attention's FLOPs alone (hashing is overhead to it), all parts' bytes."""
    attention = attention_work(problem, config)
    parts = [work.forward_bytes for work in (attention, hash_work(problem), sort_work(problem))]
    return dataclasses.replace(attention, forward_bytes=sum(part for part in parts if part is not None))
