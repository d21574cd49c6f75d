"""What torch.autocast asks of the operations here."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_WITHOUT = ("meta",)  # device types of which torch's autocast functions know nothing


def enabled(device_type: str) -> bool:
    """Whether autocast is on for tensors of this device type."""
    return device_type not in _WITHOUT and torch.is_autocast_enabled(device_type)


def cast(x: Tensor) -> Tensor:
    """`x` in the autocast dtype where autocast is on for its device; float64 stays, as in torch's own."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if enabled(device) and x.dtype != torch.float64 else x


def suspended(device_type: str) -> AbstractContextManager[object]:
    """A context in which torch computes in the dtypes that it is given."""
    return nullcontext() if device_type in _WITHOUT else torch.autocast(device_type, enabled=False)
