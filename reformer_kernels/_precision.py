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


def tf32_allowed() -> bool:
    """Whether torch's own products of float32 matrices on a GPU may use TF32.

    torch has older switches (`allow_tf32`, `set_float32_matmul_precision`) and, from 2.9 on, newer ones
    (`fp32_precision`). The newer one of matrix products says what all of them come to; reading the older one
    raises where the newer ones were set.
    """
    matmul = torch.backends.cuda.matmul
    chosen = getattr(matmul, "fp32_precision", None)
    return bool(matmul.allow_tf32) if chosen is None else chosen == "tf32"
