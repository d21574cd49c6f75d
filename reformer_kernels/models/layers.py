"""The parts of a Reformer: its embedding, the two halves of a layer, and the modules they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels.models.config import LayerKind, ReformerConfig
from reformer_kernels.modules import (
    AxialPositionalEmbedding,
    ChunkedFeedForward,
    CrossAttention,
    FullSelfAttention,
    LearnedPositionalEmbedding,
    LocalSelfAttention,
    LSHSelfAttention,
    RotaryPositions,
    SinusoidalPositionalEmbedding,
)
from reformer_kernels.modules.caches import LayerCache


class TokenEmbedding(nn.Module):
    """Embeddings of tokens, each with the `context` - 1 tokens before it, and of their positions.

    A token's embedding is the sum of one row for the token itself and one for each token before it; then
    positions are added. `tokens` is one table of context * V rows: first the V rows for the token itself,
    then those for the token before it, and so on. Before the first token nothing is added.
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.vocab_size = config.vocab_size
        self.context = config.token_context
        self.dropout = config.dropout
        self.tokens = nn.Embedding(config.token_context * config.vocab_size, config.d_model)
        self.positions = _position_table(config)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        before: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Embed tokens (B, L) int64, or add positions to their embeddings (B, L, d); (B, L, d).

        Args:
            tokens: as above.
            positions: (L,) or (B, L) int64; None counts from 0.
            before: (B, context - 1) int64, the tokens before the first one, -1 where there is none.
            padding: (B, L) bool, True = padding, which adds nothing to the tokens after it.
        """
        if tokens.is_floating_point():
            x = tokens
        elif self.context == 1:
            x = self.tokens(tokens)
        else:
            x = self._with_context(tokens, before, padding)
        x = F.dropout(x, self.dropout, self.training)
        if self.positions is None:
            return x
        table = self.positions(tokens.shape[1] if positions is None else positions)
        return x + F.dropout(table.to(device=x.device, dtype=x.dtype), self.dropout, self.training)

    def _with_context(self, tokens: Tensor, before: Tensor | None, padding: Tensor | None) -> Tensor:
        L, back = tokens.shape[1], self.context - 1
        if padding is not None:
            tokens = tokens.masked_fill(padding, -1)
        if before is None:
            before = tokens.new_full((tokens.shape[0], back), -1)
        row = torch.cat([before, tokens], dim=1)
        x = self.tokens(tokens.clamp_min(0))
        for n in range(1, self.context):
            earlier = row[:, back - n : back - n + L]
            part = self.tokens(earlier.clamp_min(0) + n * self.vocab_size)
            x = x + part.masked_fill((earlier < 0).unsqueeze(-1), 0)
        return x


class AttentionPart(nn.Module):
    """The function f of a reversible layer: self-attention a(x), or with a memory a + cross(norm(x + a)).

    Args:
        config: sizes and choices.
        layer: the index of the layer, which decides its kind of attention and its seed.
        rotary: rotary positions, shared by all layers.
    """

    def __init__(self, config: ReformerConfig, layer: int, rotary: RotaryPositions | None) -> None:
        super().__init__()
        self.layer = layer
        self.attention = make_attention(config, layer, rotary)
        self.cross: CrossAttention | None = None
        if config.cross_attention is not None:
            self.cross_norm = make_norm(config, config.d_model)
            self.cross = CrossAttention(
                config.d_model,
                config.num_heads,
                memory_dim=config.size_of_memory,
                config=config.lsh_config if config.cross_attention == "lsh" else None,
                head_dim=config.size_of_head,
                bias=config.attention_bias,
                out_bias=config.attention_out_bias,
                dropout=config.attention_dropout,
                seed=config.seed + len(config.layers) + layer,
                backend=config.backend,
            )
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        n_hashes: int | None = None,
        bucket_length: int | None = None,
        rotations: Sequence[Tensor | None] | None = None,
        memory: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
    ) -> Tensor:
        options: dict[str, Any] = {"positions": positions}
        if isinstance(self.attention, LSHSelfAttention):
            options |= {"n_hashes": n_hashes, "bucket_length": bucket_length}
            options["rotations"] = None if rotations is None else rotations[self.layer]
        out = F.dropout(self.attention(x, key_padding_mask, **options), self.dropout, self.training)
        if self.cross is None:
            return out
        assert memory is not None
        crossed = self.cross(self.cross_norm(x + out), memory, memory_padding_mask, n_hashes=n_hashes)
        return out + F.dropout(crossed, self.dropout, self.training)

    def make_cache(self, max_length: int, n_hashes: int | None, bucket_length: int | None) -> LayerCache:
        """An empty cache for `decode`: see `LSHSelfAttention.make_cache`."""
        if isinstance(self.attention, LSHSelfAttention):
            return self.attention.make_cache(max_length, n_hashes=n_hashes, bucket_length=bucket_length)
        return self.attention.make_cache(max_length)

    def decode(self, x: Tensor, cache: Any, positions: Tensor, memory: Sequence[Tensor] = ()) -> Tensor:
        """Attend from tokens that follow those in `cache`: see `LSHSelfAttention.decode`.

        `memory` holds the memory's keys, values and padding mask, the arguments of `CrossAttention.attend`.
        """
        out = self.attention.decode(x, cache, positions)
        if self.cross is not None:
            out = out + self.cross.attend(self.cross_norm(x + out), *memory)
        return out


class FeedForwardPart(nn.Module):
    """The function g of a reversible layer: the chunked feed-forward layer, with dropout."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.feed_forward = ChunkedFeedForward(
            config.d_model,
            4 * config.d_model if config.d_ff is None else config.d_ff,
            activation=config.activation,
            dropout=config.dropout,
            chunk_size=config.ff_chunk_size,
        )
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.feed_forward(x), self.dropout, self.training)


