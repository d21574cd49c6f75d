"""The language model: a Reformer with a linear head, its loss and its generation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels import functional
from reformer_kernels.models import generation
from reformer_kernels.models.config import ReformerConfig
from reformer_kernels.models.encoder import Reformer
from reformer_kernels.models.files import Saveable
from reformer_kernels.modules.linear import head_loss, is_plain_linear

IGNORED = -100
"""The label of tokens that do not count in the loss, as in torch."""


class ReformerLM(Saveable):
    """A language model: a `Reformer` and a linear head. Causal where `config.causal`, else masked.

    Each token gets V logits = hidden @ head.weight.T + head.bias. Given labels, the model returns the loss
    instead and computes it chunk by chunk: neither forward nor backward holds a [tokens, vocabulary] tensor.
    A head that is no plain `nn.Linear` any more (an adapter, a quantised layer) or has hooks (pruning) is
    called as a module, chunk by chunk, in forward and again in backward; one with buffers, which a call may
    change, is called once and its logits are kept.

    Args:
        config: sizes and choices; see `ReformerConfig`.

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
        """Compute logits, or the loss where labels are given.

        Args:
            tokens, key_padding_mask, options: as for `Reformer`.
            labels: (B, L) int64, the tokens to predict; -100 and padding are left out of the loss.
            shift_labels: with True token i predicts labels[i + 1], so that the tokens are their own labels;
                with False it predicts labels[i]. None means True for causal models and False for masked ones.

        Returns:
            logits (B, L, V); with labels, the mean cross entropy in nats, a float32 scalar.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or shape.
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
        """Continue each row of `tokens`: see `reformer_kernels.models.generation.generate`."""
        return generation.generate(self, tokens, max_new_tokens, **options)

    def stream(self, tokens: Tensor, max_new_tokens: int, **options: Any) -> Iterator[Tensor]:
        """Yield the new tokens one by one: see `reformer_kernels.models.generation.stream`."""
        return generation.stream(self, tokens, max_new_tokens, **options)

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        key_padding_mask: Tensor | None = None,
        shift_labels: bool | None = None,
    ) -> Tensor:
        """The mean cross entropy of `labels` from hidden states (B, L, config.d_out): see `forward`."""
        if key_padding_mask is not None:
            labels = labels.masked_fill(key_padding_mask, IGNORED)
        if self.config.causal if shift_labels is None else shift_labels:
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
            if key_padding_mask is not None:
                labels = labels.masked_fill(key_padding_mask, IGNORED)
        if is_plain_linear(self.head):
            return functional.linear_cross_entropy(hidden, self.head.weight, labels, self.head.bias)
        return head_loss(self.head, hidden, labels, self.config.vocab_size, IGNORED)
