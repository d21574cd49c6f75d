"""The precision that operations compute in, whatever autocast asks of torch's own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_suspended(device_type: str) -> AbstractContextManager[object]:
    """A context in which torch computes in the dtypes that it is given. Autocast knows no meta device."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over tensors of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
