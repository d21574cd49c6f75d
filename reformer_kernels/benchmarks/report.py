"""A benchmark's results: the tables a person reads, and the same as JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from reformer_kernels._files import write_atomically
from reformer_kernels.benchmarks import machine
from reformer_kernels.benchmarks.agreement import Agreement
from reformer_kernels.benchmarks.peers import FULL_ATTENTION
from reformer_kernels.benchmarks.problem import Problem, Work
from reformer_kernels.benchmarks.timing import Spread

if TYPE_CHECKING:
    from reformer_kernels.cli.bench import Settings

SCHEMA = 1
WIDE = 165
NARROW = 110
"""Widths of a terminal from which the tables show everything, and below which only the main columns."""

PEER_NAMES = {
    **FULL_ATTENTION,
    "hf": "Hugging Face",
    "lucidrains": "reformer_pytorch",
    "torch": "torch.sort(stable)",
}
RATIO_TITLES = {
    "sdpa": "vs\nSDPA",
    "flash": "vs SDPA\nflash",
    "cudnn": "vs SDPA\ncuDNN",
    "hf": "vs Hug-\nging Face",
    "lucidrains": "vs reform-\ner_pytorch",
    "torch": "vs\ntorch.sort",
    "faster_reformer_peer": "vs faster\nReformer",
}
PHASE_NAMES = {"forward": "forward", "backward": "backward", "forward+backward": "fwd + bwd"}
REFORMER_PEERS = ("hf", "lucidrains")


@dataclass
class Row:
    """One call's figures in one phase: "forward", "backward" or "forward+backward"."""

    name: str
    problem: Problem
    phase: str
    spread: Spread
    work: Work
    working_memory: int | None = None

    @property
    def is_peer(self) -> bool:
        return self.name in PEER_NAMES.values()

    @property
    def gflops(self) -> float | None:
        flops = self.work.flops(self.phase)
        return None if flops is None else flops / self.spread.median / 1e9

    @property
    def gbs(self) -> float | None:
        count = self.work.bytes(self.phase)
        return None if count is None else count / self.spread.median / 1e9


