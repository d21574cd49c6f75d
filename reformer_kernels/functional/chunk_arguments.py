"""The checks of arguments and the choice of the chunk size that the chunked functions share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reformer_kernels._checks import check_tensor
from reformer_kernels._limits import FLOAT_DTYPES


def check_floating(name: str, x: Any) -> Tensor:
    """`x`, checked to be a dense tensor of an accepted floating-point dtype."""
    check_tensor(name, x)
    if x.dtype not in FLOAT_DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{name} must be one of {accepted}, got {x.dtype}; convert with {name}.float()")
    return x


def check_device(name: str, x: Tensor, device: Any) -> None:
    """Raises ValueError unless `x` is on `device`, that of the input x."""
    if x.device != device:
        raise ValueError(
            f"x and {name} must be on one device, got {device} and {x.device}; move with {name}.to(x.device)"
        )


def rows_per_chunk(
    chunk_size: int | None, memory_budget: int | None, default_budget: int, row_bytes: int, multiple: int
) -> int:
    """The number of rows in a chunk: `chunk_size`, or what keeps its temporaries within the budget.

    Args:
        chunk_size: rows, as the caller asked.
        memory_budget: bytes that a chunk's temporaries may take; None means `default_budget`.
        row_bytes: bytes that the temporaries of one row take.
        multiple: chosen sizes are multiples of this, and at least this, for the sake of the matrix products.

    Raises:
        ValueError: both are given, or one is not a positive integer.
    """
    if chunk_size is not None and memory_budget is not None:
        raise ValueError(
            f"give chunk_size or memory_budget, not both, got {chunk_size!r} and {memory_budget!r}"
        )
    if chunk_size is not None:
        if not _is_positive_integer(chunk_size):
            raise ValueError(f"chunk_size must be a positive number of rows, got {chunk_size!r}")
        return chunk_size
    budget = default_budget if memory_budget is None else memory_budget
    if not _is_positive_integer(budget):
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget!r}")
    return max(multiple, budget // max(1, row_bytes) // multiple * multiple)


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
