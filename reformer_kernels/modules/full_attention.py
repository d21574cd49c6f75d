"""`FullSelfAttention`: self-attention in which every token sees every other."""

from __future__ import annotations

from typing import Any

from reformer_kernels.modules.local_attention import LocalSelfAttention


class FullSelfAttention(LocalSelfAttention):
    """Full self-attention: O(L^2) time and O(L) memory. It is local attention with a single chunk.

    A query whose keys are all padding gets zeros.

    Args:
        embed_dim, num_heads, causal: as in `LocalSelfAttention`.
        options: the other arguments of `LocalSelfAttention`, except those of chunks.

    Raises:
        TypeError: an argument of chunks (chunk_length, chunks_before, chunks_after, ring) is given.
        ValueError: sizes or dropout are out of range.

    >>> FullSelfAttention(64, 4, causal=True)(torch.zeros(1, 50, 64)).shape
    torch.Size([1, 50, 64])
    """

    def __init__(self, embed_dim: int, num_heads: int, *, causal: bool = False, **options: Any) -> None:
        for name in ("chunk_length", "chunks_before", "chunks_after", "ring"):
            if name in options:
                raise TypeError(f"FullSelfAttention has no chunks, got {name}; use LocalSelfAttention")
        super().__init__(embed_dim, num_heads, causal=causal, chunks_before=0, **options)

    def chunk_length_for(self, length: int) -> int:
        return length

    def extra_repr(self) -> str:
        return f"{self.describe_sizes()}, causal={self.causal}"
