"""The peers as callables on the same tensors: torch SDPA and its back ends, Hugging Face, reformer_pytorch.

Each is timed on the attention alone. Hugging Face's layer includes its projections, so they are replaced by
modules that hand over given queries and values; everything after them is its own code, unchanged.
Nothing here is imported unless a peer is asked for.
"""

from __future__ import annotations

import importlib
import logging
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
from reformer_kernels.benchmarks.problem import Problem


@dataclass(frozen=True)
class Peer:
    key: str
    title: str
    package: str
    module: str
    preset: str | None
    """Our preset that computes the same, None where no rule of ours does."""
    device: str | None = None
    """The only kind of device that it is compared on, where there is one."""

    @property
    def install_command(self) -> str:
        return f"pip install {self.package}"

    def missing(self) -> str | None:
        """Why the peer cannot run and the command that mends it; None where it can."""
        if version_of(self.package) is None:
            return f"{self.title} is not installed; install it with: {self.install_command}"
        try:
            importlib.import_module(self.module)
        except Exception as error:  # whatever a broken installation raises belongs in the message
            reason = f"{type(error).__name__}: {error}"
            return f"{self.title} does not import ({reason}); try: {self.install_command} -U"
        return None


FULL_ATTENTION = {"sdpa": "torch SDPA", "flash": "SDPA flash", "cudnn": "SDPA cuDNN"}
"""Peers that attend to everything: torch's own choice, and its back ends for NVIDIA GPUs by name."""

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
    """A peer that is installed cannot take this problem; the message says why."""


@contextmanager
def own_generator(seed: int | None) -> Iterator[None]:
    """Both Reformer peers draw rotations from torch's global generator: lend it to them and put it back."""
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        yield


class FullAttention:
    """`scaled_dot_product_attention`, with torch's choice of back end or the one named.

    Raises:
        PeerRefusesError: that back end cannot take such tensors.
    """

    def __init__(self, name: str, problem: Problem) -> None:
        self.causal = problem.causal
        self.backend = _SDPA_BACKENDS.get(name)
        if self.backend is None:
            return
        shape = (1, 1, 16, problem.head_dim)
        row = torch.zeros(shape, dtype=problem.torch_dtype, device=problem.device, requires_grad=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # reasons, one a back end; the error has to do
                self.attend(row, row, row).sum().backward()
        except RuntimeError as error:
            raise PeerRefusesError(
                f"{name} cannot take {problem.dtype} with heads of {problem.head_dim} on {problem.device} "
                f"({str(error).splitlines()[0]})"
            ) from error

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k and v (B, H, L, D)."""
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class _Given(nn.Module):
    """In a projection's place: the tensor it is told to give."""

    given: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.given


class HuggingFace:
    """`transformers`' LSHSelfAttention without its projections, at its own choice of buckets.

    qk and v are (B, L, H * D), as its projections would write them.
    """

    def __init__(self, problem: Problem) -> None:
        if problem.length > problem.chunk_length and problem.length % problem.chunk_length:
            raise PeerRefusesError(
                f"Hugging Face's layer needs a length that is a multiple of the chunk length "
                f"({problem.chunk_length}), got {problem.length}"
            )
        from transformers import ReformerConfig
        from transformers.models.reformer import modeling_reformer

        self.problem = problem
        config = ReformerConfig(
            hidden_size=problem.heads * problem.head_dim,
            num_attention_heads=problem.heads,
            attention_head_size=problem.head_dim,
            attn_layers=["lsh"],
            lsh_attn_chunk_length=problem.chunk_length,
            lsh_num_chunks_before=1,
            lsh_num_chunks_after=0,
            lsh_attention_probs_dropout_prob=0.0,
            num_hashes=problem.n_hashes,
            num_buckets=None,
            max_position_embeddings=problem.length,
            is_decoder=problem.causal,
            hash_seed=None,
        )
        layer: Any = modeling_reformer.LSHSelfAttention(config)
        layer.query_key = _Given()
        layer.value = _Given()
        self.layer = layer.to(problem.device)
        if problem.length > problem.chunk_length:
            logger = logging.getLogger("transformers.models.reformer.modeling_reformer")
            level = logger.level
            logger.setLevel(logging.ERROR)  # it warns of choosing the number of buckets, as it always does
            try:
                self.layer._set_num_buckets(problem.length)
            finally:
                logger.setLevel(level)

    @property
    def factors(self) -> tuple[int, ...]:
        buckets = self.layer.num_buckets
        return (buckets,) if isinstance(buckets, int) else tuple(buckets)

    def rotations_shape(self) -> tuple[int, ...]:
        problem = self.problem
        return (problem.heads, problem.head_dim, problem.n_hashes, sum(self.factors) // 2)

    def hash(self, qk: Tensor) -> Tensor:
        """Bucket ids (B, H, R, L) without its per-round offsets, of qk (B, L, H * D)."""
        return self.without_offsets(self.layer._hash_vectors(self.heads(qk), self.problem.n_hashes, None))

    def without_offsets(self, buckets: Tensor) -> Tensor:
        problem = self.problem
        shape = (problem.batch, problem.heads, problem.n_hashes, problem.length)
        return buckets.reshape(shape) % _product(self.factors)

    def heads(self, flat: Tensor) -> Tensor:
        problem = self.problem
        return flat.view(problem.batch, problem.length, problem.heads, problem.head_dim).transpose(1, 2)

    def attend(self, qk: Tensor, v: Tensor, buckets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Output (B, L, H * D) and its buckets; hashing is skipped where buckets are given."""
        self.layer.query_key.given = qk
        self.layer.value.given = v
        result = self.layer(qk, buckets=buckets)
        self.layer.query_key.given = self.layer.value.given = None
        return result.hidden_states, result.buckets


class Lucidrains:
    """`reformer_pytorch.LSHAttention` with its defaults; qk and v are (B * H, L, D)."""

    def __init__(self, problem: Problem) -> None:
        if problem.length % (2 * problem.chunk_length):
            raise PeerRefusesError(
                f"reformer_pytorch needs a length that is a multiple of twice the chunk length "
                f"({2 * problem.chunk_length}), got {problem.length}"
            )
        from reformer_pytorch import LSHAttention

        self.problem = problem
        self.layer: Any = LSHAttention(
            bucket_size=problem.chunk_length, n_hashes=problem.n_hashes, causal=problem.causal
        ).to(problem.device)
        # In training mode it keeps the buckets of its last call alive, for reversible layers.
        self.layer.eval()

    @property
    def factors(self) -> tuple[int, ...]:
        return (self.problem.length // self.problem.chunk_length,)

    def rotations_shape(self) -> tuple[int, ...]:
        problem = self.problem
        return (1, problem.head_dim, problem.n_hashes, sum(self.factors) // 2)

    def hash(self, qk: Tensor) -> Tensor:
        """Bucket ids (B, H, R, L) without its per-round offsets, of qk (B * H, L, D)."""
        return self.without_offsets(self.layer.hash_vectors(self.factors[0], qk, set_cache=False))

    def without_offsets(self, buckets: Tensor) -> Tensor:
        problem = self.problem
        shape = (problem.batch, problem.heads, problem.n_hashes, problem.length)
        return buckets.reshape(shape) % _product(self.factors)

    def attend(self, qk: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output (B * H, L, D) and its buckets."""
        out, _, buckets = self.layer(qk, v)
        return out, buckets


def _product(factors: tuple[int, ...]) -> int:
    result = 1
    for factor in factors:
        result *= factor
    return result
