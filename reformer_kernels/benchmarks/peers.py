"""The peers as callables on the same tensors: torch SDPA and its back ends, Hugging Face, reformer_pytorch.

Each is timed on the attention alone. Hugging Face's layer includes its projections, so they are replaced by
modules that hand over prepared queries and values; everything after them is its own code, unchanged.
A peer's package is imported only when that peer is used.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from reformer_kernels.benchmarks.machine import version_of
from reformer_kernels.benchmarks.sizes import Sizes


@dataclass(frozen=True)
class Peer:
    key: str
    title: str
    package: str
    module: str
    preset: str | None
    """Our preset that computes the same; None for full attention."""
    device: str | None = None
    """The only kind of device that it is compared on; None for any."""

    @property
    def install_command(self) -> str:
        return f"pip install {self.package}"

    def missing(self) -> str | None:
        """Why the peer cannot run, with the command that installs it; None where it can run."""
        if version_of(self.package) is None:
            return f"{self.title} is not installed; install it with: {self.install_command}"
        try:
            importlib.import_module(self.module)
        except Exception as error:  # whatever a broken installation raises belongs in the message
            reason = f"{type(error).__name__}: {error}"
            return f"{self.title} does not import ({reason}); try: {self.install_command} -U"
        return None


FULL_ATTENTION = {"sdpa": "torch SDPA", "flash": "SDPA flash", "cudnn": "SDPA cuDNN"}
"""Peers that compute full attention: torch's own choice, and its back ends for NVIDIA GPUs by name."""

_SDPA_BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}

PEERS = {
    "sdpa": Peer("sdpa", "torch SDPA", "torch", "torch.nn.functional", None),
    "flash": Peer("flash", "SDPA flash", "torch", "torch.nn.attention", None, device="cuda"),
    "cudnn": Peer("cudnn", "SDPA cuDNN", "torch", "torch.nn.attention", None, device="cuda"),
    "hf": Peer(
        "hf", "Hugging Face", "transformers", "transformers.models.reformer.modeling_reformer", "trax"
    ),
    "lucidrains": Peer(
        "lucidrains", "reformer_pytorch", "reformer-pytorch", "reformer_pytorch", "lucidrains"
    ),
}


class PeerRefusesError(Exception):
    """A peer is installed but cannot run these sizes; the message says why."""


def need_multiple(title: str, length: int, of: int, what: str) -> None:
    """Raises PeerRefusesError where the length is not a multiple of `of`, which `what` names."""
    if length % of:
        raise PeerRefusesError(f"{title} needs a length that is a multiple of {what} ({of}), got {length}")


def axial_shape(length: int) -> tuple[int, int]:
    """The most nearly square shape with `length` elements, for axial position embeddings."""
    rows = max(d for d in range(1, math.isqrt(length) + 1) if length % d == 0)
    return rows, length // rows


