"""Result files that a run can be resumed from: one record a run, kept as soon as the run is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from reformer_kernels._files import write_atomically
from reformer_kernels.benchmarks.machine import provenance

Record = dict[str, Any]


class RecordsError(Exception):
    """A result file that cannot be continued; the message says why."""


class Records:
    """The records of one experiment, in a JSON file beside the settings that they came from.

    Args:
        file: where they are kept. A file of other settings is refused.
        experiment: its name.
        settings: everything besides a run's key and seed that decides its numbers.
    """

    def __init__(self, file: Path, experiment: str, settings: Record) -> None:
        self.file = file
        # As JSON gives it back, so that tuples and lists compare.
        settings = json.loads(json.dumps(settings))
        if file.exists():
            self._content = json.loads(file.read_text())
            found = self._content.get("experiment"), self._content.get("settings")
            if found != (experiment, settings):
                raise RecordsError(
                    f"{file} holds {found[0]} with other settings; give another --output, or remove it"
                )
        else:
            self._content = {"experiment": experiment, "settings": settings, "runs": {}}

    @property
    def checkpoint(self) -> Path:
        """Where a run that is under way keeps its state."""
        return self.file.with_suffix(".checkpoint")

    def run(self, key: str, compute: Callable[[], Record]) -> Record:
        """The record of this run: the one that is kept, else the one that `compute` gives."""
        runs = self._content["runs"]
        if key not in runs:
            record = compute()
            # The machine and commit of each run, as a resumed file may have several.
            runs[key] = {**record, "provenance": provenance(torch.device("cpu"))}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, json.dumps(self._content, indent=1) + "\n")
            self.checkpoint.unlink(missing_ok=True)
        record = runs[key]
        return record


def read_records(file: Path) -> tuple[Record, Record]:
    """The settings and the runs, by key, of a result file."""
    content = json.loads(file.read_text())
    return content["settings"], content["runs"]


def by_variant(runs: Record) -> Iterator[tuple[str, list[Record]]]:
    """The runs of each variant, which differ in their seed; keys are `<variant> seed <number>`."""
    variants: dict[str, list[Record]] = {}
    for key, run in runs.items():
        variants.setdefault(key.rsplit(" seed ", 1)[0], []).append(run)
    yield from variants.items()
