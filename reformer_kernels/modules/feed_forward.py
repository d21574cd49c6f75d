"""The Transformer's feed-forward layer, in chunks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reformer_kernels.config import check_integer
from reformer_kernels.functional import chunked_feed_forward
from reformer_kernels.ops.feed_forward.activations import ACTIVATIONS

MAX_WIDTH = 2**31 - 1


class ChunkedFeedForward(nn.Module):
    """outer(dropout(activation(inner(x)))), never holding the d_ff columns of more than one chunk.

    Equals `nn.Sequential(nn.Linear, activation, nn.Dropout, nn.Linear)` in results and gradients; see
    `reformer_kernels.functional.chunked_feed_forward` for the activations, the chunk size and the errors.

    Args:
        d_model: features of input and output.
        d_ff: features of the hidden layer (after the gate, for gated activations).
        activation, chunk_size, memory_budget: as for the function.
        dropout: probability of dropping a hidden element, in training.
        bias: whether both layers have one.

    Shapes: (..., d_model) -> (..., d_model).

    Example:
        >>> layer = ChunkedFeedForward(64, 256, activation="swiglu")
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
        chunk_size: int | None = None,
        memory_budget: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        check_integer("d_model", d_model, 1, MAX_WIDTH)
        check_integer("d_ff", d_ff, 1, MAX_WIDTH)
        width = ACTIVATIONS[activation].inner_width(d_ff)
        self.inner = nn.Linear(d_model, width, bias=bias, device=device, dtype=dtype)
        self.outer = nn.Linear(d_ff, d_model, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.dropout = dropout
        self.chunk_size = chunk_size
        self.memory_budget = memory_budget

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"

    def forward(self, x: Tensor) -> Tensor:
        return chunked_feed_forward(
            x,
            self.inner.weight,
            self.inner.bias,
            self.outer.weight,
            self.outer.bias,
            activation=self.activation,
            dropout_p=self.dropout if self.training else 0.0,
            chunk_size=self.chunk_size,
            memory_budget=self.memory_budget,
        )