@contextmanager
def own_generator(seed: int | None) -> Iterator[None]:
    """Both Reformer peers draw rotations from torch's global generator: let them, and restore it after."""
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the warning that transformers gives whenever it chooses the number of buckets."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class FullAttention:
    """`scaled_dot_product_attention`, with torch's choice of back end or the one named.

    Raises:
        PeerRefusesError: the back end cannot run such tensors.
    """

    def __init__(self, name: str, sizes: Sizes) -> None:
        self.causal = sizes.causal
        self.backend = _SDPA_BACKENDS.get(name)
        if self.backend is None:
            return
        shape = (1, 1, 16, sizes.head_dim)
        row = torch.zeros(shape, dtype=sizes.torch_dtype, device=sizes.device, requires_grad=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # torch warns of each back end's reason; the error says enough
                self.attend(row, row, row).sum().backward()
        except RuntimeError as error:
            raise PeerRefusesError(
                f"{name} cannot take {sizes.dtype} with heads of {sizes.head_dim} on {sizes.device} "
                f"({str(error).splitlines()[0]})"
            ) from error

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k and v (B, H, L, D)."""
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class _Prepared(nn.Module):
    """Stands in a projection's place and returns a prepared tensor."""

    output: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.output


class HuggingFace:
    """transformers' LSHSelfAttention without its projections, with its own choice of buckets.

    qk and v are (B, L, H * D), as its projections would write them.
    """

    def __init__(self, sizes: Sizes) -> None:
        if sizes.length > sizes.chunk_length:
            need_multiple("Hugging Face's layer", sizes.length, sizes.chunk_length, "the chunk length")
        from transformers import ReformerConfig
        from transformers.models.reformer import modeling_reformer

        self.sizes = sizes
        config = ReformerConfig(
            hidden_size=sizes.heads * sizes.head_dim,
            num_attention_heads=sizes.heads,
            attention_head_size=sizes.head_dim,
            attn_layers=["lsh"],
            lsh_attn_chunk_length=sizes.chunk_length,
            lsh_num_chunks_before=1,
            lsh_num_chunks_after=0,
            lsh_attention_probs_dropout_prob=0.0,
            num_hashes=sizes.n_hashes,
            num_buckets=None,
            max_position_embeddings=sizes.length,
            is_decoder=sizes.causal,
            hash_seed=None,
        )
        layer: Any = modeling_reformer.LSHSelfAttention(config)
        layer.query_key = _Prepared()
        layer.value = _Prepared()
        self.layer = layer.to(sizes.device)
        if sizes.length > sizes.chunk_length:
            with quiet_transformers():
                self.layer._set_num_buckets(sizes.length)

    @property
    def factors(self) -> tuple[int, ...]:
        buckets = self.layer.num_buckets
        return (buckets,) if isinstance(buckets, int) else tuple(buckets)

    def rotations_shape(self) -> tuple[int, ...]:
        sizes = self.sizes
        return (sizes.heads, sizes.head_dim, sizes.n_hashes, sum(self.factors) // 2)

    def hash(self, qk: Tensor) -> Tensor:
        """Bucket ids (B, H, R, L) of qk (B, L, H * D), without the offset that it adds in each round."""
        return self.without_offsets(self.layer._hash_vectors(self.heads(qk), self.sizes.n_hashes, None))

    def without_offsets(self, buckets: Tensor) -> Tensor:
        sizes = self.sizes
        shape = (sizes.batch, sizes.heads, sizes.n_hashes, sizes.length)
        return buckets.reshape(shape) % math.prod(self.factors)

    def heads(self, flat: Tensor) -> Tensor:
        sizes = self.sizes
        return flat.view(sizes.batch, sizes.length, sizes.heads, sizes.head_dim).transpose(1, 2)

    def attend(self, qk: Tensor, v: Tensor, buckets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The output (B, L, H * D) and the buckets; it does not hash where buckets are passed in."""
        self.layer.query_key.output = qk
        self.layer.value.output = v
        result = self.layer(qk, buckets=buckets)
        self.layer.query_key.output = self.layer.value.output = None
        return result.hidden_states, result.buckets


class Lucidrains:
    """`reformer_pytorch.LSHAttention` with its defaults; qk and v are (B * H, L, D)."""

    def __init__(self, sizes: Sizes) -> None:
        need_multiple("reformer_pytorch", sizes.length, 2 * sizes.chunk_length, "twice the chunk length")
        from reformer_pytorch import LSHAttention

        self.sizes = sizes
        self.layer: Any = LSHAttention(
            bucket_size=sizes.chunk_length, n_hashes=sizes.n_hashes, causal=sizes.causal
        ).to(sizes.device)
        # In training mode it keeps the buckets of its last call alive, for reversible layers.
        self.layer.eval()

    @property
    def factors(self) -> tuple[int, ...]:
        return (self.sizes.length // self.sizes.chunk_length,)

    def rotations_shape(self) -> tuple[int, ...]:
        sizes = self.sizes
        return (1, sizes.head_dim, sizes.n_hashes, sum(self.factors) // 2)

    def hash(self, qk: Tensor) -> Tensor:
        """Bucket ids (B, H, R, L) of qk (B * H, L, D), without the offset that it adds in each round."""
        return self.without_offsets(self.layer.hash_vectors(self.factors[0], qk, set_cache=False))

    def without_offsets(self, buckets: Tensor) -> Tensor:
        sizes = self.sizes
        shape = (sizes.batch, sizes.heads, sizes.n_hashes, sizes.length)
        return buckets.reshape(shape) % math.prod(self.factors)

    def attend(self, qk: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The output (B * H, L, D) and the buckets."""
        out, _, buckets = self.layer(qk, v)
        return out, buckets
