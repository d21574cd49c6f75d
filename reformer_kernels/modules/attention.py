"""The Reformer's self-attention layers: LSH attention, local attention, and full attention beside them.

All map hidden states (B, L, E) to (B, L, E). The heads are views of the projections' outputs, so the
kernels read them where the matrix products wrote them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from reformer_kernels import functional
from reformer_kernels._limits import MAX_HEAD_DIM
from reformer_kernels.config import LSHConfig
from reformer_kernels.layout import Layout
from reformer_kernels.modules.caches import LocalCache, LSHCache
from reformer_kernels.modules.positions import RotaryPositions
from reformer_kernels.reversible.recomputation import is_keeping, remember
from reformer_kernels.rule import local_attention_config

SEED_BOUND = 2**63 - 1


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _head_sizes(
    embed_dim: int, num_heads: int, head_dim: int | None, value_dim: int | None
) -> tuple[int, int]:
    """The head dimensions D of queries and keys and D_v of values, checked."""
    _positive("embed_dim", embed_dim)
    _positive("num_heads", num_heads)
    if head_dim is None:
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads where head_dim is not given, "
                f"got embed_dim {embed_dim} and num_heads {num_heads}"
            )
        head_dim = embed_dim // num_heads
    if value_dim is None:
        value_dim = head_dim
    for name, value in (("head_dim", head_dim), ("value_dim", value_dim)):
        if _positive(name, value) > MAX_HEAD_DIM:
            raise ValueError(f"{name} must be at most {MAX_HEAD_DIM}, got {value}")
    return head_dim, value_dim


def _checked_dropout(dropout: float) -> float:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    return float(dropout)


def fresh_seed() -> Tensor:
    """A seed from torch's global CPU generator, so that `torch.manual_seed` reproduces a training run."""
    return torch.randint(SEED_BOUND, (), dtype=torch.int64)


