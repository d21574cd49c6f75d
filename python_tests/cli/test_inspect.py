"""`reformer-kernels inspect`: the table, its JSON file, and the messages where it cannot work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reformer_kernels.cli import app
from reformer_kernels.gpu import cost_model, machine_code
from reformer_kernels.gpu.architectures import CHIPS
from reformer_kernels.gpu.machine_code import Inspected

ARGUMENTS = ["inspect", "--arch", "sm_90", "--op", "residual", "--dtype", "bfloat16", "--head-dim", "64"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*ARGUMENTS, *arguments], env={"COLUMNS": "200"})


def test_table_and_json(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "inspect.json"
    done = run("--json", str(file), "--processes", "1")
    assert done.exit_code == 0, done.output
    assert "residual_step" in done.output and "Predicted least time" in done.output
    assert "measured:" not in done.output
    document = json.loads(file.read_text())
    first = document["kernels"][0]
    assert (first["kernel"], first["dtype"], first["head_dim"]) == ("residual_step", "bfloat16", 64)
    assert first["spill_bytes"] == 0 and first["registers"] > 0 and 0 < first["occupancy"] <= 1
    assert first["tensor_core_instructions"] == {} and first["shared_bytes"] >= 0 and first["faults"] == []
    assert first["loads"]["16"] >= 1 and first["stores"]["16"] >= 1
    assert first["issue_cycles_per_pair"] is None and first["preset"] is None
    assert {row["options"] for row in document["kernels"]} == {"off", "all"}
    assert {row["operation"] for row in document["predicted"]} == set(cost_model.OPERATIONS)


def test_faults_are_shown_and_end_with_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "inspect.json"

    def broken(requests: Any, processes: int) -> Any:
        for request in requests:
            yield [
                Inspected(row.code, ["spills 8 bytes a thread, 0 allowed"])
                for row in machine_code.inspect(request)
            ]

    monkeypatch.setattr(machine_code, "inspect_all", broken)
    done = run("--json", str(file))
    assert done.exit_code == 1
    assert "FAULT residual_step bfloat16 D=64 options off on sm_90" in done.output
    assert "spills 8 bytes a thread" in done.output
    assert json.loads(file.read_text())["kernels"][0]["faults"] == ["spills 8 bytes a thread, 0 allowed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_70"], "--arch must be one of sm_80, sm_90, sm_100, gfx942, got"),
        (["--arch", "none"], "--arch must name at least one"),
        (["--op", "sorting"], "--op must be one of"),
        (
            ["--preset", "haiku"],
            "--preset must be one of paper, trax, lucidrains, bucket, cross, local, full",
        ),
        (["--dtype", "float64"], "--dtype must be one of float32, bfloat16, float16"),
        (["--head-dim", "512"], "--head-dim must be at most 256, got 512"),
        (["--hashes", "0"], "--hashes must be positive, got 0"),
        (["--json", "/no/such/folder/x.json"], "does not exist"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_says_why_it_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = run()
    assert done.exit_code == 2 and "TRITON_INTERPRET is set" in done.output
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setitem(sys.modules, "triton.compiler", None)
    done = run()
    assert done.exit_code == 2 and "pip install triton" in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_predicted_times_follow_the_formulas() -> None:
    h100, one = CHIPS["sm_90"].rates, cost_model.Shape(heads=1, length=10**6, n_hashes=1)

    def picoseconds(operation: str, shape: cost_model.Shape = one) -> float:
        return cost_model.floor(operation, shape, h100).seconds / shape.rows * 1e12

    # bf16, D = 64, one round: (8 D + 20) and (14 D + 16) bytes at 3.0 TB/s.
    assert picoseconds("attention_forward") == pytest.approx(177, abs=0.5)
    assert picoseconds("attention_backward") == pytest.approx(304, abs=0.5)
    # Four rounds at chunk 64: the backward's products take longer than its bytes.
    four = cost_model.Shape(heads=1, length=10**6, n_hashes=4)
    assert cost_model.floor("attention_backward", four, h100).bound == "products"
    assert picoseconds("attention_backward", four) == pytest.approx(4 * 104, rel=0.01)
    again = cost_model.floor("attention_forward", four, h100, rounds_reuse=False)
    assert again.bytes == four.rows * (8 * 64 + 20 + 3 * (12 * 64 + 20))
