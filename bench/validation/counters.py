"""Hardware counters of the attention kernels through Nsight Compute, beside what the model counts.

A kernel whose executed instructions are those of the model but whose time is longer waits; one that executes
more shows where the model is wrong.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from validation import calls
from validation.calls import BOTH, shape_of
from validation.context import Context, Row, attempt
from validation.predicted import predictions_file

METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "smsp__inst_executed.sum": "instructions",
    "smsp__cycles_active.avg": "active_cycles",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "lts__t_bytes.sum": "cache_bytes",
    "dram__bytes.sum": "memory_bytes",
}
"""What is asked of the device, and what rows call it."""


def counter_steps(context: Context) -> Iterator[Row]:
    """One row for each kernel of a forward and backward pass: counters, and the predicted instructions."""
    if shutil.which("ncu") is None:
        yield {"check": "ncu", "ok": True, "skipped": "Nsight Compute (ncu) is not on PATH"}
        return
    rows: list[Row] = []

    def run() -> Row:
        command = ["ncu", "--csv", "--print-units", "base", "--target-processes", "all"]
        command += ["--metrics", ",".join(METRICS), "--kernel-name", "regex:attention_|lsh_hash"]
        program = [sys.executable, "-m", "validation.counters", json.dumps(vars(context))]
        done = subprocess.run(
            [*command, *program],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        rows.extend(parse(done.stdout))
        return {"ok": bool(rows), "kernels": len(rows), **({} if rows else {"reason": done.stderr[-400:]})}

    yield attempt("ncu", run)
    predicted = predicted_instructions(context)
    for row in rows:
        expected = predicted.get(row["check"])
        if expected:
            row["instructions_predicted"] = round(expected)
            row["ratio"] = round(row.get("instructions", 0.0) / expected, 3)
        yield row


def predicted_instructions(context: Context) -> dict[str, float]:
    """The warp instructions that the model counts for each kernel on the profiled shape."""
    file = predictions_file(context)
    answers = json.loads(file.read_text()) if file.exists() else []
    wanted = {"preset": "paper", **vars(shape_of(context))}
    return next((dict(one["instructions"]) for one in answers if one["asked"] == wanted), {})


def parse(text: str) -> list[Row]:
    """Rows of ncu's CSV output, the launches of each kernel together: times, counts and bytes are summed,
    shares are means weighted by time."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    launches: dict[tuple[str, str], dict[str, float]] = {}
    for line in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        name = METRICS.get(line["Metric Name"])
        if name is not None:
            kernel = line["Kernel Name"].removesuffix("_kernel")
            launch = launches.setdefault((kernel, line["ID"]), {})
            launch[name] = float(line["Metric Value"].replace(",", ""))
    rows: dict[str, Row] = {}
    for (kernel, _), launch in launches.items():
        row = rows.setdefault(kernel, {"check": kernel, "ok": True, "launches": 0})
        row["launches"] += 1
        for name, value in launch.items():
            weight = launch.get("nanoseconds", 1.0) if name.endswith("percent") else 1.0
            row[name] = row.get(name, 0.0) + value * weight
    for row in rows.values():
        for name in row:
            if name.endswith("percent"):
                row[name] = round(row[name] / max(1.0, row.get("nanoseconds", 1.0)), 1)
    return list(rows.values())


def main() -> None:
    """The program that is profiled: one call, forward and backward."""
    context = Context(**json.loads(sys.argv[1]))
    calls.lsh_attention(context, shape_of(context), BOTH)()
    context.synchronize()


if __name__ == "__main__":
    main()
