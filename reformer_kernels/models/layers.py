"""What a Reformer is made of: its embedding, the two parts of a layer, and the modules they choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels.models.config import LayerKind, ReformerConfig
from reformer_kernels.modules import FullSelfAttention, LocalSelfAttention, LSHSelfAttention
from reformer_kernels.modules.caches import LayerCache
from reformer_kernels.modules.cross_attention import CrossAttention
from reformer_kernels.modules.feed_forward import ChunkedFeedForward
from reformer_kernels.modules.positions import (
    AxialPositionalEmbedding,
    LearnedPositionalEmbedding,
    RotaryPositions,
    SinusoidalPositionalEmbedding,
)


class TokenEmbedding(nn.Module):
    """The sum of a row each for a token and for the `context` - 1 tokens before it; then positions are added.

    Before the first token stands nothing. `tokens` is one table of context * V rows: that of the token itself
    first, then that of the one before, and so on.
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
        """tokens (B, L) int64, or their embeddings (B, L, d) -> (B, L, d).

        before: (B, context - 1) tokens that stand before the first, -1 for none.
        padding: (B, L) bool; padding counts as nothing before the tokens after it.
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
    """f of a reversible layer: self-attention, and with a memory f(x) = a + cross(norm(x + a)), a = self(x).

    The number of the layer picks its rotations out of those of a call.
    """

    def __init__(self, config: ReformerConfig, number: int, rotary: RotaryPositions | None) -> None:
        super().__init__()
        self.number = number
        self.attention = make_attention(config, config.layers[number], number, rotary)
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
                seed=config.seed + len(config.layers) + number,
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
            options["rotations"] = None if rotations is None else rotations[self.number]
        out = F.dropout(self.attention(x, key_padding_mask, **options), self.dropout, self.training)
        if self.cross is None:
            return out
        assert memory is not None
        crossed = self.cross(self.cross_norm(x + out), memory, memory_padding_mask, n_hashes=n_hashes)
        return out + F.dropout(crossed, self.dropout, self.training)

    def make_cache(self, max_length: int, n_hashes: int | None, bucket_length: int | None) -> LayerCache:
        """See `LSHSelfAttention.make_cache`."""
        if isinstance(self.attention, LSHSelfAttention):
            return self.attention.make_cache(max_length, n_hashes=n_hashes, bucket_length=bucket_length)
        return self.attention.make_cache(max_length)

    def decode(self, x: Tensor, cache: Any, positions: Tensor, memory: Sequence[Tensor] = ()) -> Tensor:
        """See `LSHSelfAttention.decode`; memory: its keys, values and mask, for `CrossAttention.attend`."""
        out = self.attention.decode(x, cache, positions)
        if self.cross is not None:
            out = out + self.cross.attend(self.cross_norm(x + out), *memory)
        return out


class FeedForwardPart(nn.Module):
    """g of a reversible layer: the chunked feed-forward layer, with dropout."""

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
    config: ReformerConfig, kind: LayerKind, number: int, rotary: RotaryPositions | None
) -> LSHSelfAttention | LocalSelfAttention:
    """The attention layer of `kind` for layer `number`."""
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
        # Layers apart, so that two layers do not miss the same neighbours.
        seed = config.seed + number
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
    """One for all layers, so that they share its table."""
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
