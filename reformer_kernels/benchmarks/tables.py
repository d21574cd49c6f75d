"""A benchmark's results as tables for a terminal, made from the JSON form of `results.py`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from reformer_kernels.benchmarks.registry import AXES, OPERATIONS
from reformer_kernels.benchmarks.results import FASTER_REFORMER, REFORMER_PEERS, Document

Row = dict[str, Any]

PHASES = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd", "training step": "step"}
SHORT_NAMES = {
    "torch SDPA": "SDPA",
    "Hugging Face": "HF",
    "torch.sort(stable)": "torch.sort",
    "nn.MultiheadAttention": "nn.MHA",
    "nn.TransformerEncoder": "nn.Encoder",
    FASTER_REFORMER: "faster Reformer",
}
"""Names that column titles shorten."""

TITLES = {
    "length": "L = {}",
    "batch": "batch {}",
    "heads": "{} heads",
    "head_dim": "head size {}",
    "width": "width {}",
    "layers": "{} layers",
    "d_ff": "d_ff {}",
    "vocabulary": "vocabulary {}",
    "n_hashes": "{} hash rounds",
    "chunk_length": "chunk {}",
    "variant": "{}",
    "dtype": "{}",
    "device": "{}",
}
"""How a title states each field of a row."""


def describe_machine(document: Document) -> str:
    facts, rates, row = document["machine"], document["rates"], document["rows"][0]
    processor, torch_version = facts.get("gpu", facts["cpu"]), document["versions"]["torch"]
    return (
        f"{processor}, {facts['threads']} threads, torch {torch_version}, "
        f"commit {document['commit']}\n{row['dtype']} matmul {number(rates['matmul_gflops'])} GFLOP/s, "
        f"copy {number(rates['copy_gbs'])} GB/s"
    )


def print_results(document: Document, console: Console, *, wide: bool = False) -> None:
    """The machine, a table for each length and other value that varies, checks and notes."""
    console.print(describe_machine(document), highlight=False, soft_wrap=False)
    for rows in split_tables(document["rows"]):
        console.print()
        console.print(_title(document["operation"], rows), style="bold", highlight=False)
        console.print(_fitting_table(rows, console, wide))
    for line in _notes(document, wide):
        console.print(line, highlight=False)


def split_tables(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each table: they differ in call, phase and number of hash rounds alone."""
    fields = [name for name in AXES.values() if name != "n_hashes"]

    def key(row: Row) -> tuple[str, ...]:
        return tuple(str(row.get(name)) for name in fields)

    return [list(group) for _, group in itertools.groupby(rows, key)]


def _title(operation: str, rows: Sequence[Row]) -> str:
    values = {
        name: {row.get(name) for row in rows if row.get(name) is not None} for name in (*TITLES, "causal")
    }
    return f"{operation}: {_describe({name: v.pop() for name, v in values.items() if len(v) == 1})}"


def _describe(sizes: dict[str, Any]) -> str:
    """Sizes in words, such as "L = 1024, 8 heads, float32, causal"."""
    parts = []
    for name, words in TITLES.items():
        value = sizes.get(name)
        if value not in (None, "") and (name, value) != ("device", "cpu"):
            text = words.format(value)
            parts.append(text.removesuffix("s") if value == 1 else text)
    if "causal" in sizes:
        parts.append("causal" if sizes["causal"] else "not causal")
    return ", ".join(parts)


def _fitting_table(rows: Sequence[Row], console: Console, wide: bool) -> Table:
    """The table, without its least important columns where the terminal is too narrow for them."""
    table = Table()
    for omitted in range(len(_optional_columns(rows, wide)) + 1):
        table = _table(rows, wide, omitted)
        if console.measure(table, options=console.options.update(width=1000)).maximum <= console.width:
            break
    return table


def _optional_columns(rows: Sequence[Row], wide: bool) -> list[str]:
    """Columns beside call, pass and median, the least important first."""
    ratios = dict.fromkeys(name for row in rows for name in row["ratios"] if name != FASTER_REFORMER)
    columns = [f"ratio {name}" for name in ratios if name in REFORMER_PEERS]
    columns += [f"ratio {name}" for name in ratios if name not in REFORMER_PEERS]
    if not wide:
        return ["memory", *columns]
    rates = ("gbs", "share_of_copy", "gflops", "share_of_matmul")
    measured = [name for name in rates if any(row.get(name) is not None for row in rows)]
    memory = [f"memory ratio {name}" for name in dict.fromkeys(n for r in rows for n in r["memory_ratios"])]
    faster = [f"ratio {FASTER_REFORMER}"] if set(REFORMER_PEERS) <= set(ratios) else []
    return [*memory, *measured, "n", "spread", *faster, "memory", *columns]


