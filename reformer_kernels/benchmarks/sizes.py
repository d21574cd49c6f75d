"""The sizes, rules, dtype and device of one benchmark row, and the work that attention of that size takes."""

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
"""Matrix products over the query-key pairs in a forward pass: the logits and the output."""

BACKWARD_PRODUCTS = 5
"""Matrix products over the pairs in a backward pass: the logits again, and the gradients of p, v, q and k."""


@dataclass(frozen=True)
class Sizes:
    """What one row of a benchmark runs on. Fields that an operation has no use for keep their default."""

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
    width: int = 0
    """Size of the hidden states."""
    layers: int = 0
    d_ff: int = 0
    """Size of a feed-forward layer's inner activations."""
    vocabulary: int = 0
    variant: str = ""
    """Which form of the operation, such as "gelu" of a feed-forward layer."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def rows(self) -> int:
        """Number of vectors in an input, B * H * L."""
        return self.batch * self.heads * self.length

    @property
    def tensor_bytes(self) -> int:
        """Bytes of one (B, H, L, D) tensor."""
        return self.rows * self.head_dim * self.torch_dtype.itemsize

    @property
    def factors(self) -> tuple[int, ...]:
        """The bucket factors that are chosen automatically for this length and chunk length."""
        return automatic_factors(self.length, self.chunk_length)

    def config(self, preset: str) -> LSHConfig:
        """The rule of a row of the table; preset is "trax", "paper", "lucidrains" or "bucket"."""
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
    """Floating-point operations of one call, and the bytes that it must read and write.

    None stands where a rate would say nothing.
    """

    forward_flops: float | None = None
    backward_flops: float | None = None
    forward_bytes: float | None = None

    def flops(self, phase: str) -> float | None:
        if self.forward_flops is None or phase == "forward":
            return self.forward_flops
        if self.backward_flops is None:
            return None
        return self.backward_flops + (self.forward_flops if phase == "forward+backward" else 0.0)

    def bytes(self, phase: str) -> float | None:
        return self.forward_bytes if phase == "forward" else None


def attention_work(sizes: Sizes, config: LSHConfig) -> Work:
    """The work of attention over a given layout.

    FLOPs count dense pairs of tiles: every query meets every key of its chunk and of the chunks before and
    after it, masked or not (with window "bucket": its w keys). Bytes assume that each round reads q and v
    once and that the output is written once.
    """
    chunk = min(config.chunk_length, sizes.length)
    keys = chunk * (1 + config.chunks_before + config.chunks_after)
    if config.window == "bucket" and config.bucket_window is not None:
        keys = config.bucket_window
    rounds = 1 if config.window == "chunks" and sizes.length <= config.chunk_length else config.n_hashes
    pairs = sizes.rows * rounds * min(keys, sizes.length)
    product = 2.0 * pairs * sizes.head_dim
    return Work(
        FORWARD_PRODUCTS * product,
        BACKWARD_PRODUCTS * product,
        sizes.tensor_bytes * (2.0 * rounds + 1),
    )


def full_attention_work(sizes: Sizes) -> Work:
    """The work of full attention: L * L pairs, half of them with a causal mask."""
    pairs = sizes.rows * sizes.length * (0.5 if sizes.causal else 1.0)
    product = 2.0 * pairs * sizes.head_dim
    return Work(FORWARD_PRODUCTS * product, BACKWARD_PRODUCTS * product, 4.0 * sizes.tensor_bytes)


def hash_work(sizes: Sizes) -> Work:
    """The work of hashing: a product with sum(factors) / 2 columns a round; x is read, int32 ids written."""
    columns = sizes.n_hashes * sum(sizes.factors) / 2
    return Work(2.0 * sizes.rows * sizes.head_dim * columns, None, sizes.tensor_bytes + id_bytes(sizes))


def sort_work(sizes: Sizes) -> Work:
    """The work of the bucket sort: the ids are read and the order is written."""
    return Work(None, None, 2.0 * id_bytes(sizes))


def id_bytes(sizes: Sizes) -> float:
    """Bytes of the int32 bucket ids (B, H, R, L)."""
    return 4.0 * sizes.rows * sizes.n_hashes


def lsh_work(sizes: Sizes, config: LSHConfig) -> Work:
    """The work of the whole call: FLOPs of the attention alone (hashing is overhead), bytes of all parts."""
    attention = attention_work(sizes, config)
    parts = [work.forward_bytes for work in (attention, hash_work(sizes), sort_work(sizes))]
    return dataclasses.replace(attention, forward_bytes=sum(part for part in parts if part is not None))
