"""The training loop of the experiments: steps, evaluations along the way, and a checkpoint to resume from."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SECONDS_BETWEEN_CHECKPOINTS = 30.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn.

    Attributes:
        steps: optimizer steps.
        evaluate_every: steps between evaluations; the last step is evaluated too.
        warm_up: steps over which the learning rate rises.
        constant_share: the share of the steps after which the learning rate falls linearly.
        final_share: what it falls to, as a share of the highest.
    """

    steps: int
    evaluate_every: int
    warm_up: int = 20
    constant_share: float = 0.0
    final_share: float = 0.1

    def rate(self, step: int) -> float:
        """The learning rate of a step, as a share of the highest."""
        rise = min(1.0, (step + 1) / self.warm_up)
        start = self.constant_share * self.steps
        fall = max(0.0, (step - start) / max(1.0, self.steps - start))
        return rise * (1.0 - (1.0 - self.final_share) * fall)


def train(
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    schedule: Schedule,
    loss_of: Callable[[int], Tensor],
    evaluate: Callable[[], dict[str, Any]],
    checkpoint: Path,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Train, and return what `evaluate` gave at each evaluation, with step, loss and seconds of training.

    A run that was interrupted goes on from `checkpoint`, as if it had not been: `loss_of` draws its data from
    the step, and the state of torch's generator is kept.

    Raises FloatingPointError where the loss is not finite.
    """
    highest = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    points: list[dict[str, Any]] = []
    first, seconds = 0, 0.0
    if checkpoint.exists():
        first, seconds, points = _restore(checkpoint, model, optimizers)
    kept = time.monotonic()
    for step in range(first, schedule.steps):
        began = time.perf_counter()
        model.train()
        for optimizer, rates in zip(optimizers, highest, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule.rate(step)
            optimizer.zero_grad(set_to_none=True)
        loss = loss_of(step)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss became {value} at step {step}")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        seconds += time.perf_counter() - began
        done = step + 1
        if done % schedule.evaluate_every == 0 or done == schedule.steps:
            model.eval()
            with torch.no_grad():
                points.append({"step": done, "loss": value, "seconds": seconds, **evaluate()})
            report(f"step {done}: " + ", ".join(f"{k} {v}" for k, v in points[-1].items() if k != "step"))
        if time.monotonic() - kept > SECONDS_BETWEEN_CHECKPOINTS:
            _keep(checkpoint, model, optimizers, done, seconds, points)
            kept = time.monotonic()
    return points


def _keep(
    checkpoint: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    seconds: float,
    points: list[dict[str, Any]],
) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    beside = checkpoint.with_suffix(".unfinished")
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "random": torch.get_rng_state(),
        "progress": (step, seconds, points),
    }
    torch.save(state, beside)
    os.replace(beside, checkpoint)


def _restore(
    checkpoint: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[int, float, list[dict[str, Any]]]:
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    torch.set_rng_state(state["random"])
    step, seconds, points = state["progress"]
    return step, seconds, points
