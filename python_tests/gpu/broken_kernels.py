"""Kernels broken on purpose, which the checks must notice: a program to run with TRITON_INTERPRET=1.

Each fault replaces a piece of a kernel's source. What is left is a kernel that runs and is wrong.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from python_tests.gpu.triton_cases import check
from python_tests.ops.attention.cases import Case, rule_of

# By name, because the package has functions of the names of two of them.
visibility, forward, backward, rowwise, launch = KERNEL_MODULES = [
    importlib.import_module(f"reformer_kernels.ops.attention.triton.{name}")
    for name in ("visibility", "forward", "backward", "rowwise", "launch")
]


class Fault(NamedTuple):
    """`right` stands `times` times in the source of `module`; `wrong` in its place gives wrong results."""

    module: ModuleType
    right: str
    wrong: str
    times: int = 1


FAULTS = {
    "a query sees itself": Fault(visibility, "rank if EXCLUDE_SELF else rank + 1", "rank + 1"),
    "a key is seen by itself": Fault(visibility, "rank + 1 if EXCLUDE_SELF else rank)", "rank)"),
    "a range is one key short": Fault(visibility, "column[None, :] < high", "column[None, :] + 1 < high"),
    "a pair is not counted in the first round": Fault(visibility, "earlier < round_", "earlier <= round_"),
    "a pair is counted in two rounds": Fault(visibility, "distance <= span", "distance < span"),
    "a pair is counted in all rounds": Fault(visibility, "earlier < round_", "earlier < 0"),
    "logits are not scaled": Fault(forward, "(scale * LOG2E)", "LOG2E", times=2),
    "gradients' logits are not scaled": Fault(backward, "(scale * LOG2E)", "LOG2E"),
    "gradients are not scaled": Fault(rowwise, "other=0.0) * scale", "other=0.0)", times=2),
    "rounds are not merged": Fault(forward, "+ old_sums *", "+ 0 * old_sums *"),
    "no round adds to a gradient": Fault(backward, "values += tl.load", "tl.load"),
}


@contextlib.contextmanager
def broken(fault: Fault) -> Iterator[None]:
    """Within the block, launches run the kernels with the fault."""
    file = fault.module.__file__
    assert file is not None
    source = Path(file).read_text()
    assert source.count(fault.right) == fault.times, fault
    kept = []
    with tempfile.TemporaryDirectory() as folder:
        # Triton reads the source of a kernel from its file.
        path = Path(folder, "broken.py")
        path.write_text(source.replace(fault.right, fault.wrong))
        specification = importlib.util.spec_from_file_location("broken", path)
        assert specification is not None and specification.loader is not None
        wrong = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(wrong)
        for name, right in vars(fault.module).items():
            if getattr(getattr(right, "fn", None), "__module__", "") == fault.module.__name__:
                for module in KERNEL_MODULES:
                    if vars(module).get(name) is right:
                        kept.append((module, name, right))
                        setattr(module, name, getattr(wrong, name))
        assert kept
        try:
            yield
        finally:
            for module, name, right in kept:
                setattr(module, name, right)


def noticed(case: Case) -> bool:
    """Whether the check of a case fails."""
    try:
        check(case)
    except AssertionError:
        return True
    return False


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)
    torch.manual_seed(0)
    case = Case(rule_of(causal=True), R=3, L=61, D=8, Dv=8, n_buckets=3, scale=1.7)
    check(case)
    for name, fault in FAULTS.items():
        with broken(fault):
            assert noticed(case), f"not noticed: {name}"
        print(f"{name}: passed, as it was noticed", flush=True)
    check(case)
