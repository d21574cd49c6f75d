"""The steps in order, and the program that runs one of them: `python -m validation.steps FUNCTION ...`.

The program writes each row to standard output as soon as there is one, as a line "ROW {...}", and "END" after
the last one.
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
"""The exit code of a step's process whose device failed, so that no further case could run in it."""


@dataclass(frozen=True)
class Step:
    """A step: `function` is the "module.name" of a generator of rows, `seconds` the most that it may take.

    Several processes (`shards`) share the cases of some steps. One that dies is started again after the case
    that killed it. A step of one process ends with it.
    """

    name: str
    about: str
    function: str
    seconds: float
    shards: int = 1


def rows_of(function: str, context: Context, **share: int) -> Iterator[Row]:
    """The rows of a step's function: all of them, or the `share` of a process."""
    module, _, name = function.rpartition(".")
    generator: Callable[..., Iterator[Row]] = getattr(importlib.import_module(module), name)
    return generator(context, **share)


STEPS = (
    Step("environment", "the machine", "validation.machine_steps.environment_steps", 60),
    Step("build", "the native extension", "validation.machine_steps.build_steps", 150),
    Step("correctness", "against the float64 reference", "validation.correctness.steps", 110, shards=8),
    Step("long", "16K and 64K tokens against float64, in blocks", "validation.exact.long_steps", 40),
    Step("race", "repeated passes, bitwise equal", "validation.hazards.race_steps", 30),
    Step("capture", "CUDA graphs and host synchronisation", "validation.hazards.capture_steps", 30),
    Step("default path", "no default call waits", "validation.layers.default_path_steps", 40),
    Step("predictions", "predicted times of what is timed", "validation.predicted.prediction_steps", 60),
    Step("rates", "the machine's copies and matrix products", "validation.timings.rates_steps", 20),
    Step("headline", "times of the shapes that targets are for", "validation.timings.headline_steps", 60),
    Step("training", "a training step: time and peak memory", "validation.layers.training_steps", 40),
    Step("layers", "times of layers", "validation.layers.layer_steps", 40),
    Step("counters", "hardware counters through ncu", "validation.counters.counter_steps", 60),
    Step(
        "sanitizer programs",
        "what the sanitizer runs",
        "validation.machine_steps.sanitizer_programs_steps",
        30,
    ),
    Step("sanitizer", "compute-sanitizer over the kernels", "validation.machine_steps.sanitizer_steps", 90),
    Step("tests", "the tests that need a GPU", "validation.machine_steps.pytest_steps", 90),
    Step("sweep compile", "candidate tiles, compiled", "validation.sweep.warm_steps", 80, shards=8),
    Step("sweep", "candidate tiles, timed", "validation.sweep.sweep_steps", 60),
    Step(
        "headline, swept",
        "the same with the fastest tiles",
        "validation.timings.headline_steps",
        60,
    ),
    Step("peers", "FlexAttention, flash-attn, CUB", "validation.peers.peer_steps", 60),
    Step("other times", "other rules, dtypes and sizes", "validation.timings.other_steps", 60),
)
"""The most important step comes first. The limits add up to more than the whole budget, as few steps need
theirs."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m validation.steps")
    parser.add_argument("function")
    parser.add_argument("--context", type=json.loads, required=True)
    for name, default in (("--shard", 0), ("--shards", 1), ("--after", 0)):
        parser.add_argument(name, type=int, default=default)
    arguments = parser.parse_args()
    share: dict[str, Any] = {}
    if arguments.shards > 1 or arguments.after:
        share = {"shard": arguments.shard, "shards": arguments.shards, "after": arguments.after}
    for row in rows_of(arguments.function, Context(**arguments.context), **share):
        print("ROW " + json.dumps(row), flush=True)
        if row.get("fatal"):
            sys.exit(DEVICE_ERROR)
    print("END", flush=True)


if __name__ == "__main__":
    main()
