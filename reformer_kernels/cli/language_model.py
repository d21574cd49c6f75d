"""The small byte-level language model that `reformer-kernels train` trains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels.config import LSHConfig
from reformer_kernels.modules import LSHSelfAttention

VOCABULARY = 256


class ByteEmbedding(nn.Module):
    """The sum of one embedding each of a byte and of the `context` - 1 bytes before it.

    LSH attention finds what is alike, wherever it is; what stands just before comes from here.
    """

    def __init__(self, dim: int, context: int = 4) -> None:
        super().__init__()
        self.context = context
        self.tables = nn.Embedding(context * VOCABULARY, dim)
        nn.init.normal_(self.tables.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) int64 to (B, L, dim); before the first byte stand zeros."""
        padded = F.pad(tokens, (self.context - 1, 0))
        length = tokens.shape[1]
        shifted = [
            padded[:, self.context - 1 - back : self.context - 1 - back + length] + back * VOCABULARY
            for back in range(self.context)
        ]
        return torch.stack([self.tables(each) for each in shifted]).sum(0)


class Block(nn.Module):
    """A pre-norm Transformer block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, dim: int, heads: int, config: LSHConfig, seed: int, backend: str) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = LSHSelfAttention(dim, heads, config, seed=seed, backend=backend)
        self.feed_forward_norm = nn.LayerNorm(dim)
        narrow = nn.Linear(4 * dim, dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), narrow)
        nn.init.zeros_(self.attention.output.weight)  # a block begins as the identity
        nn.init.zeros_(narrow.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class ByteLanguageModel(nn.Module):
    """tokens (B, L) int64 in 0..255 to logits (B, L, 256) of each next byte."""

    def __init__(
        self, dim: int, layers: int, heads: int, n_hashes: int, chunk_length: int, backend: str = "auto"
    ) -> None:
        super().__init__()
        # Windows within buckets do not move when text is appended: training, evaluation and sampling
        # then see the same keys.
        config = LSHConfig.paper(n_hashes=n_hashes, chunk_length=chunk_length, causal=True, window="bucket")
        self.embedding = ByteEmbedding(dim)
        self.blocks = nn.ModuleList(Block(dim, heads, config, seed, backend) for seed in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, VOCABULARY)
        nn.init.zeros_(self.head.weight)  # the first guess: all bytes alike, 8 bits per byte
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
