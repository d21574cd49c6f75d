"""`CrossAttention`: a decoder attends to an encoder's output, by full or by LSH attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels import functional
from reformer_kernels._checks import check_config
from reformer_kernels._random import resolve_seed
from reformer_kernels.config import LSHConfig
from reformer_kernels.modules.attention_layer import AttentionLayer, with_n_hashes
from reformer_kernels.modules.checks import check_positive


class CrossAttention(AttentionLayer):
    """Attention of queries from x to keys and values from a memory of any length and width.

        out = concat_h(attention(x W_q, memory W_k, memory W_v)) W_o

    Args:
        embed_dim: E, the size of hidden states.
        num_heads: H.
        memory_dim: the size of the memory's rows; None means E.
        config: the hash rounds, window and buckets of LSH attention over the memory, in which queries and
            keys are sorted apart (see `functional.lsh_cross_attention`). It is never causal, whatever the
            configuration says. None means full attention.
        head_dim, value_dim, bias, out_bias, dropout, seed, backend: as in `LSHSelfAttention`; `seed` and
            `backend` matter to LSH attention only.

    Raises:
        ValueError: sizes or dropout are out of range.
        TypeError: config is neither None nor an LSHConfig.

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
        self.memory_dim = embed_dim if memory_dim is None else check_positive("memory_dim", memory_dim)
        if config is not None:
            check_config(config)
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
        """Attend to `memory`.

        Args:
            x: hidden states (B, L, E).
            memory: (B, L_k, memory_dim).
            memory_padding_mask: (B, L_k) bool, True = padding. A memory that is all padding gives zeros.
            n_hashes: the number of hash rounds of this call; None means the configuration's.

        Returns:
            (B, L, E), in x's dtype (the autocast dtype under autocast).

        Raises:
            ValueError, TypeError: shapes, dtypes or values that do not fit.
        """
        return self.attend(x, *self.keys_of(memory), memory_padding_mask, n_hashes=n_hashes)

    def keys_of(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The memory's keys (B, H, L_k, D) and values (B, H, L_k, D_v), as `attend` takes them."""
        if memory.dim() != 3 or memory.shape[1] < 1 or memory.shape[-1] != self.memory_dim:
            raise ValueError(
                f"memory must be (batch, length, {self.memory_dim}) with at least one row, got "
                f"{tuple(memory.shape)}"
            )
        k = self.split_heads(self.key(memory), self.head_dim)
        return k, self.split_heads(self.value(memory), self.value_dim)

    def attend(
        self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, n_hashes: int | None = None
    ) -> Tensor:
        """The result of `forward` from the memory's keys and values and its padding mask (B, L_k)."""
        self.check_input(x)
        if k.shape[0] != x.shape[0]:
            raise ValueError(f"x and the memory must have one batch size, got {x.shape[0]} and {k.shape[0]}")
        q = self.split_heads(self.query(x), self.head_dim)
        out = self._full(q, k, v, mask) if self.config is None else self._lsh(q, k, v, mask, n_hashes)
        return self.output(self.merge_heads(out))

    def _full(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen = None
        if mask is not None:
            all_padding = mask.all(1)[:, None, None, None]  # [B, 1, 1, 1]
            # Not every kernel of torch gives zeros for a softmax over no keys: such rows see all keys here.
            seen = ~mask[:, None, None, :] | all_padding
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=self.dropout_p)
        return out if mask is None else out.masked_fill(all_padding, 0)

    def _lsh(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, n_hashes: int | None) -> Tensor:
        assert self.config is not None
        config = with_n_hashes(self.config, n_hashes)
        return functional.lsh_cross_attention(
            q,
            k,
            v,
            config,
            key_padding_mask=mask,
            dropout_p=self.dropout_p,
            seed=resolve_seed(None, q.device) if self.training else self.seed,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{self.describe_sizes()}, memory_dim={self.memory_dim}, config={self.config}"
