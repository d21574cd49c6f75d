"""`FullSelfAttention`: self-attention in which every token sees every other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reformer_kernels.config import MAX_CHUNK_LENGTH
from reformer_kernels.modules.local_attention import LocalSelfAttention


class FullSelfAttention(LocalSelfAttention):
    """Full self-attention: O(L^2) time and O(L) memory, of up to 2^24 tokens.

    It is local attention with a single chunk, always of the greatest length, so that a program with a
    symbolic length serves all lengths. A query whose keys are all padding gets zeros.

    Args:
        embed_dim, num_heads, causal: as in `LocalSelfAttention`.
        options: the other arguments of `LocalSelfAttention`, except those of chunks.

    Raises:
        TypeError: an argument of chunks (chunk_length, chunks_before, chunks_after, ring) is given.
        ValueError: sizes or dropout are out of range; in a call, a sequence is longer than 2^24 tokens.

    >>> FullSelfAttention(64, 4, causal=True)(torch.zeros(1, 50, 64)).shape
    torch.Size([1, 50, 64])
    """

    def __init__(self, embed_dim: int, num_heads: int, *, causal: bool = False, **options: Any) -> None:
        for name in ("chunk_length", "chunks_before", "chunks_after", "ring"):
            if name in options:
                raise TypeError(f"FullSelfAttention has no chunks, got {name}; use LocalSelfAttention")
        super().__init__(
            embed_dim, num_heads, chunk_length=MAX_CHUNK_LENGTH, chunks_before=0, causal=causal, **options
        )

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        if x.shape[1] > self.chunk_length:
            raise ValueError(
                f"FullSelfAttention takes sequences of up to {self.chunk_length} tokens, got {x.shape[1]}; "
                "use LSHSelfAttention or LocalSelfAttention"
            )

    def extra_repr(self) -> str:
        return f"{self.describe_sizes()}, causal={self.causal}"
