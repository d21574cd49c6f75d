"""The encoder (or decoder) stack: reversible layers with LSH, local or full attention.

Source: Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer" (arXiv 2001.04451).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels.models.config import ReformerConfig
from reformer_kernels.models.files import Saveable
from reformer_kernels.models.layers import (
    AttentionPart,
    FeedForwardPart,
    TokenEmbedding,
    make_norm,
    make_rotary,
)
from reformer_kernels.modules import AxialPositionalEmbedding, LearnedPositionalEmbedding
from reformer_kernels.modules.checks import refuse_tracing
from reformer_kernels.reversible.blocks import ReversibleBlock, ReversibleSequence


class Reformer(Saveable):
    """Tokens to hidden states: embedding, reversible layers, normalisation.

    Both residual streams start as the embedding. Each layer computes y1 = x1 + attention(norm(x2)) and
    y2 = x2 + feed_forward(norm(y1)). The result is the norm of the two streams, side by side or averaged.
    The model is an encoder, or with `config.causal` a decoder.

    Args:
        config: sizes and choices; see `ReformerConfig`.

    Raises:
        TypeError: config is not a ReformerConfig.

    >>> model = Reformer(ReformerConfig(vocab_size=100, d_model=32, layers=("local", "lsh"), num_heads=2))
    >>> model(torch.zeros(1, 77, dtype=torch.int64)).shape
    torch.Size([1, 77, 64])
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        if not isinstance(config, ReformerConfig):
            raise TypeError(f"config must be a ReformerConfig, got {type(config).__name__}")
        self.config = config
        self.embedding = TokenEmbedding(config)
        rotary = make_rotary(config)
        blocks = [
            ReversibleBlock(
                AttentionPart(config, layer, rotary),
                FeedForwardPart(config),
                norm_f=make_norm(config, config.d_model),
                norm_g=make_norm(config, config.d_model),
            )
            for layer in range(len(config.layers))
        ]
        self.layers = ReversibleSequence(
            blocks,
            residual="exact" if config.residual == "exact" else "float",
            keep_layouts=config.keep_layouts,
            backend="auto" if config.backend == "triton" else config.backend,
        )
        self.norm = make_norm(config, config.d_out)
        self.reset_parameters()

    def config_dict(self) -> dict[str, Any]:
        return self.config.to_dict()

    @classmethod
    def from_config_dict(cls, config: dict[str, Any]) -> Reformer:
        return cls(ReformerConfig.from_dict(config))

    def reset_parameters(self) -> None:
        """Draw weights from a normal distribution with torch's global generator; biases become 0."""
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, AxialPositionalEmbedding | LearnedPositionalEmbedding):
            for weight in module.parameters():
                nn.init.normal_(weight, std=self.config.init_std)

    def forward(
        self,
        tokens: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        n_hashes: int | None = None,
        bucket_length: int | None = None,
        rotations: Sequence[Tensor | None] | None = None,
        memory: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute hidden states.

        Args:
            tokens: (B, L) int64 for any L >= 1 (up to `max_length` with axial or learned positions), or
                their embeddings (B, L, d), to which positions are added.
            key_padding_mask: (B, L) bool, True = padding, left or right, as in `nn.MultiheadAttention`. A
                padded row gives what the row alone gives, as long as both have the same `bucket_length` and,
                where `local_ring` is set and the model is not causal, the same number of chunks. A model
                that is not causal has the buckets of the padded length L where no `bucket_length` is given.
            position_ids: (L,) or (B, L) int64; None counts the tokens of each row from 0, without padding,
                and cuts the chunks of local layers likewise. Where they are given, chunks are cut from the
                first column on, padding included, as transformers does.
            n_hashes: hash rounds of the LSH layers in this call, in training too; None takes the
                configuration's.
            bucket_length: replaces the configuration's in this call.
            rotations: for each layer its rotations, or None where they are drawn; see `LSHSelfAttention`.
            memory: (B, L_m, config.size_of_memory), what layers with cross-attention attend to.
            memory_padding_mask: (B, L_m) bool, True = padding.

        Returns:
            hidden states (B, L, config.d_out). In training, rotations and dropout are drawn from torch's
            global generator; in evaluation, rotations follow from `config.seed`.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or shape.
        """
        refuse_tracing("a Reformer model")
        self._check(tokens, key_padding_mask, position_ids, rotations)
        self.check_memory(memory, memory_padding_mask)
        places: Tensor | None = None
        if position_ids is None and key_padding_mask is not None:
            if "local" in self.config.layers:  # whose chunks are then cut as for the row alone
                tokens, key_padding_mask, places = _tokens_first(tokens, key_padding_mask)
            position_ids = ((~key_padding_mask).cumsum(1) - 1).clamp_min(0)
        x = self.embedding(tokens, position_ids, padding=key_padding_mask)
        run = self.layers.plain if self.config.residual == "plain" else self.layers
        streams = run(
            (x, x),
            key_padding_mask,
            position_ids,
            n_hashes=n_hashes,
            bucket_length=self.config.buckets_for if bucket_length is None else bucket_length,
            rotations=rotations,
            memory=memory,
            memory_padding_mask=memory_padding_mask,
        )
        out = self.finish(*streams)
        return out if places is None else out.take_along_dim(places[..., None], 1)

    def finish(self, first: Tensor, second: Tensor) -> Tensor:
        """Join the last two streams, normalise them and apply dropout."""
        if self.config.streams == "concat":
            joined = torch.cat([first, second], dim=-1)
        else:
            joined = (first + second) / 2
        out: Tensor = F.dropout(self.norm(joined), self.config.dropout, self.training)
        return out

    def check_memory(self, memory: Tensor | None, padding: Tensor | None) -> None:
        """Raise ValueError for cross-attention without a memory, or a memory without cross-attention."""
        if (memory is None) != (self.config.cross_attention is None):
            raise ValueError(
                f"a memory belongs to cross-attention: got {'none' if memory is None else 'one'} with "
                f"config.cross_attention={self.config.cross_attention!r}"
            )
        shape = None if memory is None else tuple(memory.shape[:2])
        if padding is not None and (padding.dtype != torch.bool or tuple(padding.shape) != shape):
            raise ValueError(
                f"memory_padding_mask must be bool {shape}, True = padding, got {padding.dtype} "
                f"{tuple(padding.shape)}"
            )

    def _check(
        self,
        tokens: Tensor,
        padding: Tensor | None,
        positions: Tensor | None,
        rotations: Sequence[Tensor | None] | None,
    ) -> None:
        if not isinstance(tokens, Tensor) or tokens.dtype == torch.bool or tokens.is_complex():
            raise TypeError("tokens must be a tensor of integers (B, L), or of embeddings (B, L, d)")
        if tokens.is_floating_point():
            if tokens.dim() != 3 or tokens.shape[-1] != self.config.d_model or tokens.shape[1] < 1:
                raise ValueError(
                    f"embeddings must be (batch, length, {self.config.d_model}), got {tuple(tokens.shape)}"
                )
        elif tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be int64 or int32, got {tokens.dtype}; convert with tokens.long()")
        elif tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(
                f"tokens must be (batch, length) with at least one token, got {tuple(tokens.shape)}; "
                "one sequence is tokens[None]"
            )
        shape = tuple(tokens.shape[:2])
        if padding is not None and (padding.dtype != torch.bool or tuple(padding.shape) != shape):
            raise ValueError(
                f"key_padding_mask must be a bool tensor {shape}, True = padding, got {padding.dtype} "
                f"{tuple(padding.shape)}"
            )
        if positions is not None and tuple(positions.shape) not in (shape, shape[1:]):
            raise ValueError(f"position_ids must be {shape} or {shape[1:]}, got {tuple(positions.shape)}")
        if rotations is not None and len(rotations) != len(self.config.layers):
            raise ValueError(
                f"rotations must have one entry (or None) for each of {len(self.config.layers)} layers, got "
                f"{len(rotations)}"
            )


def _tokens_first(tokens: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with their tokens before their padding, the mask of these rows, and where each column went."""
    order = padding.to(torch.uint8).argsort(dim=1, stable=True)
    columns = order if tokens.dim() == 2 else order[..., None]
    return tokens.take_along_dim(columns, 1), padding.take_along_dim(order, 1), order.argsort(dim=1)
