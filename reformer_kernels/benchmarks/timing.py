"""The one timing harness: warm-up, interleaved repeats, median and spread.

Tests, the command line and bench/ all time through `interleave`, so that a ratio always compares calls that
ran alternately (A B A B ...) in one process, on one machine, in one state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

Seconds = float | Callable[[], float]
"""A time in seconds, or a function that waits for the device and returns it."""

SHORTEST_SAMPLE = 0.004
"""Seconds. Calls shorter than this are repeated within a sample, so that the clock is fine enough."""

QUICK_CALL = 0.1
"""Seconds. A call shorter than this is run once, untimed, before each sample, because the calls before it
have filled the caches with their own data."""


@dataclass(frozen=True)
class Spread:
    """Seconds of one call: the median of n samples and their 20th and 80th percentiles."""

    n: int
    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Percentiles interpolate linearly between samples; ValueError where there is none."""
        if not samples:
            raise ValueError("a spread needs at least one sample")
        percentiles = torch.tensor(samples, dtype=torch.float64).quantile(
            torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        )
        return cls(len(samples), *percentiles.tolist())


@dataclass
class Timed:
    """A call under the clock: `run` does the work once and returns the seconds of each of its phases.

    On a GPU the seconds are read only when the whole sample is under way, so that the device need not wait
    for the host between calls.
    """

    run: Callable[[], Mapping[str, Seconds]]
    samples: dict[str, list[float]] = field(default_factory=dict)
    spent: float = 0.0
    calls_per_sample: int = 1
    warm_up_seconds: float = 0.0
    warmed_by: Timed | None = None
    """Another phase of the same call: where that is slow, its warm-up serves for both."""

    @property
    def n(self) -> int:
        return max((len(values) for values in self.samples.values()), default=0)

    def warm_up(self, slow: float) -> None:
        """Run untimed, twice where the call is quick, since the first call also allocates and loads."""
        if self.warmed_by is not None and self.warmed_by.warm_up_seconds > slow:
            self.warm_up_seconds = self.warmed_by.warm_up_seconds
            return
        for _ in range(2):
            start = perf_counter()
            _read(self.run())
            self.warm_up_seconds = perf_counter() - start
            if self.warm_up_seconds > slow:
                break
        self.calls_per_sample = max(1, math.ceil(SHORTEST_SAMPLE / max(self.warm_up_seconds, 1e-7)))

    def sample(self) -> None:
        start = perf_counter()
        if self.warm_up_seconds < QUICK_CALL:
            self.run()
        totals: dict[str, float] = {}
        for call in [self.run() for _ in range(self.calls_per_sample)]:
            for phase, seconds in _read(call).items():
                totals[phase] = totals.get(phase, 0.0) + seconds
        for phase, seconds in totals.items():
            self.samples.setdefault(phase, []).append(seconds / self.calls_per_sample)
        self.spent += perf_counter() - start

    def spreads(self) -> dict[str, Spread]:
        return {phase: Spread.of(values) for phase, values in self.samples.items()}


def interleave(
    calls: Sequence[Timed],
    *,
    budget: float,
    max_repeats: int,
    progress: Callable[[int], None] = lambda index: None,
) -> None:
    """Sample all calls alternately until each has `max_repeats` samples or has used `budget` seconds.

    Every call gets at least one sample, however slow; `progress` gets the index of the call about to run.
    """
    for index, call in enumerate(calls):
        progress(index)
        call.warm_up(budget / 4)
    for _ in range(max_repeats):
        for index, call in enumerate(calls):
            # A slow call stops early enough not to overrun its budget by a whole call.
            if call.n and call.spent + call.spent / call.n > budget:
                continue
            progress(index)
            call.sample()


def _read(phases: Mapping[str, Seconds]) -> dict[str, float]:
    return {phase: seconds() if callable(seconds) else seconds for phase, seconds in phases.items()}


def mark(device: torch.device) -> Any:
    """This moment in the work of `device`: a CUDA event on the current stream, or the time on the CPU."""
    if device.type != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def between(start: Any, end: Any) -> Seconds:
    """The time from one mark to another."""
    if isinstance(start, float):
        return end - start

    def wait() -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return wait


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> float:
    """Seconds, read when the device has finished all its work."""
    synchronize(device)
    return perf_counter()
