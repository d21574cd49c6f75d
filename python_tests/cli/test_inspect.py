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
    done = run("--json", str(file), "--processes", "1", "--dump", str(tmp_path / "dump"))
    assert done.exit_code == 0, done.output
    assert "residual_step" in done.output and "predicted cycles" in done.output
    assert "measured" not in done.output
    document = json.loads(file.read_text())
    first = document["kernels"][0]
    assert (first["kernel"], first["dtype"], first["head_dim"]) == ("residual_step", "bfloat16", 64)
    assert first["spill_bytes"] == 0 and first["registers"] > 0 and 0 < first["occupancy"] <= 1
    assert first["tensor_core_instructions"] == {} and first["shared_bytes"] >= 0 and first["faults"] == []
    assert first["loads"]["16"] >= 1 and first["stores"]["16"] >= 1
    assert first["issue_cycles_per_pair"] is None and first["preset"] is None
    assert {row["options"] for row in document["kernels"]} == {"off", "all"}
    assert document["predicted"] == []
    dumped = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert [name.split(".")[1] for name in dumped] == ["json", "ptx", "sass"] * 2
    counted = json.loads((tmp_path / "dump" / dumped[0]).read_text())
    assert (
        sum(counted["issue"]["outside"]["kinds"].values()) == counted["issue"]["outside"]["instructions"] > 10
    )
    assert "STG.E.128" in (tmp_path / "dump" / dumped[2]).read_text()


def test_predicted_times_of_a_shape(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "inspect.json"
    arguments = ["inspect", "--shape", "L=8192,H=4,hashes=2", "--preset", "local", "--json", str(file)]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "Predicted times on an H100: L=8192, H=4, D=64, 2 hashes, chunk 64" in done.output
    assert "FlashAttention-2, 270 TFLOP/s" in done.output and "measured" not in done.output
    document = json.loads(file.read_text())
    (predicted,) = document["predicted"]
    assert (predicted["preset"], predicted["length"], predicted["bits"]) == ("local", 8192, 16)
    assert [row["name"] for row in predicted["passes"]] == ["attention_forward", "attention_backward"]
    assert predicted["launches"] == sum(row["launches"] for row in predicted["passes"])
    assert 0 < predicted["predicted_seconds"]["1.0"] < predicted["predicted_seconds"]["0.5"]
    assert {row["peer"] for row in predicted["crossings"]} == {"FlashAttention-2", "FlashAttention-3"}
    needed = {"kernel", "preset", "architecture", "dtype", "head_dim", "registers", "spill_bytes"}
    needed |= {"issue_cycles_per_pair", "tensor_cycles_per_pair"}
    forward = next(row for row in document["kernels"] if row["kernel"] == "attention_forward")
    assert needed <= set(forward)
    assert 0 < forward["tensor_cycles_per_pair"] < forward["issue_cycles_per_pair"] < 1


def test_faults_are_shown_and_end_with_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "inspect.json"

    def broken(work: Any, asked: Any, processes: int) -> Any:
        for request in asked:
            yield [Inspected(row.code, ["spills 8 bytes a thread, 0 allowed"]) for row in work(request)]

    monkeypatch.setattr(machine_code, "in_processes", broken)
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
        (["--head-dim", "0"], "--head-dim must be positive integers separated by commas, got '0'"),
        (["--options", "some"], "--options must be one of off, all, got 'some'"),
        (["--processes", "0"], "--processes must be positive, got 0"),
        (["--shape", "L=64"], "--op cannot be given with --shape"),
        (["--dump", "/dev/null"], "--dump: /dev/null cannot be made a folder (File exists)"),
        (["--json", "/no/such/folder/x.json"], "does not exist"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("L=0", "--shape L must be positive, got 0"),
        ("L=-4", "got 'L=-4'"),
        ("", "--shape must be positive integers named L, H, D, hashes, chunk, such as L=16384,"),
        ("length=64", "got 'length=64'"),
        ("L=64,L=128", "--shape gives L twice"),
        ("D=512", "--shape D must be at most 256, got 512"),
        ("L=99999999999999", "--shape L must be at most"),
        ("hashes=65", "--shape hashes must be at most 64, got 65"),
        ("chunk=10000000000", "--shape chunk must be at most"),
    ],
)
def test_wrong_shapes(shape: str, message: str) -> None:
    done = CliRunner().invoke(app, ["inspect", "--shape", shape], env={"COLUMNS": "200"})
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
