"""`LocalSelfAttention`: self-attention within chunks of neighbouring positions."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from reformer_kernels import functional
from reformer_kernels._random import Seed, resolve_seed
from reformer_kernels.config import local_attention_config
from reformer_kernels.modules.attention_layer import AttentionLayer
from reformer_kernels.modules.caches import LocalCache
from reformer_kernels.modules.checks import check_positive
from reformer_kernels.modules.positions import RotaryPositions


class LocalSelfAttention(AttentionLayer):
    """Self-attention within chunks of neighbouring positions, with separate queries, keys and values.

        out = concat_h(local_attention(x W_q, x W_k, x W_v)) W_o

    Each query attends to its own chunk of `chunk_length` positions, to `chunks_before` chunks before it and
    to `chunks_after` chunks after it, in O(L * chunk_length). Reformer models alternate this layer with LSH
    attention.

    Args:
        embed_dim: E, the size of hidden states.
        num_heads: H.
        chunk_length: the number of positions in a chunk.
        chunks_before: how many chunks before its own a query sees.
        chunks_after: how many chunks after its own a query sees; where causal, it sees nothing of them.
        causal: whether a query sees only positions up to its own.
        ring: whether the last chunk comes before the first one (Hugging Face's rule).
        scale: the factor of the logits; None means D ** -0.5.
        head_dim, value_dim, bias, out_bias, dropout, rotary, backend: as in `LSHSelfAttention`.

    Raises:
        ValueError: sizes or dropout are out of range.

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
        self.chunk_length = check_positive("chunk_length", chunk_length)
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
        seed: Seed = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: hidden states (B, L, E).
            key_padding_mask: (B, L) bool, True = padding, as in `nn.MultiheadAttention`.
            seed: the seed of this call's dropout; None draws one from torch's global generator.
            positions: (L,) or (B, L) positions for `rotary`; None means 0..L-1.

        Returns:
            (B, L, E), in x's dtype (the autocast dtype under autocast).

        Raises:
            ValueError, TypeError: shapes, dtypes or values that do not fit.
            RuntimeError: the back end cannot run.
        """
        self.check_input(x)
        out = self._attend(*self._project(x, positions), key_padding_mask, seed)
        return self.output(self.merge_heads(out))

    def make_cache(self, max_length: int) -> LocalCache:
        """An empty cache for `decode`, for rows of up to `max_length` tokens."""
        chunk = min(self.chunk_length, max_length)
        config = local_attention_config(
            chunk, self.chunks_before, self.chunks_after, causal=self.causal, ring=self.ring
        )
        return LocalCache(dataclasses.replace(config, scale=self.scale), max_length, self.backend)

    @torch.no_grad()
    def decode(self, x: Tensor, cache: LocalCache, positions: Tensor | None = None) -> Tensor:
        """The results of `forward` for new tokens, added to `cache`: see `LSHSelfAttention.decode`."""
        self.check_input(x)
        q, k, v = self._project(x, positions)
        if cache.started:
            return self.output(self.merge_heads(cache.step(q, k, v)))
        cache.start(k, v)
        return self.output(self.merge_heads(self._attend(q, k, v, None, None)))

    def _project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (B, H, L, D), and values (B, H, L, D_v)."""
        q, k = (self.split_heads(layer(x), self.head_dim) for layer in (self.query, self.key))
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        return q, k, self.split_heads(self.value(x), self.value_dim)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, seed: Seed) -> Tensor:
        dropout_p = self.dropout_p
        if seed is None and dropout_p > 0.0:
            seed = resolve_seed(None, q.device)
        return functional.local_attention(
            q,
            k,
            v,
            chunk_length=self.chunk_length,
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

    def extra_repr(self) -> str:
        parts = [
            self.describe_sizes(),
            f"chunk_length={self.chunk_length}",
            f"chunks_before={self.chunks_before}",
        ]
        parts += [f"chunks_after={self.chunks_after}", f"causal={self.causal}"]
        if self.ring:
            parts.append("ring=True")
        if self.scale is not None:
            parts.append(f"scale={self.scale}")
        return ", ".join(parts)
