"""Writes measurements.md: every row of every result in bench/results, with its machine and commit.

    python docs/measurements.py

A test holds the page to the results, so run this after adding one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "measurements.md"

HEAD = """# All measurements

Written by `docs/measurements.py` from `bench/results/`; do not edit. What the columns mean and how they were
measured is under [Benchmarks](benchmarks.md). Times are medians, the 20th and 80th percentiles in brackets;
n is the number of samples. Ratios say how many times as long the peer takes.
"""

MACHINES = {"zen3": "AMD EPYC (Zen 3)", "zen4": "AMD EPYC (Zen 4)", "zen5": "AMD EPYC (Zen 5)"}
"""The first word of a file's name, where the processor's own name does not say which it is."""

HIDDEN = {
    "ours",
    "memory_ratios",
    "p20",
    "p80",
    "p20_s",
    "p80_s",
    "gbs",
    "share_of_copy",
    "backend",
    "device",
    "batch",
    "chunk_length",
}
NAMES = {
    "median": "time", "median_s": "time", "working_memory_bytes": "memory", "peak_bytes": "memory",
    "n_hashes": "hashes", "share_of_matmul": "of matmul rate", "gflops": "GFLOP/s", "head_dim": "D",
}  # fmt: skip


def time(row: Mapping[str, Any]) -> str:
    """The median and, of several samples, the 20th and 80th percentiles in the same unit."""
    suffix = "" if "median" in row else "_s"
    median = row[f"median{suffix}"]
    unit_size, unit = next(((x, u) for x, u in ((1, "s"), (1e-3, "ms")) if median >= x), (1e-6, "µs"))
    text = f"{median / unit_size:.3g} {unit}"
    if row.get("n", 1) == 1:
        return text
    low, high = (f"{row[name + suffix] / unit_size:.3g}" for name in ("p20", "p80"))
    return f"{text} ({low}–{high})"


def size(count: float) -> str:
    for unit_size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit_size:
            return f"{count / unit_size:.3g} {unit}"
    return f"{count:.0f} B"


def cell(name: str, row: Mapping[str, Any]) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if name in ("median", "median_s"):
        return time(row)
    if name.endswith("_bytes"):
        return size(value)
    if name.startswith("share_of"):
        return f"{value:.0%}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """A Markdown table of the columns that vary; what is the same in all rows stands above it."""
    flat = []
    for row in rows:
        ratios = row.get("ratios") or {}
        columns = {name: value for name, value in row.items() if name != "ratios"}
        flat.append(columns | {f"{peer} ×": value for peer, value in ratios.items()})
    names = list(dict.fromkeys(name for row in flat for name in row if name not in HIDDEN))
    names = [name for name in names if any(row.get(name) is not None for row in flat)]
    measured = {"median", "median_s", "n"}
    same = [
        name
        for name in names
        if name not in measured and len(flat) > 1 and len({str(row.get(name)) for row in flat}) == 1
    ]
    lines = []
    if same:
        lines += ["All rows: " + ", ".join(f"{NAMES.get(n, n)} {cell(n, flat[0])}" for n in same) + ".", ""]
    names = [name for name in names if name not in same]
    lines.append("| " + " | ".join(NAMES.get(name, name.replace("_", " ")) for name in names) + " |")
    lines.append("|" + "---|" * len(names))
    lines += ["| " + " | ".join(cell(name, row) for name in names) + " |" for row in flat]
    return "\n".join(lines)


def command(words: list[str]) -> str:
    """The command without the files that it wrote."""
    files = ("--json", "--csv", "--png", "--plot")
    before = ["", *words]
    return " ".join(word for last, word in zip(before, words, strict=False) if not {last, word} & set(files))


def section(path: Path) -> str:
    result = json.loads(path.read_text())
    machine, versions = result["machine"], result["versions"]
    name = MACHINES.get(path.name.split("-")[0], machine.get("cpu") or machine.get("gpu", ""))
    used = ", ".join(
        f"{package} {versions[package]}" for package in ("torch", "transformers") if versions.get(package)
    )
    lines = [f"## {path.stem}", ""]
    lines.append(f"{name}, {machine.get('threads')} threads, commit {result['commit'][:7]}, {used}.")
    if result.get("arguments"):
        lines += ["", f"    reformer-kernels {command(result['arguments'])}"]
    elif result.get("settings"):
        lines += ["", ", ".join(f"{key} {value}" for key, value in result["settings"].items()) + "."]
    for title, rows in result.get("tables", {"": result.get("rows", [])}).items():
        lines += ["", *([f"**{title}**", ""] if title else []), table(rows)]
    return "\n".join(lines)


def page() -> str:
    paths = sorted(path for path in RESULTS.glob("*.json") if "-tiles" not in path.name)
    return HEAD + "".join(f"\n{section(path)}\n" for path in paths)


if __name__ == "__main__":
    PAGE.write_text(page())
