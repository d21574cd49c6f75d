"""Two measures of the peak memory of a call: what torch allocates, and what the system sees.

`peak_allocated` counts tensors alone, exactly, in this process: what the memory of activations is about.
The workspace that the native attention keeps for its thread's next call counts in the call that allocates it.
`peak_of` reads the process's resident memory: the highest since just before the call, less that before it,
less the tensors that the call returns. It sees every byte, whoever allocated it, but is exact only in a
process of its own, started as `memory_process.py` does. On CUDA both read torch's allocator.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Otherwise the profiler's library writes its progress to the terminal.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")

OWN_MAPPING_ABOVE = 64 * 1024
"""Bytes. glibc must give each block above this size its own mapping (MALLOC_MMAP_THRESHOLD_), so that freed
blocks return to the system at once and none is reused unseen."""


def can_measure(device: torch.device) -> bool:
    """Whether `peak_of` works here: on CUDA, and on Linux where /proc allows it."""
    return device.type == "cuda" or (CLEAR_REFS.exists() and os.access(CLEAR_REFS, os.W_OK))


def peak_of(call: Callable[[], Sequence[Tensor]], device: torch.device) -> int:
    """Bytes that `call` holds at its peak beyond what was held before, less the tensors that it returns."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
    else:
        _trim()
        CLEAR_REFS.write_text("5")  # the highest resident size starts again from the present one
        before = _resident("VmRSS")
        results = call()
        peak = _resident("VmHWM")
    return max(0, peak - before - _bytes(results))


def peak_allocated_beyond(call: Callable[[], Sequence[Tensor]], device: torch.device) -> int:
    """`peak_allocated`, less the tensors that the call returns."""
    returned: list[int] = []
    peak = peak_allocated(lambda: returned.append(_bytes(call())), device)
    return max(0, peak - returned[0])


def peak_allocated(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that torch has allocated during `call()` at its peak, beyond what it had before.

    What `call` returns counts; parameters' gradients that exist before the call do not.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    results: Any = profile.profiler
    held = peak = 0
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def _trim() -> None:
    """Give freed heap pages back to the system (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
