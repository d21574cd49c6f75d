"""`reformer-kernels inspect`: the machine code of the GPU kernels, compiled with no GPU present."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from reformer_kernels._files import write_atomically
from reformer_kernels._limits import KERNEL_DTYPES, MAX_HEAD_DIM, MAX_LENGTH
from reformer_kernels.benchmarks import machine
from reformer_kernels.cli.arguments import (
    MAX_THREADS,
    choices,
    integers,
    new_console,
    positive,
    usage_error,
    writable_file,
)
from reformer_kernels.cli.inspect_tables import code_table, floor_table
from reformer_kernels.config import MAX_CHUNK_LENGTH, MAX_HASHES
from reformer_kernels.gpu import cost_model, machine_code
from reformer_kernels.gpu.architectures import ARCHITECTURES, CHIPS
from reformer_kernels.gpu.machine_code import Inspected, Request
from reformer_kernels.gpu.presets import PRESETS
from reformer_kernels.gpu.specializations import HEAD_DIMS, OPERATIONS, OPTIONS, WITH_PRESETS
from reformer_kernels.models.config import MAX_SIZE

SCHEMA = 1
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in KERNEL_DTYPES}


def inspect(
    arch: Annotated[
        str, typer.Option(help=f"Architectures, separated by commas: {', '.join(ARCHITECTURES)}.")
    ] = "sm_90",
    op: Annotated[
        str | None,
        typer.Option(help=f"Operations: {', '.join(OPERATIONS)}.", show_default="all"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtypes of the tensors, separated by commas.")] = ",".join(
        DTYPES
    ),
    head_dim: Annotated[str, typer.Option(help="Head dimensions, separated by commas.")] = ",".join(
        map(str, HEAD_DIMS)
    ),
    preset: Annotated[
        str, typer.Option(help=f"Kinds of attention, separated by commas: {', '.join(PRESETS)}.")
    ] = ",".join(PRESETS),
    options: Annotated[
        str, typer.Option(help="off: the least that a kernel can do; all: all of its options at once.")
    ] = "off,all",
    heads: Annotated[int, typer.Option(help="Batch times heads, for the predicted time.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Sequence length, for the predicted time.")] = 16384,
    hashes: Annotated[int, typer.Option(help="Hash rounds, for the predicted time.")] = 4,
    chunk: Annotated[int, typer.Option(help="Chunk length, for the predicted time.")] = 64,
    processes: Annotated[
        int | None, typer.Option(help="Processes that compile at once.", show_default="cores")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything to a JSON file.")
    ] = None,
) -> None:
    """Compile every Triton kernel and show its machine code: registers, spills, tensor cores, loads.

    No GPU is needed. Faults of a kernel (spills, products without tensor cores, narrow loads, too much shared
    memory) are listed, and then the exit code is 1. Times are predicted from bytes and products.
    """
    architectures = _at_least_one("--arch", arch, ARCHITECTURES)
    operations = OPERATIONS if op is None else _at_least_one("--op", op, OPERATIONS)
    presets = _at_least_one("--preset", preset, tuple(PRESETS))
    requests = [
        Request(architecture, DTYPES[name], size, level, (operation,), (kind,))
        for architecture in architectures
        for operation in operations
        for kind in (presets if operation in WITH_PRESETS else presets[:1])
        for name in _at_least_one("--dtype", dtype, tuple(DTYPES))
        for size in integers("--head-dim", head_dim)
        for level in _at_least_one("--options", options, OPTIONS)
    ]
    for request in requests:
        positive("--head-dim", request.head_dim, most=MAX_HEAD_DIM)
    shape = cost_model.Shape(
        heads=positive("--heads", heads, MAX_SIZE),
        length=positive("--seq-len", seq_len, MAX_LENGTH),
        n_hashes=positive("--hashes", hashes, MAX_HASHES),
        chunk_length=positive("--chunk", chunk, MAX_CHUNK_LENGTH),
    )
    workers = positive(
        "--processes", processes if processes is not None else os.cpu_count() or 1, MAX_THREADS
    )
    writable_file("--json", json_file)
    reason = machine_code.unavailable()
    if reason is not None:
        raise usage_error(f"kernels cannot be compiled here: {reason}")
    inspected: list[Inspected] = []
    with Console(stderr=True).status("compiling") as status:
        for done, kernels in enumerate(machine_code.inspect_all(requests, workers), start=1):
            inspected += kernels
            status.update(f"compiling: {done} of {len(requests)}")
    floors = [
        _floor(operation, architecture, dataclasses.replace(shape, head_dim=size, bits=bits))
        for architecture in architectures
        for operation in cost_model.OPERATIONS
        for size, bits in dict.fromkeys((r.head_dim, r.dtype.itemsize * 8) for r in requests)
    ]
    console = new_console()
    for architecture in architectures:
        console.print(code_table(architecture, inspected))
        console.print(floor_table(architecture, shape, floors))
    for row in inspected:
        for fault in row.faults:
            console.print(f"[bold red]FAULT[/] {row.code}: {fault}", highlight=False)
    if json_file is not None:
        document = {
            "schema": SCHEMA,
            "commit": machine.commit(),
            "versions": machine.versions(),
            "units": {"registers": "a thread", "spill_bytes": "a thread", "shared_bytes": "a block"},
            "kernels": [row.code.to_json() | {"faults": row.faults} for row in inspected],
            "predicted": floors,
        }
        write_atomically(json_file, json.dumps(document, indent=1) + "\n")
        console.print(f"Wrote {json_file}")
    if any(row.faults for row in inspected):
        raise typer.Exit(1)


def _at_least_one(name: str, text: str, accepted: Sequence[str]) -> tuple[str, ...]:
    values = choices(name, text, accepted)
    if not values:
        raise usage_error(f"{name} must name at least one of {', '.join(accepted)}")
    return values


def _floor(operation: str, architecture: str, shape: cost_model.Shape) -> dict[str, Any]:
    rates = CHIPS[architecture].rates
    floor = cost_model.floor(operation, shape, rates)
    return {
        "operation": operation,
        "architecture": architecture,
        "device": rates.device,
        "rates": "measured" if rates.measured else "data sheet",
        **dataclasses.asdict(shape),
        "bytes": floor.bytes,
        "operations": floor.operations,
        "predicted_seconds": floor.seconds,
        "bound_by": floor.bound,
    }