class _Attention(nn.Module):
    """What the layers share: sizes, the split into heads and the merge."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int | None,
        value_dim: int | None,
        dropout: float,
        rotary: RotaryPositions | None,
        backend: str,
    ) -> None:
        super().__init__()
        self.head_dim, self.value_dim = _head_sizes(embed_dim, num_heads, head_dim, value_dim)
        if rotary is not None and rotary.head_dim != self.head_dim:
            raise ValueError(f"rotary must be for head_dim {self.head_dim}, got {rotary.head_dim}")
        self.rotary = rotary
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = _checked_dropout(dropout)
        self.backend = backend

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"x must have shape (batch, length, {self.embed_dim}), got {tuple(x.shape)}; "
                f"add a batch dimension of 1 to a single sequence"
            )

    def _split_heads(self, projected: Tensor, head_dim: int) -> Tensor:
        """(B, L, H * D) to its view (B, H, L, D)."""
        batch, length, _ = projected.shape
        return projected.view(batch, length, self.num_heads, head_dim).transpose(1, 2)

    def _merge_heads(self, out: Tensor) -> Tensor:
        """(B, H, L, D_v) to (B, L, H * D_v)."""
        return out.transpose(1, 2).flatten(2)

    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _sizes_repr(self) -> str:
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}", f"head_dim={self.head_dim}"]
        if self.value_dim != self.head_dim:
            parts.append(f"value_dim={self.value_dim}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)


class LSHSelfAttention(_Attention):
    """LSH self-attention with shared queries and keys (Reformer, arXiv 2001.04451, section 2).

    qk = x W_qk and v = x W_v are split into heads, `functional.lsh_attention` attends, and the heads'
    results, side by side, are multiplied by W_o.

    In training each call draws new rotations (and dropout) from torch's global CPU generator, so that
    `torch.manual_seed` reproduces a run. In evaluation the rotations follow from `seed` alone, so that the
    same input gives the same output. Neither is part of the state dict.

    Args:
        embed_dim: E, the size of hidden states.
        num_heads: H.
        config: how to hash and attend; the default is the paper's rule, not causal.
        head_dim: D, by default E / H. At most 256, as is value_dim.
        value_dim: D_v, the size of a head's values, by default D.
        bias: whether the query-key and value projections have a bias; the Reformer's have none.
        out_bias: whether the output projection has one.
        dropout: probability of dropping an attention weight in training.
        rotary: rotates query-keys by position, before or after they are hashed; None: no.
        seed: of the rotations in evaluation mode.
        backend: "auto", "reference", "native" or "triton".

    Raises:
        ValueError: sizes or dropout out of range.
        TypeError: config is not an LSHConfig.

    >>> layer = LSHSelfAttention(64, 4, LSHConfig(n_hashes=2, chunk_length=16, causal=True))
    >>> layer(torch.zeros(1, 50, 64)).shape
    torch.Size([1, 50, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        config: LSHConfig = LSHConfig(),  # noqa: B008  (frozen, so one shared default is safe)
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
        rotary: RotaryPositions | None = None,
        seed: int = 0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(config, LSHConfig):
            raise TypeError(f"config must be an LSHConfig, got {type(config).__name__}")
        super().__init__(embed_dim, num_heads, head_dim, value_dim, dropout, rotary, backend)
        self.config = config
        self.seed = seed
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query_key = nn.Linear(embed_dim, num_heads * self.head_dim, bias=bias, **factory)
        self.value = nn.Linear(embed_dim, num_heads * self.value_dim, bias=bias, **factory)
        self.output = nn.Linear(num_heads * self.value_dim, embed_dim, bias=out_bias, **factory)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        n_hashes: int | None = None,
        seed: int | Tensor | None = None,
        rotations: Tensor | None = None,
        layout: Layout | None = None,
        positions: Tensor | None = None,
        bucket_length: int | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: hidden states (B, L, E).
            key_padding_mask: (B, L) bool, True = padding, as in `nn.MultiheadAttention`.
            n_hashes: rounds of this call, in place of the configuration's.
            seed: of this call's rotations and dropout, in place of the mode's: an int or an int64 tensor.
            rotations: (H or 1, D, n_hashes, config.rotation_width) float32, in place of drawing them.
            layout: the order to attend in, in place of hashing.
            positions: (L,) or (B, L), for `rotary`; None: 0..L-1.
            bucket_length: automatic bucket factors are those of so many tokens; None: of L. With a fixed one,
                window="bucket" and causal, tokens appended later change no earlier output.

        Returns:
            (B, L, E), in x's dtype (autocast's, under autocast).
        """
        self._check_input(x)
        config = self.config
        if n_hashes is not None:
            config = dataclasses.replace(config, n_hashes=_positive("n_hashes", n_hashes))
        if seed is None:
            seed = fresh_seed() if self.training else self.seed
        hashed, qk, v = self._project(x, positions)
        if bucket_length is not None and layout is None:
            config, rotations = self._fixed_buckets(config, rotations, seed, bucket_length)
        if layout is None and (is_keeping() or hashed is not qk):
            choose = functools.partial(
                functional.lsh_layout,
                hashed.detach(),
                config,
                rotations=rotations,
                seed=seed,
                key_padding_mask=key_padding_mask,
                backend=self.backend,
            )
            layout, rotations = remember(choose), None
        out = functional.lsh_attention(
            qk,
            v,
            config,
            rotations=rotations,
            layout=layout,
            key_padding_mask=key_padding_mask,
            dropout_p=self._dropout_p(),
            seed=seed,
            backend=self.backend,
        )
        return self.output(self._merge_heads(out))

    def make_cache(
        self, max_length: int, *, n_hashes: int | None = None, bucket_length: int | None = None
    ) -> LSHCache:
        """An empty cache for `decode`, of rows of up to `max_length` tokens.

        bucket_length: as in the call; None: `max_length`. Rotations are those of evaluation.
        """
        config = self.config
        if n_hashes is not None:
            config = dataclasses.replace(config, n_hashes=_positive("n_hashes", n_hashes))
        length = max_length if bucket_length is None else bucket_length
        config, rotations = self._fixed_buckets(config, None, self.seed, length)
        return LSHCache(config, rotations.to(self.query_key.weight.device), max_length, self.backend)

    def decode(self, x: Tensor, cache: LSHCache, positions: Tensor | None = None) -> Tensor:
        """The call's results for tokens that follow those in `cache`, which takes them in; causal only.

        x: first a whole prompt without padding (B, L, E), then one token a row (B, 1, E). Each token attends
        to the prefix that it ends, as it was sorted when it came; those of the prompt to the prompt.
        """
        self._check_input(x)
        hashed, qk, v = self._project(x, positions)
        out = cache.step(hashed, qk, v) if cache.started else cache.prompt(hashed, qk, v)
        return self.output(self._merge_heads(out))

    def _project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What is hashed, the query-keys and the values, each (B, H, L, D)."""
        hashed = qk = self._split_heads(self.query_key(x), self.head_dim)
        v = self._split_heads(self.value(x), self.value_dim)
        if self.rotary is not None:
            qk = self.rotary(qk, positions)
            hashed = qk if self.rotary.hashing == "before" else hashed
        return hashed, qk, v

    def _fixed_buckets(
        self, config: LSHConfig, rotations: Tensor | None, seed: int | Tensor, bucket_length: int
    ) -> tuple[LSHConfig, Tensor]:
        """The configuration with the buckets of `bucket_length` tokens, and its rotations."""
        if rotations is None:
            rotations = functional.sample_rotations(config, self.num_heads, self.head_dim, seed)
        factors = config.factors(_positive("bucket_length", bucket_length))
        return dataclasses.replace(config, bucket_factors=factors), rotations

    def extra_repr(self) -> str:
        return f"{self._sizes_repr()}, seed={self.seed}, config={self.config}"


class LocalSelfAttention(_Attention):
    """Self-attention within chunks of neighbouring positions, with separate queries, keys and values.

    Every query attends to its chunk of `chunk_length` positions, `chunks_before` chunks before it and
    `chunks_after` after it: O(L * chunk_length). The layer that Reformer models alternate with LSH attention.

    Args:
        embed_dim: E, the size of hidden states.
        num_heads: H.
        chunk_length: positions in a chunk.
        chunks_before: chunks before its own that a query sees.
        chunks_after: chunks after its own that a query sees; must be 0 to be of use where causal.
        causal: whether a query sees only positions up to its own.
        ring: whether the first chunk's neighbour before is the last chunk (Hugging Face's rule).
        scale: of the logits, by default D ** -0.5.
        head_dim, value_dim, bias, out_bias, dropout, rotary, backend: as in `LSHSelfAttention`.

    Raises:
        ValueError: sizes or dropout out of range.

    >>> LocalSelfAttention(64, 4, chunk_length=16, causal=True)(torch.zeros(1, 50, 64)).shape
    torch.Size([1, 50, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        chunk_length: int = 64,
        chunks_before: int = 1,
        chunks_after: int = 0,
        causal: bool = False,
        ring: bool = False,
        scale: float | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
        rotary: RotaryPositions | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, head_dim, value_dim, dropout, rotary, backend)
        self.chunk_length = _positive("chunk_length", chunk_length)
        for name, value in (("chunks_before", chunks_before), ("chunks_after", chunks_after)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
        self.chunks_before = chunks_before
        self.chunks_after = chunks_after
        self.causal = causal
        self.ring = ring
        self.scale = scale
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Linear(embed_dim, num_heads * self.head_dim, bias=bias, **factory)
        self.key = nn.Linear(embed_dim, num_heads * self.head_dim, bias=bias, **factory)
        self.value = nn.Linear(embed_dim, num_heads * self.value_dim, bias=bias, **factory)
        self.output = nn.Linear(num_heads * self.value_dim, embed_dim, bias=out_bias, **factory)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: hidden states (B, L, E).
            key_padding_mask: (B, L) bool, True = padding, as in `nn.MultiheadAttention`.
            seed: of this call's dropout; drawn from torch's global generator where not given.
            positions: (L,) or (B, L), for `rotary`; None: 0..L-1.

        Returns:
            (B, L, E), in x's dtype (autocast's, under autocast).
        """
        self._check_input(x)
        out = self._attend(*self._project(x, positions), key_padding_mask, seed)
        return self.output(self._merge_heads(out))

    def make_cache(self, max_length: int) -> LocalCache:
        """An empty cache for `decode`, of rows of up to `max_length` tokens."""
        chunk = self._chunk(max_length)
        config = local_attention_config(
            chunk, self.chunks_before, self.chunks_after, causal=self.causal, ring=self.ring
        )
        return LocalCache(dataclasses.replace(config, scale=self.scale), max_length)

    def decode(self, x: Tensor, cache: LocalCache, positions: Tensor | None = None) -> Tensor:
        """The call's results for tokens that follow those in `cache`: see `LSHSelfAttention.decode`."""
        self._check_input(x)
        q, k, v = self._project(x, positions)
        if cache.started:
            return self.output(self._merge_heads(cache.step(q, k, v)))
        cache.start(k, v)
        return self.output(self._merge_heads(self._attend(q, k, v, None, None)))

    def _project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, L, D)."""
        q, k = (self._split_heads(layer(x), self.head_dim) for layer in (self.query, self.key))
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        return q, k, self._split_heads(self.value(x), self.value_dim)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, seed: int | Tensor | None
    ) -> Tensor:
        dropout_p = self._dropout_p()
        if seed is None and dropout_p > 0.0:
            seed = fresh_seed()
        return functional.local_attention(
            q,
            k,
            v,
            chunk_length=self._chunk(q.shape[2]),
            chunks_before=self.chunks_before,
            chunks_after=self.chunks_after,
            causal=self.causal,
            ring=self.ring,
            scale=self.scale,
            key_padding_mask=key_padding_mask,
            dropout_p=dropout_p,
            seed=seed,
            backend=self.backend,
        )

    def _chunk(self, length: int) -> int:
        """Positions in a chunk, for a sequence of `length`."""
        return self.chunk_length

    def extra_repr(self) -> str:
        parts = [
            self._sizes_repr(),
            f"chunk_length={self.chunk_length}",
            f"chunks_before={self.chunks_before}",
        ]
        parts += [f"chunks_after={self.chunks_after}", f"causal={self.causal}"]
        if self.ring:
            parts.append("ring=True")
        if self.scale is not None:
            parts.append(f"scale={self.scale}")
        return ", ".join(parts)


class FullSelfAttention(LocalSelfAttention):
    """Ordinary self-attention, O(L^2) in time and O(L) in memory: a local layer with one chunk.

    A query that sees no key, all of them being padding, gets zeros. Parameters as in `LocalSelfAttention`.

    >>> FullSelfAttention(64, 4, causal=True)(torch.zeros(1, 50, 64)).shape
    torch.Size([1, 50, 64])
    """

    def __init__(self, embed_dim: int, num_heads: int, *, causal: bool = False, **options: Any) -> None:
        for name in ("chunk_length", "chunks_before", "chunks_after", "ring"):
            if name in options:
                raise TypeError(f"FullSelfAttention has no chunks, got {name}; use LocalSelfAttention")
        super().__init__(embed_dim, num_heads, causal=causal, chunks_before=0, **options)

    def _chunk(self, length: int) -> int:
        return length

    def extra_repr(self) -> str:
        return f"{self._sizes_repr()}, causal={self.causal}"