def make_attention(
    config: ReformerConfig, layer: int, rotary: RotaryPositions | None
) -> LSHSelfAttention | LocalSelfAttention:
    """The self-attention of the layer with this index."""
    kind: LayerKind = config.layers[layer]
    local_dropout = config.local_attention_dropout
    options: dict[str, Any] = {
        "head_dim": config.size_of_head,
        "bias": config.attention_bias,
        "out_bias": config.attention_out_bias,
        "dropout": config.attention_dropout if kind != "local" or local_dropout is None else local_dropout,
        "rotary": rotary,
        "backend": config.backend,
    }
    if kind == "lsh":
        # Each layer has rotations of its own, so that no two layers miss the same neighbours.
        seed = config.seed + layer
        return LSHSelfAttention(config.d_model, config.num_heads, config.lsh_config, seed=seed, **options)
    if kind == "full":
        return FullSelfAttention(config.d_model, config.num_heads, causal=config.causal, **options)
    return LocalSelfAttention(
        config.d_model,
        config.num_heads,
        chunk_length=config.local_chunk_length,
        chunks_before=config.local_chunks_before,
        chunks_after=config.local_chunks_after,
        causal=config.causal,
        ring=config.local_ring,
        **options,
    )


def make_rotary(config: ReformerConfig) -> RotaryPositions | None:
    """The rotary positions of all layers, which share one table; None for other kinds of positions."""
    if config.positions != "rotary":
        return None
    return RotaryPositions(config.size_of_head, base=config.rotary_base, hashing=config.rotary_hashing)


def make_norm(config: ReformerConfig, width: int) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(width, eps=config.norm_eps)


def _position_table(config: ReformerConfig) -> nn.Module | None:
    match config.positions:
        case "axial":
            return AxialPositionalEmbedding(
                config.d_model,
                None if config.axial_shape else config.max_length,
                shape=config.axial_shape,
                dims=config.axial_dims,
            )
        case "learned":
            return LearnedPositionalEmbedding(config.d_model, config.max_length)
        case "sinusoidal":
            return SinusoidalPositionalEmbedding(config.d_model)
        case _:
            return None
