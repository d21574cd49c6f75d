"""What every step is told: where it runs, and whether it is the real thing or a dry run."""

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
    """A dry run computes tiny problems in Triton's interpreter on the CPU: it tries the steps, not a GPU."""

    dry_run: bool
    folder: str
    """Where results go."""

    name: str
    """Of the results' files."""

    backend: str = "triton"

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu" if self.dry_run else "cuda")

    def pick(self, real: Choice, tiny: Choice) -> Choice:
        return tiny if self.dry_run else real

    def synchronize(self) -> None:
        import torch

        if not self.dry_run:
            torch.cuda.synchronize()


def attempt(name: str, check: Callable[[], Row]) -> Row:
    """The row of one check; an error is a row too. A device error ends the process, as nothing can follow."""
    start = time.perf_counter()
    try:
        row = {"check": name, "ok": True} | check()
    except Exception as error:  # whatever a kernel, a compiler or a check raises belongs into the results
        row = {"check": name, "ok": False, "reason": f"{type(error).__name__}: {error}"[:600]}
        if "CUDA error" in str(error) or "HIP error" in str(error):
            row["fatal"] = True
    return row | {"seconds": round(time.perf_counter() - start, 3)}


def attempts(checks: list[tuple[str, Callable[[], Row]]]) -> Iterator[Row]:
    for name, check in checks:
        yield attempt(name, check)
