"""The timing harness and the memory meter, on calls whose cost is known."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from reformer_kernels.benchmarks import memory, timing
from reformer_kernels.benchmarks.timing import Spread, Timed, interleave


def test_percentiles_interpolate() -> None:
    spread = Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (spread.n, spread.p20, spread.median, spread.p80) == pytest.approx((5, 1.8, 3, 4.2))
    assert Spread.of([7.0]) == Spread(1, 7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="at least one sample"):
        Spread.of([])


class Clock:
    """Time that passes only where a call says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def case(self, name: str, seconds: float) -> Timed:
        def run() -> dict[str, float]:
            self.calls.append(name)
            self.now += seconds
            return {"forward": seconds}

        return Timed(run)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "perf_counter", clock)
    return clock


def test_cases_take_turns(clock: Clock) -> None:
    cases = [clock.case("a", 0.006), clock.case("b", 0.006)]
    interleave(cases, budget=10, max_repeats=3)
    # Two warm-ups each; then in each turn one untimed call, for the caches, and one timed.
    assert "".join(clock.calls) == "aabb" + "aabb" * 3
    assert [case.n for case in cases] == [3, 3]


def test_short_calls_are_repeated_within_a_sample(clock: Clock) -> None:
    case = clock.case("a", 0.0005)
    interleave([case], budget=10, max_repeats=2)
    assert case.samples["forward"] == pytest.approx([0.0005, 0.0005])
    assert len(clock.calls) == 2 + 2 * (1 + 8)


def test_slow_cases_stop_at_their_budget_with_at_least_one_sample(clock: Clock) -> None:
    cases = [clock.case("slow", 0.15), clock.case("quick", 0.005)]
    interleave(cases, budget=0.1, max_repeats=6)
    assert [case.n for case in cases] == [1, 6]
    case = clock.case("a", 0.2)
    interleave([case], budget=1.1, max_repeats=20)
    assert case.n == 5


def test_the_same_call_is_not_warmed_up_twice_where_it_is_slow(clock: Clock) -> None:
    forward, both = clock.case("forward", 0.1), clock.case("both", 0.1)
    both.warmed_by = forward
    interleave([forward, both], budget=0.1, max_repeats=1)
    # As calls of 0.1 s do, they run without an untimed call before the sample.
    assert clock.calls == ["forward", "forward", "both"]


def test_a_device_is_asked_for_its_times_after_the_last_call_of_a_sample(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a call returns before its work is done; its events are read once all calls are under way."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "stream of cuda:1"
            self.at = clock.now
            done.append("record")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    device = torch.device("cuda:1")

    def run() -> dict[str, timing.Seconds]:
        start = timing.mark(device)
        clock.now += 0.002
        return {"forward": timing.between(start, timing.mark(device))}

    case = Timed(run)
    interleave([case], budget=10, max_repeats=1)
    assert case.samples["forward"] == pytest.approx([0.002])
    # Each warm-up is waited for; then an untimed call and two timed ones, read at the end.
    assert done == ["record", "record", "wait"] * 2 + ["record"] * 6 + ["wait"] * 2


MIB = 2**20


@pytest.mark.skipif(
    not memory.can_measure(torch.device("cpu")), reason="peak memory is measured on Linux, through /proc/self"
)
def test_peak_counts_what_is_held_beyond_the_results() -> None:
    """In a fresh process, as the benchmark does: 48 MiB of scratch at once, 16 MiB of it returned."""
    script = """
import torch
from reformer_kernels.benchmarks.memory import peak_of
MIB = 2**20
def call():
    kept = torch.ones(16 * MIB // 4)
    for _ in range(3):  # three times one after the other is not more at once
        scratch = torch.ones(32 * MIB // 4)
        del scratch
    return [kept]
torch.ones(8).sum()
print(peak_of(call, torch.device("cpu")), peak_of(lambda: [torch.ones(16 * MIB // 4)], torch.device("cpu")))
"""
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(memory.OWN_MAPPING_ABOVE))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    scratch, nothing = (int(word) for word in done.stdout.split())
    assert abs(scratch - 32 * MIB) < 1.5 * MIB
    assert nothing < 1.5 * MIB
