"""`reformer-kernels inspect`: the machine code of the GPU kernels, compiled with no GPU present."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

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
from reformer_kernels.cli.inspect_tables import code_table, crossings_table, times_table, to_json
from reformer_kernels.config import MAX_CHUNK_LENGTH, MAX_HASHES
from reformer_kernels.gpu import machine_code, prediction
from reformer_kernels.gpu.architectures import ARCHITECTURES
from reformer_kernels.gpu.cost_model import Shape
from reformer_kernels.gpu.machine_code import Request
from reformer_kernels.gpu.prediction import Prediction, Question
from reformer_kernels.gpu.presets import PRESETS
from reformer_kernels.gpu.specializations import OPERATIONS, OPTIONS, WITH_PRESETS
from reformer_kernels.models.config import MAX_SIZE

SCHEMA = 1
DEFAULT_HEAD_DIM = 64
SHAPE = {
    "L": ("length", MAX_LENGTH),
    "H": ("heads", MAX_SIZE),
    "D": ("head_dim", MAX_HEAD_DIM),
    "hashes": ("n_hashes", MAX_HASHES),
    "chunk": ("chunk_length", MAX_CHUNK_LENGTH),
}
"""The parts of --shape: their names in `Shape` and the largest value of each."""

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in KERNEL_DTYPES}


def inspect(
    arch: Annotated[
        str, typer.Option(help=f"Architectures, separated by commas, or all: {', '.join(ARCHITECTURES)}.")
    ] = "sm_90",
    op: Annotated[
        str | None,
        typer.Option(help=f"Operations: {', '.join(OPERATIONS)}.", show_default="all"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help=f"Dtypes of the tensors, separated by commas, or all: {', '.join(DTYPES)}.")
    ] = "bfloat16",
    head_dim: Annotated[
        str | None,
        typer.Option(help="Head dimensions, separated by commas.", show_default=str(DEFAULT_HEAD_DIM)),
    ] = None,
    preset: Annotated[
        str, typer.Option(help=f"Kinds of attention, separated by commas: {', '.join(PRESETS)}.")
    ] = "all",
    options: Annotated[
        str | None,
        typer.Option(
            help="off: no padding and no dropout; all: every option of a kernel at once.",
            show_default=",".join(OPTIONS),
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="L=16384,H=8,D=64,hashes=4",
            help="Predict the times of attention on this shape: tokens, batch times heads, head dimension, "
            "hash rounds and chunk (64). Every part has a default.",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Processes that compile at once.", show_default="cores")
    ] = None,
    dump: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write each kernel's PTX, machine code and what was counted in it."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything to a JSON file.")
    ] = None,
) -> None:
    """Compile Triton kernels and show their machine code: registers, spills, loads, and what it costs.

    No GPU is needed. Faults of a kernel (spills, products without tensor cores, narrow loads or stores, too
    much shared memory) are listed, and then the exit code is 1. Cycles and times are predicted from the
    machine code, never measured.
    """
    architectures = _at_least_one("--arch", arch, ARCHITECTURES)
    presets = _at_least_one("--preset", preset, tuple(PRESETS))
    dtypes = [DTYPES[name] for name in _at_least_one("--dtype", dtype, tuple(DTYPES))]
    given = {"--op": op, "--head-dim": head_dim, "--options": options}
    unwanted = [name for name, value in given.items() if value is not None and shape is not None]
    if unwanted:
        raise usage_error(
            f"{unwanted[0]} cannot be given with --shape, which predicts whole calls of attention"
        )
    sizes = None if shape is None else parse_shape(shape)
    requests = [
        Request(architecture, one, size, level, (operation,), (kind,), dump=dump)
        for architecture in architectures
        for operation in (OPERATIONS if op is None else _at_least_one("--op", op, OPERATIONS))
        for kind in (presets if operation in WITH_PRESETS else presets[:1])
        for one in dtypes
        for size in integers("--head-dim", head_dim or str(DEFAULT_HEAD_DIM), most=MAX_HEAD_DIM)
        for level in (OPTIONS if options is None else _at_least_one("--options", options, OPTIONS))
    ]
    workers = positive(
        "--processes", processes if processes is not None else os.cpu_count() or 1, MAX_THREADS
    )
    writable_file("--json", json_file)
    if dump is not None:
        _make_folder("--dump", dump)
    reason = machine_code.unavailable()
    if reason is not None:
        raise usage_error(f"kernels cannot be compiled here: {reason}")
    predictions: list[Prediction] = []
    if sizes is not None:
        questions = [
            Question(architecture, kind, one, dataclasses.replace(sizes, bits=8 * one.itemsize), dump)
            for architecture in architectures
            for kind in presets
            for one in dtypes
        ]
        predictions = _in_processes("predicting", prediction.answer, questions, workers)
        kernels = [list(one.kernels) for one in predictions]
    else:
        kernels = _in_processes("compiling", machine_code.inspect, requests, workers)
    inspected = [row for rows in kernels for row in rows]
    console = new_console()
    for architecture in architectures:
        console.print(code_table(architecture, inspected))
        mine = [one for one in predictions if one.question.architecture == architecture]
        if mine:
            console.print(times_table(architecture, mine))
        compared = [one for one in mine if one.crossings]
        if compared:
            console.print(crossings_table(compared))
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
            "predicted": [to_json(one) for one in predictions],
        }
        write_atomically(json_file, json.dumps(document, indent=1) + "\n")
        console.print(f"Wrote {json_file}")
    if any(row.faults for row in inspected):
        raise typer.Exit(1)


def parse_shape(text: str) -> Shape:
    """The shape that --shape gives, such as L=16384,H=8,D=64,hashes=4; what is left out has its default."""
    most = {name: limit for name, (_, limit) in SHAPE.items()}
    fields: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if name not in SHAPE or not equals or not value.isdecimal():
            raise usage_error(
                f"--shape must be positive integers named {', '.join(SHAPE)}, such as "
                f"L=16384,H=8,D=64,hashes=4, got {part.strip()!r}"
            )
        if SHAPE[name][0] in fields:
            raise usage_error(f"--shape gives {name} twice")
        fields[SHAPE[name][0]] = positive(f"--shape {name}", int(value), most[name])
    return dataclasses.replace(Shape(), **fields)


def _in_processes(
    doing: str, work: Callable[[Asked], Answer], asked: Sequence[Asked], processes: int
) -> list[Answer]:
    answers: list[Answer] = []
    with Console(stderr=True).status(doing) as status:
        for answer in machine_code.in_processes(work, asked, processes):
            answers.append(answer)
            status.update(f"{doing}: {len(answers)} of {len(asked)}")
    return answers


def _make_folder(name: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise usage_error(f"{name}: {path} cannot be made a folder ({error.strerror})") from error


def _at_least_one(name: str, text: str, accepted: Sequence[str]) -> tuple[str, ...]:
    if text.strip() == "all" and "all" not in accepted:
        return tuple(accepted)
    values = choices(name, text, accepted)
    if not values:
        raise usage_error(f"{name} must name at least one of {', '.join(accepted)}")
    return values