@dataclass
class Report:
    settings: Settings
    rates: machine.Rates
    argv: list[str]
    rows: list[Row] = field(default_factory=list)
    checks: list[Agreement] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    memory_notes: list[str] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat())

    @property
    def agrees(self) -> bool:
        return all(check.ok for check in self.checks)

    def left_out(self, name: str, problem: Problem, reason: str) -> None:
        self.skipped.append({"name": name, "problem": problem.to_json(), "reason": reason})

    def ratios(self, row: Row) -> dict[str, float]:
        """How many times longer each peer takes for the same phase, and the faster Reformer peer."""
        if row.is_peer:
            return {}
        found = {}
        for key, name in PEER_NAMES.items():
            for other in self.rows:
                same = other.problem.length == row.problem.length and other.phase == row.phase
                # Full attention has no rounds, so its one row serves all of ours.
                if other.name == name and same and (key in FULL_ATTENTION or other.problem == row.problem):
                    found[key] = other.spread.median / row.spread.median
        reformers = [found[key] for key in REFORMER_PEERS if key in found]
        if reformers:
            found["faster_reformer_peer"] = min(reformers)
        return found

    # -- for people ---------------------------------------------------------------------------------

    def print(self, console: Console) -> None:
        problem = self.settings.problem
        facts = machine.describe(torch.device(problem.device))
        console.print(
            f"{facts.get('gpu', facts['cpu'])}, {self.settings.threads} threads, torch {torch.__version__}; "
            f"this machine multiplies {problem.dtype} matrices at {self.rates.matmul_gflops:.0f} GFLOP/s and "
            f"copies at {self.rates.copy_gbs:.1f} GB/s",
            highlight=False,
        )
        for length in self.settings.lengths:
            console.print(self._table(length, console.width))
        for line in self._notes():
            console.print(line, highlight=False)

    def _table(self, length: int, width: int) -> Table:
        wide, narrow = width >= WIDE, width < NARROW
        problem = self.settings.problem
        causal = "causal" if problem.causal else "not causal"
        table = Table(
            title=f"{self.settings.operation}, L = {length}: batch {problem.batch}, {problem.heads} heads of "
            f"{problem.head_dim}, chunk {problem.chunk_length}, {problem.dtype}, {causal}",
            title_justify="left",
        )
        rows = [row for row in self.rows if row.problem.length == length]
        compared = [
            key
            for key in (*PEER_NAMES, "faster_reformer_peer")
            if any(key in self.ratios(row) for row in rows)
            and not (key == "faster_reformer_peer" and not {"hf", "lucidrains"} <= set(self.settings.compare))
        ]
        if narrow and "faster_reformer_peer" in compared:
            compared = [key for key in compared if key not in REFORMER_PEERS]
        table.add_column("call", no_wrap=True)
        table.add_column("rounds", justify="right")
        table.add_column("pass", no_wrap=True)
        table.add_column("median", justify="right", no_wrap=True)
        if wide:
            table.add_column("20-80 %", justify="right", no_wrap=True)
        table.add_column("n", justify="right")
        table.add_column("GFLOP/s", justify="right")
        table.add_column("of\nmatmul", justify="right")
        if wide:
            table.add_column("GB/s", justify="right")
            table.add_column("of\ncopy", justify="right")
        table.add_column("memory", justify="right", no_wrap=True)
        for key in compared:
            table.add_column(RATIO_TITLES[key], justify="right", style="bold", no_wrap=True)

        previous = None
        for row in rows:
            if previous is not None and (row.name, row.problem) != previous:
                table.add_section()
            first = (row.name, row.problem) != previous
            previous = (row.name, row.problem)
            rounds = "" if row.name in FULL_ATTENTION.values() else str(row.problem.n_hashes)
            ratios = self.ratios(row)
            cells = [
                row.name if first else "",
                rounds if first else "",
                PHASE_NAMES[row.phase],
                _seconds(row.spread.median),
            ]
            if wide:
                cells.append(_range(row.spread))
            cells += [str(row.spread.n), _number(row.gflops), _share(row.gflops, self.rates.matmul_gflops)]
            if wide:
                cells += [_number(row.gbs), _share(row.gbs, self.rates.copy_gbs)]
            cells.append(_bytes(row.working_memory))
            cells += [f"{_number(ratios[key])}x" if key in ratios else "" for key in compared]
            table.add_row(*cells)
        return table

    def _notes(self) -> list[str]:
        on_gpu = torch.device(self.settings.problem.device).type == "cuda"
        clock = " by the device's own clock (CUDA events)" if on_gpu else ""
        notes = [
            f"median: time of one call{clock}. n: samples. memory: the most that a call holds beyond its "
            "inputs, outputs and gradients.",
        ]
        if self.settings.operation in ("lsh", "attention", "cross"):
            notes.append(
                "GFLOP/s: of the products of all query-key pairs in the tiles, masked or not (SDPA: half of "
                "L x L where causal). vs: how many times as long the other takes."
            )
        if self.settings.operation in ("lsh", "attention"):
            notes.append(
                "trax() attends as Hugging Face does; paper() adds the bucket mask and the duplicate "
                "correction; window=bucket replaces chunks by the nearest keys in the bucket."
            )
        elif self.settings.operation != "cross":
            notes.append("vs: how many times as long the other takes.")
        notes += [
            ("[green]ok[/] " if check.ok else "[bold red]FAILED[/] ") + str(check) for check in self.checks
        ]
        notes += [
            f"[yellow]Left out:[/] {skip['name']} at L = {skip['problem']['length']}: {skip['reason']}."
            for skip in self.skipped
        ]
        notes += [f"[yellow]Note:[/] {note}." for note in self.memory_notes]
        return notes

    # -- for programs -------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        return {
            "machine": machine.describe(torch.device(self.settings.problem.device))
            | {"threads": self.settings.threads},
            "commit": machine.commit(),
            "versions": machine.versions(),
            "rates": dataclasses.asdict(self.rates),
        }

    def _record(self, row: Row) -> dict[str, Any]:
        gflops, gbs = row.gflops, row.gbs
        return {
            "operation": self.settings.operation,
            "name": row.name,
            "phase": row.phase,
            **row.problem.to_json(),
            **dataclasses.asdict(row.spread),
            "gflops": gflops,
            "gbs": gbs,
            "share_of_matmul": None if gflops is None else gflops / self.rates.matmul_gflops,
            "share_of_copy": None if gbs is None else gbs / self.rates.copy_gbs,
            "working_memory_bytes": row.working_memory,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "started": self.started,
            "arguments": self.argv,
            **self._facts(),
            "units": {"n": "samples", "p20": "seconds", "median": "seconds", "p80": "seconds"},
            "rows": [self._record(row) | {"ratios": self.ratios(row)} for row in self.rows],
            "checks": [check.to_json() for check in self.checks],
            "left_out": self.skipped,
            "memory_notes": self.memory_notes,
        }

    def write_json(self, path: Path) -> None:
        write_atomically(path, json.dumps(self.to_json(), indent=1) + "\n")

    def write_csv(self, path: Path) -> None:
        facts = self._facts()
        shared = {"started": self.started, "commit": facts["commit"]}
        for group in ("machine", "versions", "rates"):
            shared |= {f"{group}_{key}".replace("-", "_"): value for key, value in facts[group].items()}
        ratio_keys = (*PEER_NAMES, "faster_reformer_peer")
        records = []
        for row in self.rows:
            ratios = self.ratios(row)
            records.append(
                self._record(row) | {f"ratio_to_{key}": ratios.get(key) for key in ratio_keys} | shared
            )
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(records[0]) if records else [])
            writer.writeheader()
            writer.writerows(records)


def _seconds(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{_number(seconds / scale)} {unit}"
    return f"{_number(seconds / 1e-6)} us"


def _range(spread: Spread) -> str:
    """The 20th and 80th percentiles in the 80th's unit."""
    high, unit = _seconds(spread.p80).split()
    return f"{_number(spread.p20 / {'s': 1.0, 'ms': 1e-3, 'us': 1e-6}[unit])} - {high} {unit}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _share(value: float | None, whole: float) -> str:
    return "" if value is None else f"{100 * value / whole:.0f} %"


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{_number(count / scale)} {unit}"
    return f"{_number(count / 2**10)} KiB"
