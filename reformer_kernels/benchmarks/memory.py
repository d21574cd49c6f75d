"""Peak working memory of a call: what it holds beyond its inputs, outputs and gradients.

On the CPU a fresh process makes the call, and the system's own record of its resident memory is read: the
highest since just before the call, less that before it, less the outputs and gradients. It sees every byte,
whoever allocated it. For that record to be exact, glibc is told to give each block above 64 KiB its own
mapping, so that freed blocks return to the system at once and none is reused unseen. On CUDA torch's
allocator tells.

Run as `python -m reformer_kernels.benchmarks.memory`, this module reads requests as lines of JSON and
answers each with a line of JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reformer_kernels.benchmarks.problem import Problem

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
OWN_MAPPING_ABOVE = 64 * 1024
SHORT_LENGTH = 2048
"""Problems longer than this are warmed up at this length."""


def can_measure(device: torch.device) -> bool:
    return device.type == "cuda" or (CLEAR_REFS.exists() and os.access(CLEAR_REFS, os.W_OK))


def _resident(field: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def peak_of(call: Callable[[], Sequence[Tensor]], device: torch.device) -> int:
    """Bytes that `call` holds at its worst beyond what was held before, less the tensors that it returns."""
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
        CLEAR_REFS.write_text("5")  # the highest resident size is the present one again
        before = _resident("VmRSS")
        results = call()
        peak = _resident("VmHWM")
    kept = sum(tensor.numel() * tensor.element_size() for tensor in results)
    return max(0, peak - before - kept)


def _trim() -> None:
    """Give freed heap pages back to the system (glibc)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def measure(operation: str, name: str, problem: Problem, backward: bool) -> dict[str, int]:
    """Working memory in bytes by phase, measured in this process."""
    from reformer_kernels.benchmarks.workloads import build

    device = torch.device(problem.device)
    short = dataclasses.replace(problem, length=min(problem.length, SHORT_LENGTH))
    warm = build(operation, name, short)
    warm.forward()
    if backward and warm.differentiable:
        warm.forward_and_backward()
    del warm

    workload = build(operation, name, problem)
    result = {"forward": peak_of(lambda: [workload.forward()], device)}
    if backward and workload.differentiable:
        out_shape_source = workload.inputs[-1]  # every row's output has the shape of its values
        workload.grad_out = torch.randn(out_shape_source.shape, device=device).to(out_shape_source.dtype)

        def both() -> list[Tensor]:
            out, gradients, _ = workload.forward_and_backward()
            return [out, *gradients]

        result["forward+backward"] = peak_of(both, device)
    return result


def measure_all(
    requests: Sequence[tuple[str, str, Problem, bool]], threads: int
) -> Iterator[dict[str, int] | str]:
    """Measure each request in one fresh process: bytes by phase, or why there is no measurement."""
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(OWN_MAPPING_ABOVE), MALLOC_MMAP_MAX_=str(10**6))
    # The package must be found there as it was here, whatever the folder.
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path[1:]])
    pending = list(requests)
    while pending:
        with subprocess.Popen(
            [sys.executable, "-m", "reformer_kernels.benchmarks.memory"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                answered = True
                while pending and answered:
                    operation, name, problem, backward = pending.pop(0)
                    request = {"operation": operation, "name": name, "problem": problem.to_json()}
                    line = json.dumps({**request, "backward": backward, "threads": threads})
                    try:
                        process.stdin.write(line + "\n")
                        process.stdin.flush()
                        answer = process.stdout.readline()
                    except BrokenPipeError:
                        answer = ""
                    answered = bool(answer.strip())
                    yield json.loads(answer) if answered else "the measuring process died"
            finally:
                process.kill()


def _serve() -> None:
    # Answers alone go to standard output, whatever the libraries print.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        torch.set_num_threads(request["threads"])
        problem = Problem(**request["problem"])
        try:
            answer: Any = measure(request["operation"], request["name"], problem, request["backward"])
        except Exception as error:  # told to the reader of the table; the process serves the next one
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
