"""The measuring functions of the layers' benchmarks, on problems too small to time."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from reformer_kernels.benchmarks.allocations import peak_allocated
from typer.testing import CliRunner

from reformer_kernels.benchmarks import layers
from reformer_kernels.cli import app

QUICK = {"budget": 0.0, "repeats": 1}


def check(rows: list[layers.Row], plain: str, cases: set[str]) -> None:
    assert {row["case"] for row in rows} == cases
    for row in rows:
        assert row["n"] >= 1
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["peak_bytes"] > 0
        if row["case"] == plain:
            assert row["time_ratio"] == row["memory_ratio"] == 1.0


def test_peak_allocated_counts_what_lives_at_once() -> None:
    def call() -> None:
        for _ in range(3):
            torch.empty(1000)
        kept = torch.empty(500)
        torch.empty(250)
        del kept

    assert peak_allocated(call) == 4000
    assert peak_allocated(lambda: [torch.empty(1000) for _ in range(3)]) == 12000


def test_reversible() -> None:
    rows = layers.bench_reversible(2, 40, width=16, d_ff=32, heads=2, **QUICK)
    ours = {"ordinary", "checkpoint", "reversible float", "reversible exact"}
    check(rows, "ordinary", ours | ({row["case"] for row in rows} & {"reformer_pytorch"}))


def test_depths() -> None:
    rows = layers.bench_depths((2, 6), length=64, width=16, d_ff=32, heads=2)
    assert [(row["case"], row["depth"]) for row in rows] == [
        ("float", 2),
        ("float", 6),
        ("exact", 2),
        ("exact", 6),
    ]
    # Random-number states, 10 KB a block, weigh more than the activations here.
    assert all(row["peak_bytes"] < 4 * 11000 + 2 * rows[0]["peak_bytes"] for row in rows)


def test_feed_forward() -> None:
    rows = layers.bench_feed_forward(64, 8, 16, ("relu",), **QUICK)
    check(rows, "plain", {"plain", "chunked", "checkpoint"})


def test_loss() -> None:
    rows = layers.bench_loss(64, 8, 300, chunk_size=16, **QUICK)
    for reduction in ("mean", "none"):
        check([row for row in rows if row["reduction"] == reduction], "plain", {"plain", "chunked"})


def test_drift() -> None:
    rows = layers.drift((1, 4), (torch.float32,), length=40, width=8, heads=2)
    assert [row["residual"] for row in rows] == ["float", "exact"] * 2
    for row in rows:
        assert (row["differing"] == 0) == (row["residual"] == "exact")
        assert (row["input_error"] == 0) == (row["residual"] == "exact")
        assert row["input_error"] < 1e-5
        assert row["gradient_error"] < 1e-2


def test_memory_rows_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = layers.bench_memory((1, 2), (16, 32), (8, 16), (100, 200))
    assert {row["panel"] for row in rows} == {"depth", "length", "d_ff", "vocabulary"}
    file = tmp_path / "memory.png"
    layers.plot_memory(rows, file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = functools.partial(layers.bench_feed_forward, 64, 8, 16, ("relu",))
    monkeypatch.setattr(layers, "bench_feed_forward", small)
    file = tmp_path / "rows.json"
    runner = CliRunner()
    done = runner.invoke(app, ["bench", "ffn", "--budget", "0.1", "--repeats", "1", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "chunked" in done.output
    document = json.loads(file.read_text())
    assert document["machine"]["cpu"]
    assert {row["case"] for row in document["tables"]["Feed-forward"]} == {"plain", "chunked", "checkpoint"}
    assert runner.invoke(app, ["bench", "losses"]).exit_code == 2


def test_command_draws_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"panel": "depth", "case": "float", "x": x, "peak_bytes": 2**20} for x in (1, 2)]
    monkeypatch.setattr(layers, "bench_memory", lambda: rows)
    file = tmp_path / "memory.png"
    done = CliRunner().invoke(app, ["bench", "memory", "--png", str(file)])
    assert done.exit_code == 0, done.output
    assert "1.0 MiB" in done.output
    assert file.read_bytes().startswith(b"\x89PNG")
