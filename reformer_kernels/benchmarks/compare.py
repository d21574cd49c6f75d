"""What changed between two saved results beyond the noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reformer_kernels.benchmarks.results import Document

Row = dict[str, Any]
Verdict = Literal["faster", "slower", "same", "unknown"]

FIGURES = {
    "n",
    "p20",
    "median",
    "p80",
    "gflops",
    "gbs",
    "share_of_matmul",
    "share_of_copy",
    "working_memory_bytes",
    "ratios",
    "memory_ratios",
}
"""What is measured of a row; everything else says what the row is."""

SAME_MACHINE = ("cpu", "gpu", "threads")

SMALLEST_CHANGE = 0.02
"""Smaller changes are never reported: the clock of an idle machine varies as much from minute to minute."""

ENOUGH_SAMPLES = 3
"""With fewer samples on either side the spread says nothing about the noise."""

SMALLEST_MEMORY = 256 * 1024
"""Bytes. Peak memory that differs by less is the same: pages and allocator caches vary by as much."""


@dataclass(frozen=True)
class Change:
    """A row before and after. `time` is after / before; `memory` likewise, None where it was not measured."""

    before: Row
    after: Row

    @property
    def time(self) -> float:
        return float(self.after["median"] / self.before["median"])

    @property
    def verdict(self) -> Verdict:
        """A time changed if the ranges from the 20th to the 80th percentile do not overlap and the medians
        differ by more than 2%."""
        before, after = self.before, self.after
        if abs(self.time - 1) <= SMALLEST_CHANGE:
            return "same"
        if min(before["n"], after["n"]) < ENOUGH_SAMPLES:
            return "unknown"
        if after["p80"] < before["p20"]:
            return "faster"
        return "slower" if after["p20"] > before["p80"] else "same"

    @property
    def memory(self) -> float | None:
        before, after = (row["working_memory_bytes"] for row in (self.before, self.after))
        return None if before is None or after is None else float(after / max(1, before))

    @property
    def memory_changed(self) -> bool:
        before, after = (row["working_memory_bytes"] for row in (self.before, self.after))
        if before is None or after is None:
            return False
        return abs(after - before) > max(SMALLEST_MEMORY, SMALLEST_CHANGE * before)


@dataclass(frozen=True)
class Comparison:
    """The rows in both results, how many are in one alone, and what makes the two hard to compare."""

    changes: list[Change]
    only_before: int
    only_after: int
    warnings: list[str]


def compare(before: Document, after: Document) -> Comparison:
    """Match the rows of two results: the same operation, call, phase and sizes."""
    old = {_identity(row): row for row in before["rows"]}
    new = {_identity(row): row for row in after["rows"]}
    changes = [Change(old[key], row) for key, row in new.items() if key in old]
    warnings = list(_warnings(before, after, changes))
    return Comparison(changes, len(old) - len(changes), len(new) - len(changes), warnings)


def _identity(row: Row) -> tuple[tuple[str, Any], ...]:
    # A variant of "" is that of an operation without variants.
    return tuple(sorted((k, v) for k, v in row.items() if k not in FIGURES and v not in (None, "")))


def _warnings(before: Document, after: Document, changes: Sequence[Change]) -> Iterator[str]:
    for name in SAME_MACHINE:
        old, new = before["machine"].get(name), after["machine"].get(name)
        if old != new:
            yield f"the {name} differs: {old} before, {new} after"
    for package in ("torch", "triton"):
        old, new = before["versions"].get(package), after["versions"].get(package)
        if old != new:
            yield f"{package} differs: {old} before, {new} after"
    rates = [document.get("rates", {}).get("matmul_gflops") for document in (before, after)]
    if all(rates) and abs(rates[1] / rates[0] - 1) > 0.1:
        yield (
            f"the machine multiplied at {rates[0]:.0f} GFLOP/s before and {rates[1]:.0f} after, "
            "so it was not in the same state"
        )
    peers = [change for change in changes if not change.after["ours"] and change.verdict != "unknown"]
    moved = [change for change in peers if change.verdict != "same"]
    if moved and 2 * len(moved) > len(peers):
        yield "most rows of peers changed too, so the machine or the peers did"
