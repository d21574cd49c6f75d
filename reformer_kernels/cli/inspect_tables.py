"""The tables that `reformer-kernels inspect` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from reformer_kernels.benchmarks.tables import seconds
from reformer_kernels.gpu.architectures import CHIPS
from reformer_kernels.gpu.machine_code import Inspected, MachineCode
from reformer_kernels.gpu.prediction import FLASH_RATES, LONGEST, SHARES, Prediction, flash_seconds


def code_table(architecture: str, inspected: Sequence[Inspected]) -> Table:
    table = Table(
        title=f"Machine code, {architecture}; predicted cycles of a multiprocessor for a pair: of issue, of "
        "the tensor cores, and of what is busiest",
        title_justify="left",
    )
    for title in ("kernel", "preset", "dtype"):
        table.add_column(title, no_wrap=True)
    for title in ("D", "options", "tile", "regis-\nters", "spill\nbytes", "shared\nbytes"):
        table.add_column(title, justify="right", no_wrap=title == "tile")
    table.add_column("blocks that fit")
    table.add_column("issue", justify="right")
    table.add_column("tensor", justify="right")
    for title in ("busiest", "loads, stores\nby bytes", "faults"):
        table.add_column(title)
    previous = None
    for row in inspected:
        code = row.code
        if code.architecture != architecture:
            continue
        names = (code.kernel, code.preset or "", code.dtype)
        if previous not in (None, names):
            table.add_section()
        first, previous = previous != names, names
        table.add_row(
            *(names if first else ("", "", "")),
            str(code.head_dim),
            code.options,
            str(code.tile or f"w{code.warps}"),
            *map(str, (code.registers, code.spill_bytes, code.shared_bytes)),
            f"{code.resident_blocks} by {code.limited_by}",
            *_per_pair(code),
            f"{_widths(code.loads)}\n{_widths(code.stores)}",
            f"[bold red]{len(row.faults)}[/]" if row.faults else "",
        )
    return table


def times_table(architecture: str, predictions: Sequence[Prediction]) -> Table:
    """The predicted times of each pass of each prediction, at each share of the perfect rate of issue."""
    shape, chip = predictions[0].question.shape, CHIPS[architecture]
    table = Table(
        title=f"Predicted times on an {chip.rates.device}: L={shape.length}, H={shape.heads}, "
        f"D={shape.head_dim}, {shape.n_hashes} hashes, chunk {shape.chunk_length}; at a share of the perfect "
        "rate of issue",
        title_justify="left",
    )
    for title in ("preset", "dtype", "pass"):
        table.add_column(title, no_wrap=True)
    table.add_column("launches", justify="right")
    for share in SHARES:
        table.add_column(f"predicted,\n{100 * share:.0f} %", justify="right")
        table.add_column("mostly")
    table.add_column("L2 alone", justify="right")
    table.add_column("memory alone", justify="right")
    for one in predictions:
        table.add_section()
        names = [one.question.preset, str(one.question.dtype).removeprefix("torch.")]
        for row in one.passes:
            times = [(row.device_seconds(share), row.bound(share)) for share in SHARES]
            table.add_row(
                *names,
                row.name,
                str(row.launches),
                *(cell for value, bound in times for cell in (seconds(value), bound)),
                seconds(sum(kernel.cache_seconds for kernel in row.kernels)),
                seconds(row.memory_seconds),
            )
            names = ["", ""]
        whole = {"whole call, CUDA graph": one.device_seconds, "whole call, eager": one.eager_seconds}
        for title, predicted in whole.items():
            cells = [cell for share in SHARES for cell in (seconds(predicted(share)), "")]
            table.add_row("", "", title, str(one.launches), *cells, "", "")
    return table


def crossings_table(predictions: Sequence[Prediction]) -> Table:
    """From which length on predictions are ahead of dense attention, and how far on this shape."""
    table = Table(
        title="Forward + backward, predicted, against dense causal attention at its published rates",
        title_justify="left",
    )
    for title in ("preset", "dtype", "dense attention"):
        table.add_column(title, no_wrap=True)
    table.add_column("on this shape", justify="right")
    for share in SHARES:
        table.add_column(f"ahead from L,\n{100 * share:.0f} %", justify="right")
        table.add_column("times as fast\non this shape", justify="right")
    for one in predictions:
        for name, rate in FLASH_RATES.items():
            flash = flash_seconds(one.question.shape, rate)
            cells = []
            for share in SHARES:
                length = one.crossings[name, share]
                cells.append(f"beyond {LONGEST}" if length is None else str(length))
                cells.append(f"{flash / one.device_seconds(share):.1f}")
            dtype = str(one.question.dtype).removeprefix("torch.")
            table.add_row(
                one.question.preset, dtype, f"{name}, {rate / 1e12:.0f} TFLOP/s", seconds(flash), *cells
            )
    return table


def to_json(one: Prediction) -> dict[str, Any]:
    """A prediction as JSON can hold it."""
    question = one.question
    return {
        "architecture": question.architecture,
        "device": CHIPS[question.architecture].rates.device,
        "preset": question.preset,
        "dtype": str(question.dtype).removeprefix("torch."),
        **dataclasses.asdict(question.shape),
        "launches": one.launches,
        "passes": [
            dataclasses.asdict(row)
            | {"predicted_seconds": {str(share): row.device_seconds(share) for share in SHARES}}
            for row in one.passes
        ],
        "predicted_seconds": {str(share): one.device_seconds(share) for share in SHARES},
        "predicted_eager_seconds": {str(share): one.eager_seconds(share) for share in SHARES},
        "crossings": [
            {"peer": name, "share": share, "length": length}
            for (name, share), length in one.crossings.items()
        ],
    }


def _per_pair(code: MachineCode) -> tuple[str, str, str]:
    """Predicted cycles for a pair: of issue, of the tensor cores, of what is busiest."""
    steady = code.issue.steady
    if not steady.pairs:
        return "", "", ""
    issue, tensor, most = (steady.cycles[name] / steady.pairs for name in ("issue", "tensor", steady.bound))
    return f"{issue:.3f}", f"{tensor:.3f}", f"{most:.3f} {steady.bound}"


def _widths(counts: dict[int, int]) -> str:
    return ", ".join(f"{width}: {count}" for width, count in reversed(counts.items())) or "none"
