"""Small blocks, their streams, and what the tests of ReversibleSequence compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reformer_kernels.reversible.blocks import ReversibleSequence

D = 6
TOLERANCE = 1e-10


def feed_forward(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * D, D)
    ).to(dtype)


class Attention(nn.Module):
    """One head of ordinary attention, with an additive bias that may need a gradient."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.project = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.dropout = dropout
        self.double()

    def forward(
        self, x: Tensor, bias: Tensor | None = None, *, options: dict[str, Tensor] | None = None
    ) -> Tensor:
        q, k, v = self.project(self.norm(x)).chunk(3, dim=-1)
        if options is not None:
            v = v * options["gain"]
        dropout = self.dropout if self.training else 0.0
        return self.out(
            nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        )


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


def sequence(depth: int = 3, dropout: float = 0.0, **settings: Any) -> ReversibleSequence:
    return ReversibleSequence([(Attention(dropout), feed_forward(dropout)) for _ in range(depth)], **settings)


def streams(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 5, 2 * D, dtype=dtype, requires_grad=True)


def gradients(
    loss: Callable[[], Tensor], inputs: list[Tensor], seed: int = 1
) -> tuple[Tensor, list[Tensor | None]]:
    torch.manual_seed(seed)
    value = loss()
    return value.detach(), list(torch.autograd.grad(value, inputs, allow_unused=True))


def assert_same(
    ours: tuple[Tensor, list[Tensor | None]],
    theirs: tuple[Tensor, list[Tensor | None]],
    tolerance: float = TOLERANCE,
) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    for number, (a, b) in enumerate(zip(ours[1], theirs[1], strict=True)):
        assert (a is None) == (b is None), f"gradient {number}: {a} against {b}"
        if a is not None:
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=number: f"{n}: {m}"
            )


def weigh(result: Tensor) -> Tensor:
    """A loss that gives each element its own gradient."""
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return (result.sin() * weights).sum()
