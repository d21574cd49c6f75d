"""What every step knows of the run: the device, the folder of results, and whether it is a dry run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Context:
    """A run of the steps. A dry run computes tiny problems in Triton's interpreter on the CPU."""

    dry_run: bool
    folder: str
    """The folder of results."""

    name: str
    """The name of the files of results, without endings."""

    backend: str = "triton"

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu" if self.dry_run else "cuda")

    def pick(self, real: Choice, tiny: Choice) -> Choice:
        """`tiny` in a dry run, otherwise `real`."""
        return tiny if self.dry_run else real

    def synchronize(self) -> None:
        """Waits for the device."""
        import torch

        if not self.dry_run:
            torch.cuda.synchronize()


def attempt(name: str, check: Callable[[], Row]) -> Row:
    """The row of one check. An error becomes a row too, which is "fatal" if the device itself failed."""
    start = time.perf_counter()
    try:
        row = {"check": name, "ok": True} | check()
    except Exception as error:  # errors of kernels, compilers and checks all belong into the results
        row = {"check": name, "ok": False, "reason": f"{type(error).__name__}: {error}"[:600]}
        if "CUDA error" in str(error) or "HIP error" in str(error):
            row["fatal"] = True
    return row | {"seconds": round(time.perf_counter() - start, 3)}


def attempts(checks: list[tuple[str, Callable[[], Row]]]) -> Iterator[Row]:
    """The rows of named checks."""
    for name, check in checks:
        yield attempt(name, check)
