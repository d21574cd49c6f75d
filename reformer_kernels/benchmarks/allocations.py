"""Peak memory of a call as torch's allocator sees it: exact, in this process, the same in every run.

`benchmarks.memory` measures what the system sees, in a process of its own. This counts tensors
alone, which is what the memory of activations is about.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

# The profiler's library writes its progress to the terminal otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_allocated(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that torch has allocated during `call()` at its worst, beyond what it had before.

    Parameters' gradients that exist before the call do not count; what `call` returns does.
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
    now = peak = 0
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
