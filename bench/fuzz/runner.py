"""Runs cases of a target and prints a failure as a test."""

from __future__ import annotations

import dataclasses
import re
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from bench.fuzz.targets import Target
from reformer_kernels.testing import poisoned_memory


@dataclasses.dataclass
class Outcome:
    """What a run of a target came to; of a failure the reason, and a test that repeats it."""

    cases: int
    seconds: float
    reason: str = ""
    reproduction: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason


def fuzz(
    target: Target, cases: int, seed_text: str, before: Callable[[Any], None] = lambda case: None
) -> Outcome:
    """Draws and checks `cases` cases, of which `seed_text` decides which; a failure is shrunk.

    `before` is told each case before it runs. Fresh memory is poisoned, so that reading it shows.
    """
    counted, failed, last = 0, False, None

    @seed(zlib.crc32(f"{target.name} {seed_text}".encode()))
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=target.cases)
    def run(case: Any) -> None:
        nonlocal counted, failed, last
        counted += not failed
        before(case)
        try:
            target.check(case)
        except BaseException:
            failed, last = True, case
            raise

    start = time.perf_counter()
    with poisoned_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            run()
        except Exception as error:
            lines = traceback.format_exception(error.__class__, error, error.__traceback__, limit=-4)
            reason = "".join(line for line in lines if not line.startswith(("Failing test", "Explanation")))
            text = reproduction(target, last)
            return Outcome(counted, time.perf_counter() - start, reason, text)
    return Outcome(counted, time.perf_counter() - start)


def reproduction(target: Target, case: Any) -> str:
    """A test that runs one case again. The text of a case makes it, given the names of its classes."""
    imports = {("bench.fuzz.targets", "TARGETS")} | _classes(case)
    lines = [f"from {module} import {name}" for module, name in sorted(imports)]
    name = re.sub(r"\W", "_", target.name)
    return "\n".join(
        [*lines, "", "", f"def test_{name}_again():", f"    TARGETS[{target.name!r}].check({case!r})", ""]
    )


def _classes(value: Any) -> set[tuple[str, str]]:
    """Module and name of each class that the text of a value names."""
    if dataclasses.is_dataclass(value):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, (tuple, list)):
        parts = list(value)
    else:
        return set()
    found = set().union(*map(_classes, parts))
    kind = type(value)
    return found if kind in (tuple, list) else found | {(kind.__module__, kind.__name__)}