def _table(rows: Sequence[Row], wide: bool, omitted: int) -> Table:
    shown = set(_optional_columns(rows, wide)[omitted:])
    rounds = len({row["n_hashes"] for row in rows if row.get("n_hashes") is not None}) > 1
    columns: list[tuple[str, str]] = [("call", "call")]
    columns += [("rounds", "rounds")] if rounds else []
    columns += [("phase", "pass"), ("median", "median")]
    figures = [("spread", "20-80 %"), ("n", "n"), ("gflops", "GFLOP/s"), ("share_of_matmul", "of matmul")]
    figures += [("gbs", "GB/s"), ("share_of_copy", "of copy")]
    columns += [(key, title) for key, title in figures if key in shown]
    names = dict.fromkeys(name for row in rows for name in row["ratios"])
    columns += [(f"ratio {name}", f"vs {_short(name)}") for name in names if f"ratio {name}" in shown]
    columns += [("memory", "memory")] if "memory" in shown else []
    names = dict.fromkeys(name for row in rows for name in row.get("memory_ratios", ()))
    columns += [
        (f"memory ratio {name}", f"memory vs {_short(name)}")
        for name in names
        if f"memory ratio {name}" in shown
    ]

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for key, title in columns:
        justify: Any = "left" if key in ("call", "phase") else "right"
        table.add_column(
            title, justify=justify, no_wrap=True, style="bold" if key.startswith("ratio") else ""
        )
    previous = None
    for row in rows:
        call = (row["name"], row.get("n_hashes"))
        first = call != previous
        previous = call
        cells = [_cell(key, row) for key, _ in columns]
        if not first:
            cells[0] = ""
        style = "" if row["ours"] else "dim"
        table.add_row(*cells, style=style)
    return table


def _short(name: str) -> str:
    return SHORT_NAMES.get(name, name)


def _cell(key: str, row: Row) -> str:
    if key == "call":
        return str(row["name"])
    if key == "rounds":
        return "" if row["n_hashes"] is None else str(row["n_hashes"])
    if key == "phase":
        return PHASES.get(str(row["phase"]), str(row["phase"]))
    if key == "median":
        return seconds(row["median"])
    if key == "spread":
        return _range(row)
    if key == "n":
        return str(row["n"])
    if key == "memory":
        return memory(row["working_memory_bytes"])
    if key.startswith("share_of"):
        return "" if row[key] is None else f"{100 * row[key]:.0f} %"
    group, _, name = key.rpartition("ratio ")
    if name != key:
        value: float | None = row["memory_ratios" if group else "ratios"].get(name)
        return "" if value is None else f"{number(value)}x"
    rate: float | None = row[key]
    return number(rate)


def _checks(checks: Sequence[dict[str, Any]], wide: bool) -> list[str]:
    """A line for each check that failed; the others with the same peer and quantity share one."""
    lines = []
    passed: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for check in checks:
        if wide or not check["ok"]:
            mark = "[green]ok[/]" if check["ok"] else "[bold red]FAILED[/]"
            lines.append(f"{mark} {check['peer']} ({_describe(check['sizes'] or {})}): {check['text']}")
        else:
            passed.setdefault((check["peer"], check["quantity"]), []).append(check)
    for (peer, _), group in passed.items():
        worst = (min if group[0]["at_least"] else max)(group, key=lambda check: float(check["value"]))
        times = f", the worst of {len(group)}" if len(group) > 1 else ""
        lines.append(f"[green]ok[/] {peer}: {worst['text']}{times}")
    return lines


def _notes(document: Document, wide: bool) -> list[str]:
    operation = OPERATIONS.get(document["operation"])
    rows = document["rows"]
    on_gpu = str(rows[0].get("device", "cpu")).startswith("cuda")
    notes = ["", "median: time of one call" + (", by the GPU's own clock." if on_gpu else ".")]
    if any(row["ratios"] for row in rows):
        notes[-1] += " vs: how many times as long the other call takes."
    if any(row["working_memory_bytes"] is not None for row in rows):
        notes[-1] += " memory: what it holds at the peak beyond inputs, outputs and gradients"
        if operation is not None and operation.memory == "allocated":
            notes[-1] += ", as torch allocates it"
        notes[-1] += "."
    if operation is not None and operation.note:
        notes.append(operation.note)
    notes += _checks(document["checks"], wide)
    notes += [
        f"[yellow]Left out:[/] {left['name']} at L = {left['length']}: {left['reason']}."
        for left in document["left_out"]
    ]
    notes += [f"[yellow]Note:[/] {note}." for note in document["notes"]]
    return notes


def seconds(value: float) -> str:
    """A time with three significant digits in s, ms or us."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{number(value / scale)} {unit}"
    return f"{number(value / 1e-6)} us"


def memory(count: int | None) -> str:
    """Bytes in GiB, MiB or KiB."""
    if count is None:
        return ""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{number(count / 2**10)} KiB"


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _range(row: Row) -> str:
    """The 20th and 80th percentiles, in the unit of the 80th."""
    high, unit = seconds(row["p80"]).split()
    return f"{number(row['p20'] / {'s': 1.0, 'ms': 1e-3, 'us': 1e-6}[unit])} - {high} {unit}"
