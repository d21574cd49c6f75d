"""`reformer-kernels bench`, of layers (reversible, ffn, loss, memory) and of models (model, huggingface, mha,
encoder): runs the benchmarks and shows their rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from reformer_kernels._files import write_atomically
from reformer_kernels.benchmarks import huggingface, layers, machine, models

OPERATIONS = ("reversible", "ffn", "loss", "memory", "model", "huggingface", "mha", "encoder")

Document = dict[str, Any]


def run(
    operation: str, *, threads: int, budget: float, repeats: int, device: str, dtype: torch.dtype
) -> Document:
    """Measures: `machine`, `commit`, `versions`, and the rows of each table by its title."""
    timed: dict[str, Any] = {"budget": budget, "repeats": repeats, "device": device, "dtype": dtype}
    tables: dict[str, Callable[[], list[layers.Row]]]
    if operation == "reversible":
        tables = {
            "Time and memory of the same blocks": lambda: layers.bench_reversible(**timed),
            "Peak activation memory of a training step, by depth": layers.bench_depths,
            "Drift of rebuilt activations and gradients": layers.drift,
        }
    elif operation == "ffn":
        tables = {"Feed-forward": lambda: layers.bench_feed_forward(**timed)}
    elif operation == "loss":
        tables = {"Projection and loss": lambda: layers.bench_loss(**timed)}
    elif operation == "memory":
        tables = {"Peak memory": layers.bench_memory}
    elif operation == "model":
        tables = {"Training step of a language model": lambda: models.bench_language_model(**timed)}
    elif operation == "huggingface":
        tables = {
            "Hugging Face's attention layers": lambda: huggingface.bench_attention(**timed),
            "Hugging Face's models": lambda: huggingface.bench_models(**timed),
        }
    elif operation == "mha":
        tables = {"Multi-head attention": lambda: models.bench_multihead_attention(**timed)}
    elif operation == "encoder":
        tables = {"Transformer encoder": lambda: models.bench_encoder(**timed)}
    else:
        raise ValueError(f"operation must be one of {OPERATIONS}, got {operation!r}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {
            "operation": operation,
            "machine": machine.describe(torch.device(device)),
            "commit": machine.commit(),
            "versions": machine.versions(),
            "dtype": str(dtype).removeprefix("torch."),
            "tables": {title: measure() for title, measure in tables.items()},
        }
    finally:
        torch.set_num_threads(before)


def show(document: Document, console: Console) -> None:
    facts = document["machine"]
    console.print(f"{facts['cpu']}, {facts['threads']} threads, commit {document['commit']}")
    for title, rows in document["tables"].items():
        names = list(dict.fromkeys(name for row in rows for name in row))
        # Settings that are the same in all rows are told once.
        shared = [
            name
            for name in names
            if name not in ("case", "n")
            and not _is_measured(name)
            and len({row.get(name) for row in rows}) == 1
        ]
        about = ", ".join(f"{name} {rows[0][name]}" for name in shared)
        console.print(f"{title} ({about})" if about else title)
        table = Table()
        varying = [name for name in names if name not in shared]
        for name in varying:
            table.add_column(name, justify="left" if isinstance(rows[0].get(name), str) else "right")
        for row in rows:
            table.add_row(*(_cell(name, row.get(name)) for name in varying))
        console.print(table)


def save(document: Document, json_file: Path | None, picture: Path | None) -> None:
    if json_file is not None:
        write_atomically(json_file, json.dumps(document, indent=1) + "\n")
    if picture is not None and document["operation"] == "memory":
        layers.plot_memory(document["tables"]["Peak memory"], picture)


def _is_measured(name: str) -> bool:
    return name.endswith(("_s", "_bytes", "_error", "ratio")) or name == "differing"


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name.endswith("_bytes"):
        return f"{value / 2**20:.1f} MiB"
    if name.endswith("_s"):
        return f"{value:.3f} s"
    if name.endswith("_error"):
        return f"{value:.1e}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
