"""The steps in order, and the program that runs one of them: `python -m validation.steps FUNCTION ...`.

It writes each row as a line "ROW {...}" on standard output as soon as there is one, and "END" after the last.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from validation.context import Context, Row

DEVICE_ERROR = 3
"""Exit code of a step's process that its device failed: no later case could run in it."""


@dataclass(frozen=True)
class Step:
    """`function` is "module.name" of a generator of rows. `seconds`: the most that it may take.

    `shards`: processes that share its cases; a process that dies is started again after the case that killed
    it. Steps of one process end with their process.
    """

    name: str
    about: str
    function: str
    seconds: float
    shards: int = 1


def rows_of(function: str, context: Context, **share: int) -> Iterator[Row]:
    """The rows of a step's function, all of them or a process's share."""
    module, _, name = function.rpartition(".")
    generator: Callable[..., Iterator[Row]] = getattr(importlib.import_module(module), name)
    return generator(context, **share)


STEPS = (
    Step("environment", "what is here", "validation.machine_steps.environment_steps", 60),
    Step("build", "the native extension", "validation.machine_steps.build_steps", 150),
    Step("correctness", "against the float64 reference", "validation.correctness.steps", 110, shards=8),
    Step("race", "identical passes, bitwise", "validation.hazards.race_steps", 30),
    Step("capture", "CUDA graphs and host synchronisation", "validation.hazards.capture_steps", 30),
    Step("rates", "the machine's own copy and product", "validation.timings.rates_steps", 20),
    Step("headline", "times of the targets' shapes", "validation.timings.headline_steps", 60),
    Step(
        "sanitizer", "compute-sanitizer over the CUDA kernels", "validation.machine_steps.sanitizer_steps", 60
    ),
    Step("tests", "the test suite's GPU part", "validation.machine_steps.pytest_steps", 90),
    Step("sweep compile", "candidate tiles, compiled", "validation.sweep.warm_steps", 80, shards=8),
    Step("sweep", "candidate tiles, timed", "validation.sweep.sweep_steps", 60),
    Step(
        "headline, swept",
        "the targets' shapes with the quickest tiles",
        "validation.timings.headline_steps",
        60,
    ),
    Step("other times", "other rules, dtypes and sizes", "validation.timings.other_steps", 60),
)
"""Most important first; the limits add up to more than there is, as few steps need theirs."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m validation.steps")
    parser.add_argument("function")
    parser.add_argument("--context", type=json.loads, required=True)
    for name, default in (("--shard", 0), ("--shards", 1), ("--after", 0)):
        parser.add_argument(name, type=int, default=default)
    given = parser.parse_args()
    share: dict[str, Any] = {}
    if given.shards > 1 or given.after:
        share = {"shard": given.shard, "shards": given.shards, "after": given.after}
    for row in rows_of(given.function, Context(**given.context), **share):
        print("ROW " + json.dumps(row), flush=True)
        if row.get("fatal"):
            sys.exit(DEVICE_ERROR)
    print("END", flush=True)


if __name__ == "__main__":
    main()
