"""`reformer-kernels bench compare` and `bench plot`: what is done with results that --json wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from reformer_kernels.benchmarks import plots, results, tables
from reformer_kernels.benchmarks.compare import Change, Comparison
from reformer_kernels.benchmarks.compare import compare as compare_results
from reformer_kernels.cli.arguments import new_console, usage_error, writable_file

VERDICTS = {
    "faster": "[green]faster[/]",
    "slower": "[red]slower[/]",
    "same": "same",
    "unknown": "too few samples",
}


def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="Results before.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="Results after.")],
    everything: Annotated[bool, typer.Option("--all", help="Show rows that did not change too.")] = False,
) -> None:
    """Say what changed between two results beyond the noise.

    A time changed if the ranges from the 20th to the 80th percentile of its samples do not overlap and the
    medians differ by more than 2%. Memory changed if it differs by more than 2% and 256 KiB.
    """
    first, second = _read(before), _read(after)
    comparison = compare_results(first, second)
    console = new_console(100)
    for path, document in ((before, first), (after, second)):
        facts = document["machine"]
        console.print(
            f"{path}: {document['operation']}, {facts.get('gpu', facts['cpu'])}, commit {document['commit']}",
            highlight=False,
        )
    if not comparison.changes:
        console.print(
            f"No row is in both: {before.name} has {comparison.only_before} rows of {first['operation']}, "
            f"{after.name} {comparison.only_after} of {second['operation']}. Rows are compared that have the "
            "same operation, call, pass and sizes.",
            highlight=False,
        )
        return
    for warning in comparison.warnings:
        console.print(f"[yellow]Note:[/] {warning}.", highlight=False)
    _print(comparison, everything)


def _print(comparison: Comparison, everything: bool) -> None:
    console = new_console(100)
    changes = [
        change
        for change in comparison.changes
        if everything or change.verdict in ("faster", "slower") or change.memory_changed
    ]
    if changes:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for title in ("call", "L", "rounds", "pass"):
            table.add_column(title, justify="right" if title in ("L", "rounds") else "left")
        for title in ("before", "after", "time", "", "memory"):
            table.add_column(title, justify="left" if not title else "right", no_wrap=True)
        for change in changes:
            table.add_row(*_cells(change))
        console.print(table)
    counts = dict.fromkeys(VERDICTS, 0)
    for change in comparison.changes:
        counts[change.verdict] += 1
    memory = sum(change.memory_changed for change in comparison.changes)
    console.print(
        f"{counts['faster']} faster, {counts['slower']} slower, {counts['same']} the same within the noise"
        + (f", {counts['unknown']} with too few samples to say" if counts["unknown"] else "")
        + f"; memory changed in {memory}.",
        highlight=False,
    )
    if comparison.only_before or comparison.only_after:
        console.print(
            f"Rows in one file alone: {comparison.only_before} before, {comparison.only_after} after.",
            highlight=False,
        )


def _cells(change: Change) -> list[str]:
    row = change.after
    name = row["name"] + (f", {row['variant']}" if row.get("variant") else "")
    memory = change.memory if change.memory_changed else None
    return [
        name,
        str(row["length"]),
        str(row.get("n_hashes") or ""),
        tables.PHASES.get(row["phase"], row["phase"]),
        tables.seconds(change.before["median"]),
        tables.seconds(row["median"]),
        _percent(change.time),
        VERDICTS[change.verdict],
        "" if memory is None else _percent(memory),
    ]


def _percent(factor: float) -> str:
    return f"{100 * (factor - 1):+.1f} %" if factor < 2 else f"{factor:.1f}x"


def plot(
    files: Annotated[list[Path], typer.Argument(metavar="A.json [B.json ...] FILE")],
) -> None:
    """Draw saved results of one operation: time and memory against length, as .png or .svg."""
    if len(files) < 2:
        raise usage_error(f"give the results and then the file to draw, got {files[0]} alone")
    *sources, file = files
    writable_file("FILE", file)
    try:
        plots.check_plot_file(file)
        plots.draw([_read(source) for source in sources], file)
    except plots.PlotError as error:
        raise usage_error(str(error)) from error
    new_console(100).print(f"Wrote {file}", highlight=False)


def _read(path: Path) -> results.Document:
    try:
        return results.read(path)
    except results.ResultsError as error:
        raise usage_error(str(error)) from error
