"""The tables that `reformer-kernels inspect` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from reformer_kernels.gpu import cost_model
from reformer_kernels.gpu.architectures import CHIPS
from reformer_kernels.gpu.machine_code import Inspected, MachineCode


def code_table(architecture: str, inspected: Sequence[Inspected]) -> Table:
    table = Table(
        title=f"Machine code, {architecture}; predicted cycles of a multiprocessor for a pair: of issue, of "
        "the tensor cores, and of what is busiest",
        title_justify="left",
    )
    for title in ("kernel", "preset", "dtype"):
        table.add_column(title, no_wrap=True)
    for title in ("D", "options", "tile", "registers", "spill\nbytes", "shared\nbytes", "resident\nblocks"):
        table.add_column(title, justify="right")
    table.add_column("occupancy, limited by")
    table.add_column("issue", justify="right")
    table.add_column("tensor", justify="right")
    for title in ("busiest", "loads by bytes", "stores by bytes", "faults"):
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
            *map(str, (code.registers, code.spill_bytes, code.shared_bytes, code.resident_blocks)),
            f"{100 * code.occupancy:.0f} %, {code.limited_by}",
            *_per_pair(code),
            _widths(code.loads),
            _widths(code.stores),
            f"[bold red]{len(row.faults)}[/]" if row.faults else "",
        )
    return table


def floor_table(architecture: str, shape: cost_model.Shape, floors: Sequence[dict[str, Any]]) -> Table:
    rates = CHIPS[architecture].rates
    basis = "measured rates" if rates.measured else "the data sheet's rates"
    table = Table(
        title=f"Predicted least time on an {rates.device} at {basis}: {shape.heads} heads, "
        f"L = {shape.length}, {shape.n_hashes} rounds, chunk {shape.chunk_length}",
        title_justify="left",
    )
    for title in ("operation", "bits", "D", "bytes", "operations", "predicted", "bound by"):
        table.add_column(title, justify="left" if title in ("operation", "bound by") else "right")
    for row in floors:
        if row["architecture"] == architecture:
            table.add_row(
                row["operation"],
                *map(str, (row["bits"], row["head_dim"])),
                f"{row['bytes'] / 1e6:.1f} M",
                f"{row['operations'] / 1e9:.2f} G",
                f"{row['predicted_seconds'] * 1e6:.1f} us",
                row["bound_by"],
            )
    return table


def _per_pair(code: MachineCode) -> tuple[str, str, str]:
    """Predicted cycles for a pair: of issue, of the tensor cores, of what is busiest."""
    steady = code.issue.steady
    if not steady.pairs:
        return "", "", ""
    issue, tensor, most = (steady.cycles[name] / steady.pairs for name in ("issue", "tensor", steady.bound))
    return f"{issue:.3f}", f"{tensor:.3f}", f"{most:.3f} {steady.bound}"


def _widths(counts: dict[int, int]) -> str:
    return ", ".join(f"{width}: {count}" for width, count in reversed(counts.items())) or "none"
