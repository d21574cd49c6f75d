"""`reformer-kernels info`: what runs on this machine, and why the rest does not."""

from __future__ import annotations

import json
import platform
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from reformer_kernels import _native
from reformer_kernels._backend import resolve_backend, resolve_sort_backend
from reformer_kernels.benchmarks import machine
from reformer_kernels.cli.arguments import new_console

EVERYTHING, SORT = "all operations", "bucket_sort"

BACKENDS = (
    ("reference", "cpu", "PyTorch", EVERYTHING),
    ("native", "cpu", "C++", EVERYTHING),
    ("native", "cuda", "CUDA C++", SORT),
    ("triton", "cuda", "Triton", EVERYTHING),
)
"""Each back end with its device, its language and what it covers."""


def _check_runs(backend: str, device: str, covers: str) -> None:
    """Raises an error that says why where a back end cannot run."""
    if covers == SORT and _native.CUDA_MISSING is not None:
        raise RuntimeError(f"{_native.CUDA_MISSING}; bucket_sort on CUDA tensors runs in Triton")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device")
    if covers == SORT:
        resolve_sort_backend(backend, torch.device(device))
    else:
        resolve_backend(backend, torch.device(device), torch.float32)


def gather() -> dict[str, Any]:
    """What `info` prints, as plain values."""
    native = _native.info()
    backends = []
    for backend, device, language, covers in BACKENDS:
        try:
            _check_runs(backend, device, covers)
            reason = None
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = str(error)
        backends.append(
            {
                "backend": backend,
                "device": device,
                "language": language,
                "covers": covers,
                "available": reason is None,
                "reason": reason,
            }
        )
    return {
        "version": machine.version_of("reformer-kernels"),
        "commit": machine.commit(),
        "python": platform.python_version(),
        "versions": machine.versions(),
        "cpu": machine.cpu_name(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "native": native,
        "backends": backends,
    }


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, processors, and which back ends run here (and why others do not)."""
    facts = gather()
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    console = new_console()
    native = facts["native"]
    simd = "none in use, as the native extension is not available"
    if native["available"]:
        simd = f"{native['isa']}: {native['isa_reason']}"
    if native["compiled_isas"]:
        simd += f" (built: {', '.join(native['compiled_isas'])})"
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    version = facts["version"] or "not installed (running from a source tree)"
    table.add_row("reformer-kernels", version + (f", commit {facts['commit']}" if facts["commit"] else ""))
    for package in ("torch", "triton"):
        table.add_row(package, facts["versions"][package] or "not installed")
    table.add_row("python", facts["python"])
    table.add_row("CPU", facts["cpu"])
    table.add_row("SIMD", simd)
    table.add_row("threads", str(facts["threads"]))
    table.add_row("GPU", ", ".join(facts["gpus"]) or "none that torch finds")
    console.print(table, highlight=False)
    backends = Table()
    for title in ("back end", "device", "language", "covers", "runs here", "why not"):
        backends.add_column(title, overflow="fold")
    for row in facts["backends"]:
        runs = "[green]yes[/]" if row["available"] else "[red]no[/]"
        backends.add_row(
            row["backend"], row["device"], row["language"], row["covers"], runs, row["reason"] or ""
        )
    console.print(backends)
