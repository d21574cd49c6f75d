"""The results of a run so far, written after every row as JSON for programs and as Markdown for people."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reformer_kernels._files import write_atomically
from reformer_kernels.benchmarks import machine
from validation.context import Row
from validation.timings import target_rows

SCHEMA = 1
HIDDEN = ("check", "ok", "fatal")
"""Fields of a row that do not become further columns of a table."""


@dataclass
class StepResult:
    """What a step is `about`, how it ended and the rows that it gave."""

    about: str
    status: str = "not run"
    """One of "not run", "running", "done", "cut short" (out of time) and "failed" (its process died)."""

    seconds: float = 0.0
    reason: str = ""
    rows: list[Row] = field(default_factory=list)

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if row["ok"] is False]

    @property
    def ok(self) -> bool:
        return self.status == "done" and not self.failures


@dataclass
class Results:
    """The results of one run. `path` is that of its files, without their endings."""

    path: Path
    dry_run: bool
    arguments: list[str]
    steps: dict[str, StepResult] = field(default_factory=dict)
    commit: str | None = field(default_factory=machine.commit)
    started: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat())

    def resume(self) -> list[str]:
        """Takes over the steps that the file of an earlier run has as done, and returns their names.

        Raises ValueError where there is no such file, or where it is of another commit or kind of run.
        """
        file = self.path.with_suffix(".json")
        if not file.exists():
            raise ValueError(f"--resume: {file} does not exist")
        earlier = json.loads(file.read_text())
        mine = {"schema": SCHEMA, "dry_run": self.dry_run, "commit": self.commit}
        other = {name: earlier.get(name) for name in mine}
        if other != mine:
            raise ValueError(f"--resume: {file} is of another run, {other}, not {mine}; run without --resume")
        kept = [name for name, step in earlier["steps"].items() if step["status"] == "done"]
        for name in kept:
            step = earlier["steps"][name]
            self.steps[name] = StepResult(
                step["about"], step["status"], step["seconds"], step.get("reason", ""), step["rows"]
            )
        self.started = earlier["started"]
        return kept

    def timed_rows(self) -> list[Row]:
        """The headline rows, first those with swept tiles, then those with the tiles of the package."""
        return [row for name in ("headline, swept", "headline") for row in self._rows(name)]

    def _rows(self, name: str) -> list[Row]:
        return self.steps[name].rows if name in self.steps else []

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "started": self.started,
            "dry_run": self.dry_run,
            "commit": self.commit,
            "arguments": self.arguments,
            "targets": list(target_rows(self.timed_rows(), self.dry_run)),
            "steps": {
                name: {
                    "about": step.about,
                    "status": step.status,
                    "seconds": round(step.seconds, 1),
                    **({"reason": step.reason} if step.reason else {}),
                    "rows": step.rows,
                }
                for name, step in self.steps.items()
            },
        }

    def write(self) -> None:
        write_atomically(self.path.with_suffix(".json"), json.dumps(self.to_json(), indent=1) + "\n")
        write_atomically(self.path.with_suffix(".md"), self.to_markdown())

    def to_markdown(self) -> str:
        lines = [f"# GPU validation: {self.path.name}", "", f"Started {self.started}.", ""]
        if self.dry_run:
            lines += ["**A dry run: tiny problems in Triton's interpreter. No figure here is a GPU's.**", ""]
        lines += _table(
            ["step", "about", "status", "checks", "failed", "seconds"],
            [
                [n, s.about, s.status, str(len(s.rows)), str(len(s.failures)), f"{s.seconds:.1f}"]
                for n, s in self.steps.items()
            ],
        )
        lines += ["## Targets", "", "For an H100: bf16, D = 64, chunk 64.", ""]
        lines += _rows_table(list(target_rows(self.timed_rows(), self.dry_run)))
        for name, step in self.steps.items():
            lines += [f"## {name[0].upper()}{name[1:]}", ""]
            if step.reason:
                lines += [f"{step.status}: {step.reason}", ""]
            lines += _rows_table(step.rows)
        return "\n".join(lines)


def _rows_table(rows: list[Row]) -> list[str]:
    fields = list(dict.fromkeys(name for row in rows for name in row if name not in HIDDEN))
    verdict = {True: "ok", False: "**FAILED**", None: "–"}
    cells = [
        [
            row["check"],
            "skipped" if "skipped" in row else verdict[row["ok"]],
            *(_cell(row.get(f)) for f in fields),
        ]
        for row in rows
    ]
    return _table(["check", "", *fields], cells) if rows else ["Nothing yet.", ""]


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _table(titles: list[str], rows: list[list[str]]) -> list[str]:
    head = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    return [*head, *(f"| {' | '.join(row)} |" for row in rows), ""]
