"""Whole steps, forward and backward, timed in turns beside a plain one, with the memory of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reformer_kernels.benchmarks.allocations import peak_allocated
from reformer_kernels.benchmarks.timing import Case, Seconds, between, interleave, mark

Row = dict[str, Any]
Step = Callable[[], Sequence[Tensor]]
"""One forward and backward; returns the inputs and outputs it made, which do not count as its memory."""


def compare(
    steps: Mapping[str, Step], plain: str, *, budget: float, repeats: int, device: torch.device, **about: Any
) -> list[Row]:
    """A row for each step: `case`, `phase`, `n`, `median_s`, `p20_s`, `p80_s`, `peak_bytes`, `time_ratio` and
    `memory_ratio` (to the step named `plain`), and what `about` tells. A step has `budget` seconds.
    """
    peaks = {}
    for name, step in steps.items():
        step()
        kept: list[int] = []

        def measured(step: Step = step, kept: list[int] = kept) -> None:
            kept.append(sum(t.numel() * t.element_size() for t in step()))

        peaks[name] = peak_allocated(measured, device) - kept[0]

    def timed(step: Step) -> Callable[[], dict[str, Seconds]]:
        def run() -> dict[str, Seconds]:
            start = mark(device)
            step()
            return {"forward+backward": between(start, mark(device))}

        return run

    cases = {name: Case(timed(step)) for name, step in steps.items()}
    interleave(list(cases.values()), budget=budget, max_repeats=repeats)
    spreads = {name: case.spreads()["forward+backward"] for name, case in cases.items()}
    return [
        {
            **about,
            "case": name,
            "phase": "forward+backward",
            "n": spread.n,
            "median_s": spread.median,
            "p20_s": spread.p20,
            "p80_s": spread.p80,
            "time_ratio": spread.median / spreads[plain].median,
            "peak_bytes": peaks[name],
            "memory_ratio": peaks[name] / max(1, peaks[plain]),
        }
        for name, spread in spreads.items()
    ]
