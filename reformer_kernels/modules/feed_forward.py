"""`ChunkedFeedForward`: the Transformer's feed-forward layer, computed in chunks of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels import functional
from reformer_kernels.functional.feed_forward import rows_of_hidden
from reformer_kernels.modules.checks import check_dropout, check_positive
from reformer_kernels.modules.linear import is_plain_linear, tokens_per_chunk
from reformer_kernels.ops.feed_forward.activations import ACTIVATIONS
from reformer_kernels.ops.feed_forward.reference import activate


class ChunkedFeedForward(nn.Module):
    """The two-layer feed-forward network, which holds the d_ff hidden columns of one chunk of rows at a time.

        y = outer(dropout(activation(inner(x))))

    Results and gradients equal those of `nn.Sequential(nn.Linear, activation, nn.Dropout, nn.Linear)`.
    `forward` maps (..., d_model) to (..., d_model) in x's dtype (the autocast dtype under autocast).

    Where `inner` or `outer` is no plain `nn.Linear` any more (an adapter, a quantised layer) or has hooks
    (pruning), both are called as modules, on chunks of tokens. Backward then holds the hidden columns of all
    rows, as `nn.Sequential` does, because calling a module again might change it.

    Source: Kitaev et al., "Reformer" (arXiv 2001.04451), section 3.

    Args:
        d_model: the number of features of input and output.
        d_ff: the number of hidden features (after the gate, for gated activations).
        activation, chunk_size, memory_budget: as in `reformer_kernels.functional.chunked_feed_forward`.
        dropout: the probability of dropping a hidden element in training.
        bias: whether both layers have a bias.

    Raises:
        ValueError: sizes or dropout are out of range, or the activation is unknown.

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
        check_positive("d_model", d_model)
        check_positive("d_ff", d_ff)
        inner_width = ACTIVATIONS[activation].inner_width(d_ff)
        self.inner = nn.Linear(d_model, inner_width, bias=bias, device=device, dtype=dtype)
        self.outer = nn.Linear(d_ff, d_model, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.d_ff = d_ff
        self.dropout = check_dropout(dropout)
        self.chunk_size = chunk_size
        self.memory_budget = memory_budget

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"

    def forward(self, x: Tensor) -> Tensor:
        if not (is_plain_linear(self.inner) and is_plain_linear(self.outer)) or self._is_one_token(x):
            return self._call_layers(x)
        return functional.chunked_feed_forward(
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

    def _is_one_token(self, x: Tensor) -> bool:
        """Whether x is a step of generation: a token of each row, no gradient. There are no chunks to make
        then, and the operator's checks would take as long as its products."""
        dropped = self.training and self.dropout > 0
        return x.dim() == 3 and x.shape[1] == 1 and not torch.is_grad_enabled() and not dropped

    def _call_layers(self, x: Tensor) -> Tensor:
        """As `forward`, by calls of both layers on chunks (..., n, d_model) of the tokens."""

        def layers(chunk: Tensor) -> Tensor:
            hidden = activate(self.inner(chunk), self.activation)
            result: Tensor = self.outer(F.dropout(hidden, self.dropout, self.training))
            return result

        if x.dim() < 2:
            return layers(x)
        rows = rows_of_hidden(self.activation, self.d_ff, x.dtype, self.chunk_size, self.memory_budget)
        chunks = x.split(tokens_per_chunk(x, rows), -2)
        return layers(x) if len(chunks) == 1 else torch.cat([layers(chunk) for chunk in chunks], -2)
