"""Task heads: a label for each sequence, or the span in it that answers a question."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels.config import check_integer
from reformer_kernels.models.config import MAX_SIZE, ReformerConfig
from reformer_kernels.models.encoder import Reformer
from reformer_kernels.models.files import Saveable


class ReformerClassifier(Saveable):
    """A label for each sequence: logits = out(tanh(dense(h))), where h is the first token's hidden state.

    Args:
        config: sizes and choices; see `ReformerConfig`.
        n_labels: N, the number of labels.
        dropout: probability of dropping elements of h and of the dense layer's result; None takes the
            configuration's.

    Raises:
        ValueError: n_labels or dropout out of range.

    >>> config = ReformerConfig(vocab_size=100, d_model=32, layers=("lsh",), num_heads=2)
    >>> ReformerClassifier(config, 3)(torch.zeros(2, 50, dtype=torch.int64)).shape
    torch.Size([2, 3])
    """

    def __init__(self, config: ReformerConfig, n_labels: int = 2, *, dropout: float | None = None) -> None:
        super().__init__()
        check_integer("n_labels", n_labels, 1, MAX_SIZE)
        self.reformer = Reformer(config)
        # Replacing it in a configuration checks its range.
        self.dropout = config.dropout if dropout is None else replace(config, dropout=dropout).dropout
        self.dense = nn.Linear(config.d_out, config.d_model)
        self.out = nn.Linear(config.d_model, n_labels)
        _initialise(self.dense, config)
        _initialise(self.out, config)

    @property
    def config(self) -> ReformerConfig:
        return self.reformer.config

    @property
    def n_labels(self) -> int:
        return self.out.out_features

    def config_dict(self) -> dict[str, Any]:
        return {"reformer": self.config.to_dict(), "n_labels": self.n_labels, "dropout": self.dropout}

    @classmethod
    def from_config_dict(cls, config: dict[str, Any]) -> ReformerClassifier:
        body = ReformerConfig.from_dict(config["reformer"])
        return cls(body, config["n_labels"], dropout=config["dropout"])

    def forward(self, tokens: Tensor, *, key_padding_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Compute the logits (B, N) of each sequence, from its first token that is not padding.

        tokens (B, L), the mask and the options are those of `Reformer`.
        """
        hidden = self.reformer(tokens, key_padding_mask=key_padding_mask, **options)
        if key_padding_mask is None:
            first = hidden[:, 0]
        else:
            index = key_padding_mask.int().argmin(1)[:, None, None].expand(-1, 1, hidden.shape[-1])
            first = hidden.gather(1, index)[:, 0]
        x = self.dense(F.dropout(first, self.dropout, self.training)).tanh()
        logits: Tensor = self.out(F.dropout(x, self.dropout, self.training))
        return logits


class ReformerQuestionAnswering(Saveable):
    """Where in a sequence the answer starts and ends, by one linear layer over the hidden states.

    Args:
        config: sizes and choices; see `ReformerConfig`.

    >>> config = ReformerConfig(vocab_size=100, d_model=32, layers=("lsh",), num_heads=2)
    >>> start, end = ReformerQuestionAnswering(config)(torch.zeros(2, 50, dtype=torch.int64))
    >>> start.shape, end.shape
    (torch.Size([2, 50]), torch.Size([2, 50]))
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.reformer = Reformer(config)
        self.out = nn.Linear(config.d_out, 2)
        _initialise(self.out, config)

    @property
    def config(self) -> ReformerConfig:
        return self.reformer.config

    def config_dict(self) -> dict[str, Any]:
        return self.config.to_dict()

    @classmethod
    def from_config_dict(cls, config: dict[str, Any]) -> ReformerQuestionAnswering:
        return cls(ReformerConfig.from_dict(config))

    def forward(self, tokens: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Compute the logits of the start and of the end, each (B, L).

        tokens (B, L) and the options are those of `Reformer`.
        """
        start, end = self.out(self.reformer(tokens, **options)).unbind(-1)
        return start, end


def _initialise(layer: nn.Linear, config: ReformerConfig) -> None:
    nn.init.normal_(layer.weight, std=config.init_std)
    nn.init.zeros_(layer.bias)
