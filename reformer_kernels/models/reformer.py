"""The Reformer: stacks of reversible layers with LSH, local or full attention, and models made of them.

Source: Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer" (arXiv 2001.04451).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels import functional
from reformer_kernels.models import generation
from reformer_kernels.models.config import ReformerConfig
from reformer_kernels.models.files import Saved
from reformer_kernels.models.layers import (
    AttentionPart,
    FeedForwardPart,
    TokenEmbedding,
    make_norm,
    make_rotary,
)
from reformer_kernels.modules.positions import AxialPositionalEmbedding, LearnedPositionalEmbedding
from reformer_kernels.reversible.blocks import ReversibleBlock, ReversibleSequence

IGNORED = -100
"""The label of tokens that count for no loss, as in torch."""


class Reformer(Saved):
    """Tokens to hidden states: embedding, reversible layers, normalisation.

    Both residual streams start as the embedding; layer n computes y1 = x1 + attention(norm(x2)),
    y2 = x2 + feed_forward(norm(y1)); the result is norm(the two streams, side by side or their mean). An
    encoder, or with `config.causal` a decoder.

    Args:
        config: sizes and choices, see `ReformerConfig`.

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
                AttentionPart(config, number, rotary),
                FeedForwardPart(config),
                norm_f=make_norm(config, config.d_model),
                norm_g=make_norm(config, config.d_model),
            )
            for number in range(len(config.layers))
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
        """Weights from a normal distribution, biases 0, from torch's global generator."""
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
            tokens: (B, L) int64, any L >= 1 (up to `max_length` with axial or learned positions); or
                embeddings (B, L, d) in their place, to which positions are added.
            key_padding_mask: (B, L) bool, True = padding, left or right, as in `nn.MultiheadAttention`.
            position_ids: (L,) or (B, L); None: each row counts its tokens from 0, padding left out.
            n_hashes: LSH layers' rounds in this call, in training too; None: the configuration's.
            bucket_length: in place of the configuration's.
            rotations: a layer's or None, one for each layer, in place of drawing them; see
                `LSHSelfAttention`.
            memory: (B, L_m, config.size_of_memory), what layers with cross-attention attend to.
            memory_padding_mask: (B, L_m) bool, True = padding.

        Returns:
            (B, L, config.d_out). In training, rotations and dropout are drawn from torch's global generator;
            in evaluation, rotations follow from `config.seed`.

        Raises:
            TypeError, ValueError: arguments of the wrong kind or shape.
        """
        self._check(tokens, key_padding_mask, position_ids, rotations)
        self.check_memory(memory, memory_padding_mask)
        if position_ids is None and key_padding_mask is not None:
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
        return self.finish(*streams)

    def finish(self, first: Tensor, second: Tensor) -> Tensor:
        """The last streams to the result: joined, normalised, with dropout."""
        if self.config.streams == "concat":
            joined = torch.cat([first, second], dim=-1)
        else:
            joined = (first + second) / 2
        out: Tensor = F.dropout(self.norm(joined), self.config.dropout, self.training)
        return out

    def check_memory(self, memory: Tensor | None, padding: Tensor | None) -> None:
        """Raises ValueError where cross-attention lacks its memory, or a memory its cross-attention."""
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


class ReformerLM(Saved):
    """A language model: a `Reformer` and a linear head. Causal where `config.causal`, else masked.

    logits = hidden head.weight' + head.bias, V of them a token. Given labels it returns the loss in their
    place, chunk by chunk: no [tokens, vocabulary] tensor exists then, forward or backward.

    Args:
        config: sizes and choices, see `ReformerConfig`.

    >>> config = ReformerConfig(vocab_size=100, d_model=32, layers=("lsh",), num_heads=2, causal=True)
    >>> model, tokens = ReformerLM(config), torch.randint(100, (2, 50))
    >>> model(tokens).shape, model(tokens, labels=tokens).shape
    (torch.Size([2, 50, 100]), torch.Size([]))
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.reformer = Reformer(config)
        self.head = nn.Linear(config.d_out, config.vocab_size, bias=config.head_bias)
        nn.init.normal_(self.head.weight, std=config.init_std)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)
        self.tie_weights()

    @property
    def config(self) -> ReformerConfig:
        return self.reformer.config

    def config_dict(self) -> dict[str, Any]:
        return self.config.to_dict()

    @classmethod
    def from_config_dict(cls, config: dict[str, Any]) -> ReformerLM:
        return cls(ReformerConfig.from_dict(config))

    def tie_weights(self) -> None:
        if self.config.tie_embeddings:
            self.head.weight = self.reformer.embedding.tokens.weight

    def forward(
        self,
        tokens: Tensor,
        *,
        labels: Tensor | None = None,
        shift_labels: bool | None = None,
        key_padding_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Logits, or the loss.

        Args:
            tokens, key_padding_mask, options: as for `Reformer`.
            labels: (B, L) int64, the tokens to predict; -100, and padding, count for nothing.
            shift_labels: True: token i predicts labels[i + 1], so that the tokens are their own labels;
                False: labels[i]. None: True for causal models, False for masked ones.

        Returns:
            logits (B, L, V); with labels, the mean cross entropy in nats, a float32 scalar.
        """
        if labels is not None and (labels.shape != tokens.shape[:2] or labels.dtype != torch.int64):
            raise ValueError(
                f"labels must be int64 {tuple(tokens.shape[:2])}, got {labels.dtype} {tuple(labels.shape)}"
            )
        hidden = self.reformer(tokens, key_padding_mask=key_padding_mask, **options)
        if labels is None:
            logits: Tensor = self.head(hidden)
            return logits
        return self.loss(hidden, labels, key_padding_mask, shift_labels)

    def generate(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> list[Tensor]:
        """New tokens after each row's: see `reformer_kernels.models.generation.generate`."""
        return generation.generate(self, tokens, max_new_tokens, **options)

    def stream(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
        """The same, token by token: see `reformer_kernels.models.generation.stream`."""
        return generation.stream(self, tokens, max_new_tokens, **options)

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        key_padding_mask: Tensor | None = None,
        shift_labels: bool | None = None,
    ) -> Tensor:
        """The mean cross entropy of `labels` given hidden states, chunk by chunk: see `forward`."""
        if key_padding_mask is not None:
            labels = labels.masked_fill(key_padding_mask, IGNORED)
        if self.config.causal if shift_labels is None else shift_labels:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            if key_padding_mask is not None:
                labels = labels.masked_fill(key_padding_mask, IGNORED)
        return functional.linear_cross_entropy(hidden, self.head.weight, labels, self.head.bias)
