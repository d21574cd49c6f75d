"""Peak resident memory of benchmark calls, measured in a process of its own.

Run as `python -m reformer_kernels.benchmarks.memory_process`, this module reads requests as lines of JSON and
answers each with a line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from reformer_kernels.benchmarks.memory import OWN_MAPPING_ABOVE, peak_of
from reformer_kernels.benchmarks.registry import OPERATIONS
from reformer_kernels.benchmarks.sizes import Sizes

SHORT_LENGTH = 2048
"""Calls on more tokens than this are warmed up at this length."""


class Request(NamedTuple):
    operation: str
    name: str
    sizes: Sizes
    backward: bool


def measure(request: Request) -> dict[str, int]:
    """Working memory in bytes by phase, measured in this process."""
    sizes, build = request.sizes, OPERATIONS[request.operation].build
    short = dataclasses.replace(sizes, length=min(sizes.length, SHORT_LENGTH))
    for run in build(request.name, short).passes(request.backward).values():
        run()
    call = build(request.name, sizes)
    device = torch.device(sizes.device)
    return {phase: peak_of(run, device) for phase, run in call.passes(request.backward).items()}


def measure_all(requests: Sequence[Request], threads: int) -> Iterator[dict[str, int] | str]:
    """The outcome of each request, from one fresh process: bytes by phase, or why there are none."""
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(OWN_MAPPING_ABOVE), MALLOC_MMAP_MAX_=str(10**6))
    # The process must find the package where this one found it, whatever folder it starts in.
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path[1:]])
    pending = list(requests)
    while pending:
        with subprocess.Popen(
            [sys.executable, "-m", "reformer_kernels.benchmarks.memory_process"],
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
                    request = pending.pop(0)
                    message = {**request._asdict(), "sizes": request.sizes.to_json(), "threads": threads}
                    try:
                        process.stdin.write(json.dumps(message) + "\n")
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
        message: dict[str, Any] = json.loads(line)
        torch.set_num_threads(message.pop("threads"))
        sizes = Sizes(**message.pop("sizes"))
        try:
            answer: Any = measure(Request(sizes=sizes, **message))
        except Exception as error:  # goes into the table's notes; the process serves the next request
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
