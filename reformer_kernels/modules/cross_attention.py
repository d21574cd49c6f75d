"""Attention of a decoder to what an encoder made: full, or LSH with queries and keys sorted apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels import functional
from reformer_kernels.config import LSHConfig
from reformer_kernels.modules.attention import _Attention, _positive, fresh_seed


class CrossAttention(_Attention):
    """Queries from x, keys and values from a memory of any length and width.

    Args:
        embed_dim: E, the size of hidden states.
        num_heads: H.
        memory_dim: the size of the memory's rows; None: E.
        config: LSH attention over the memory, see `functional.lsh_cross_attention`, with this configuration's
            rounds, window and buckets (it is never causal); None: full attention.
        head_dim, value_dim, bias, out_bias, dropout, seed, backend: as in `LSHSelfAttention`; `backend` is
            for LSH attention.

    Raises:
        ValueError: sizes or dropout out of range.

    >>> layer = CrossAttention(64, 4, memory_dim=32)
    >>> layer(torch.zeros(1, 50, 64), torch.zeros(1, 70, 32)).shape
    torch.Size([1, 50, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        memory_dim: int | None = None,
        config: LSHConfig | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
        seed: int = 0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, num_heads, head_dim, value_dim, dropout, None, backend)
        self.memory_dim = embed_dim if memory_dim is None else _positive("memory_dim", memory_dim)
        self.config = None if config is None else dataclasses.replace(config, causal=False)
        self.seed = seed
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = nn.Linear(embed_dim, num_heads * self.head_dim, bias=bias, **factory)
        self.key = nn.Linear(self.memory_dim, num_heads * self.head_dim, bias=bias, **factory)
        self.value = nn.Linear(self.memory_dim, num_heads * self.value_dim, bias=bias, **factory)
        self.output = nn.Linear(num_heads * self.value_dim, embed_dim, bias=out_bias, **factory)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        memory_padding_mask: Tensor | None = None,
        *,
        n_hashes: int | None = None,
    ) -> Tensor:
        """x (B, L, E), memory (B, L_k, memory_dim), its mask (B, L_k) bool, True = padding -> (B, L, E).

        A row whose memory is all padding gets zeros from it.
        """
        return self.attend(x, *self.keys_of(memory), memory_padding_mask, n_hashes=n_hashes)

    def keys_of(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The memory's keys and values, (B, H, L_k, D): what `attend` needs of it."""
        if memory.dim() != 3 or memory.shape[1] < 1 or memory.shape[-1] != self.memory_dim:
            raise ValueError(f"memory must be (batch, length, {self.memory_dim}), got {tuple(memory.shape)}")
        k = self._split_heads(self.key(memory), self.head_dim)
        return k, self._split_heads(self.value(memory), self.value_dim)

    def attend(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, n_hashes: int | None = None
    ) -> Tensor:
        """The call's result, given the memory's keys and values."""
        self._check_input(x)
        if k.shape[0] != x.shape[0]:
            raise ValueError(f"x and the memory must have one batch size, got {x.shape[0]} and {k.shape[0]}")
        q = self._split_heads(self.query(x), self.head_dim)
        out = self._full(q, k, v, mask) if self.config is None else self._lsh(q, k, v, mask, n_hashes)
        return self.output(self._merge_heads(out))

    def _full(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen = None
        if mask is not None:
            none = mask.all(1)[:, None, None, None]  # [B, 1, 1, 1]
            seen = ~mask[:, None, None, :] | none  # not every kernel of torch spares a softmax over nothing
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=self._dropout_p())
        return out if mask is None else out.masked_fill(none, 0)

    def _lsh(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, n_hashes: int | None) -> Tensor:
        config = self.config
        assert config is not None
        if n_hashes is not None:
            config = dataclasses.replace(config, n_hashes=_positive("n_hashes", n_hashes))
        return functional.lsh_cross_attention(
            q,
            k,
            v,
            config,
            key_padding_mask=mask,
            dropout_p=self._dropout_p(),
            seed=fresh_seed() if self.training else self.seed,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self._sizes_repr()}, memory_dim={self.memory_dim}, config={self.config}"
