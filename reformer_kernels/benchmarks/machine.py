"""The machine, the versions and the commit that run on it, and how fast it multiplies and copies."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from reformer_kernels.benchmarks.timing import Seconds, Spread, Timed, between, clock, mark

PACKAGES = ("reformer-kernels", "torch", "triton", "numpy", "transformers", "reformer-pytorch")


@cache
def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """The commit of the checkout that this package runs from, "+" added where files differ; None outside."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():  # a package installed inside some other project's checkout
        return None
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()


def available_memory() -> int | None:
    """Bytes that a new allocation may take; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def describe(device: torch.device) -> dict[str, Any]:
    """Processor, threads, system and Python, and the GPU where `device` is one."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def versions() -> dict[str, str | None]:
    """The installed versions of what is measured; None where a package is not installed."""
    torch_version = str(torch.__version__)  # with its build, such as +cpu
    return {package: version_of(package) for package in PACKAGES} | {"torch": torch_version}


def provenance(device: torch.device) -> dict[str, Any]:
    """What every file of results says about its origin: start, arguments, machine, commit and versions."""
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "arguments": sys.argv[1:],
        "machine": describe(device),
        "commit": commit(),
        "versions": versions(),
    }


@dataclass(frozen=True)
class Rates:
    """The best rates that torch reaches on the machine, in the same run as the results beside them."""

    matmul_gflops: float
    copy_gbs: float
    """GB/s; bytes read and bytes written both count."""


def _product_size(device: torch.device, dtype: torch.dtype) -> int:
    """The size of a square product that takes some hundredths of a second.

    It is large enough to run at full rate, and short even where the processor has no instructions for the
    dtype, as many CPUs have none for bfloat16.
    """
    size, most = (256, 2048) if device.type == "cpu" else (1024, 8192)
    while size < most:
        a = torch.ones(size, size, device=device, dtype=dtype)
        torch.matmul(a, a)
        start = clock(device)
        torch.matmul(a, a)
        if clock(device) - start > 0.01:
            break
        size *= 2
    return size


class RateMeter:
    """Times a square matrix product in `dtype`, and a copy too large for any cache.

    Both run alternately with the benchmark's own calls, so that a share of the machine's rate compares what
    ran in the same minutes.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.size = _product_size(device, dtype)
        self.count = (64 if device.type == "cpu" else 512) * 2**20 // 4
        self.a = torch.randn(self.size, self.size, device=device).to(dtype)
        self.b = torch.randn(self.size, self.size, device=device).to(dtype)
        self.product = torch.empty_like(self.a)
        self.source = torch.ones(self.count, device=device)
        self.target = torch.zeros_like(self.source)
        self.seconds: tuple[list[float], list[float]] = ([], [])

    def _multiply(self) -> dict[str, Seconds]:
        start = mark(self.device)
        torch.matmul(self.a, self.b, out=self.product)
        return {"seconds": between(start, mark(self.device))}

    def _copy(self) -> dict[str, Seconds]:
        start = mark(self.device)
        self.target.copy_(self.source)
        return {"seconds": between(start, mark(self.device))}

    def timed(self) -> list[Timed]:
        """The product and the copy, for the timing harness."""
        return [Timed(self._multiply), Timed(self._copy)]

    def take(self, timed: Sequence[Timed]) -> None:
        """Keep the samples of what `timed` returned, once they have run."""
        for kept, one in zip(self.seconds, timed, strict=True):
            kept += one.samples["seconds"]

    def rates(self) -> Rates:
        multiply, copy = (Spread.of(kept).median for kept in self.seconds)
        return Rates(2 * self.size**3 / multiply / 1e9, 2 * 4 * self.count / copy / 1e9)
