"""The results of a benchmark: rows, checks and what they were measured on, as JSON and CSV.

One form serves all operations. `Document` is that JSON, made by `Report.to_json` or read by `read`; tables,
plots and comparisons are made from it, so that they work on saved results too.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reformer_kernels._files import write_atomically
from reformer_kernels.benchmarks.checks import Agreement
from reformer_kernels.benchmarks.machine import Rates
from reformer_kernels.benchmarks.sizes import Sizes, Work
from reformer_kernels.benchmarks.timing import Spread

SCHEMA = 2
Document = dict[str, Any]

REFORMER_PEERS = ("Hugging Face", "reformer_pytorch")
FASTER_REFORMER = "the faster Reformer"
"""Key of the ratio to the faster of the two Reformer peers."""

UNITS = {
    "n": "samples",
    "p20": "seconds",
    "median": "seconds",
    "p80": "seconds",
    "working_memory_bytes": "bytes held at the peak beyond inputs, outputs and gradients",
    "ratios": "how many times as long the other row takes",
    "memory_ratios": "how many times as much memory the other row takes",
}


ROW_KEYS = {
    "operation",
    "name",
    "phase",
    "length",
    "n",
    "p20",
    "median",
    "p80",
    "working_memory_bytes",
    "ratios",
}
"""What every row of a file of results has, whatever its schema."""


class ResultsError(Exception):
    """A file has no results of `bench`; the message says why."""


@dataclass
class Row:
    """The figures of one call in one phase: "forward", "backward", "forward+backward" or "training step"."""

    name: str
    is_ours: bool
    sizes: Sizes
    phase: str
    spread: Spread
    work: Work
    memory: int | None = None
    """Bytes held at the peak beyond inputs, outputs and gradients."""
    hash_free: bool = False
    """Whether the call is the same for any number of hash rounds."""

    @property
    def gflops(self) -> float | None:
        flops = self.work.flops(self.phase)
        return None if flops is None else flops / self.spread.median / 1e9

    @property
    def gbs(self) -> float | None:
        count = self.work.bytes(self.phase)
        return None if count is None else count / self.spread.median / 1e9

    def is_beside(self, other: Row) -> bool:
        """Whether `other` is what this row is compared with: the same sizes and the same phase."""
        sizes = dataclasses.replace(other.sizes, n_hashes=self.sizes.n_hashes)
        same = sizes == self.sizes if other.hash_free else other.sizes == self.sizes
        return same and other.phase == self.phase and not other.is_ours


@dataclass
class Report:
    """What one run measured.

    Attributes:
        operation: the benchmark's name.
        fields: the fields of `Sizes` that its rows report.
        settings: what was asked for.
        provenance: machine, commit, versions, start and arguments.
        rates: how fast the machine multiplies and copies.
    """

    operation: str
    fields: Sequence[str]
    settings: dict[str, Any]
    provenance: dict[str, Any]
    rates: Rates
    rows: list[Row] = field(default_factory=list)
    checks: list[Agreement] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        return all(check.ok for check in self.checks)

    def leave_out(self, name: str, sizes: Sizes, reason: str) -> None:
        self.left_out.append({"name": name, **self._sizes(sizes), "reason": reason})

    def ratios(self, row: Row) -> tuple[dict[str, float], dict[str, float]]:
        """How many times as long, and how many times as much memory, each row takes that ours is compared
        with."""
        time: dict[str, float] = {}
        memory: dict[str, float] = {}
        if row.is_ours:
            for other in self.rows:
                if row.is_beside(other):
                    time[other.name] = other.spread.median / row.spread.median
                    if other.memory is not None and row.memory is not None:
                        memory[other.name] = other.memory / max(1, row.memory)
        if set(REFORMER_PEERS) <= set(time):
            time[FASTER_REFORMER] = min(time[name] for name in REFORMER_PEERS)
        return time, memory

    def to_json(self) -> Document:
        return {
            "schema": SCHEMA,
            "operation": self.operation,
            **self.provenance,
            "settings": self.settings,
            "rates": dataclasses.asdict(self.rates),
            "units": UNITS,
            "rows": [self._record(row) for row in self.rows],
            "checks": [
                check.to_json()
                | {"sizes": None if check.sizes is None else self._sizes(check.sizes), "text": str(check)}
                for check in self.checks
            ],
            "left_out": self.left_out,
            "notes": self.notes,
        }

    def _sizes(self, sizes: Sizes) -> dict[str, Any]:
        return {name: getattr(sizes, name) for name in self.fields}

    def _record(self, row: Row) -> dict[str, Any]:
        time, memory = self.ratios(row)
        return {
            "operation": self.operation,
            "name": row.name,
            "ours": row.is_ours,
            "phase": row.phase,
            **self._sizes(row.sizes),
            **({"n_hashes": None} if row.hash_free else {}),
            **dataclasses.asdict(row.spread),
            "gflops": row.gflops,
            "gbs": row.gbs,
            "share_of_matmul": None if row.gflops is None else row.gflops / self.rates.matmul_gflops,
            "share_of_copy": None if row.gbs is None else row.gbs / self.rates.copy_gbs,
            "working_memory_bytes": row.memory,
            "ratios": time,
            "memory_ratios": memory,
        }


def write_json(document: Document, path: Path) -> None:
    write_atomically(path, json.dumps(document, indent=1) + "\n")


def write_csv(document: Document, path: Path) -> None:
    """One line a row: its figures, its ratios as columns of their own, and what it was measured on."""
    shared = {"started": document["started"], "commit": document["commit"]}
    for group in ("machine", "versions", "rates"):
        shared |= {f"{group}_{key}".replace("-", "_"): value for key, value in document[group].items()}
    others = list(dict.fromkeys(name for row in document["rows"] for name in row["ratios"]))
    records = []
    for row in document["rows"]:
        figures = {name: value for name, value in row.items() if name not in ("ratios", "memory_ratios")}
        ratios = {f"ratio_to_{name}": row["ratios"].get(name) for name in others}
        records.append(figures | ratios | shared)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]) if records else [])
        writer.writeheader()
        writer.writerows(records)


def read(path: Path) -> Document:
    """The results that --json wrote; files of schema 1 are read as far as they have rows.

    Raises:
        ResultsError: the file is missing, is not JSON or has no rows of `bench`.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} is not a readable JSON file ({error})") from error
    known = isinstance(document, dict) and document.keys() >= {"machine", "versions", "commit", "rows"}
    rows: list[Any] = document["rows"] if known else [None]
    if not all(isinstance(row, dict) and row.keys() >= ROW_KEYS for row in rows):
        raise ResultsError(f"{path} has no rows that 'reformer-kernels bench --json' wrote")
    if not rows:
        raise ResultsError(f"{path} has no rows")
    first: dict[str, Any] = {"settings": {}, "checks": [], "left_out": [], "notes": []}
    return first | document | {"operation": rows[0]["operation"], "rows": [_current(row) for row in rows]}


def _current(row: dict[str, Any]) -> dict[str, Any]:
    """A row of schema 1 as schema 2 has it: whether it is ours followed from its having ratios, and full
    attention carried a number of hash rounds that it does not have."""
    if "ours" in row:
        return row
    free = {"n_hashes": None} if row["name"].startswith(("torch SDPA", "SDPA ")) else {}
    ours = row["name"] not in (*REFORMER_PEERS, "torch.sort(stable)") and not free
    return row | free | {"ours": ours, "variant": ""}
