"""`bench/validate_gpu.py` without a GPU: a dry run through every step, and steps that fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "validate_gpu.py"

sys.path.append(str(ROOT / "bench"))
from validation import counters, sweep  # noqa: E402
from validation.context import Context, attempt  # noqa: E402
from validation.results import Results, StepResult  # noqa: E402
from validation.steps import STEPS, Step  # noqa: E402
from validation.timings import target_rows  # noqa: E402


def test_dry_run_goes_through_every_step(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--dry-run", "--output", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    document = json.loads((tmp_path / "dry-run.json").read_text())
    assert list(document["steps"]) == [step.name for step in STEPS]
    for name, step in document["steps"].items():
        assert step["status"] == "done" and step["rows"], name
    assert all(target["ok"] is None for target in document["targets"])  # a dry run meets none
    errors = document["steps"]["correctness"]["rows"][0]
    assert 0 < errors["dv"] <= errors["limit"]
    assert document["steps"]["long"]["rows"][0]["dqk"] <= document["steps"]["long"]["rows"][0]["limit"]
    training = document["steps"]["training"]["rows"][0]
    assert training["peak_bytes"] > 0 and training["tokens_per_second"] > 0
    predicted = next(r for r in document["steps"]["other times"]["rows"] if r["operation"] == "local")
    assert 0 < predicted["predicted_us_at_100%"] <= predicted["predicted_us_at_50%"]
    timed = document["steps"]["headline"]["rows"][0]
    assert timed["eager_us"] > 0 and timed["floor_us_predicted"] > 0
    assert "compute-sanitizer" in document["steps"]["sanitizer"]["rows"][0]["check"]
    assert "skipped" in document["steps"]["tests"]["rows"][0]["output"] or torch.cuda.is_available()
    text = (tmp_path / "dry-run.md").read_text()
    assert "No figure here is a GPU's" in text and "FAILED" not in text
    assert all(f"## {step.name[0].upper()}{step.name[1:]}" in text for step in STEPS)
    tiles = json.loads((tmp_path / "dry-run-tiles.json").read_text())
    assert tiles["tiles"][0]["architecture"] == "interpreter"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "torch finds no CUDA device; --dry-run tries the steps without one" in done.stderr
    assert not (tmp_path / "results").exists()


def test_a_run_is_resumed_after_the_steps_that_it_ended(tmp_path: Path, script: ModuleType) -> None:
    results = Results(tmp_path / "gpu", False, [])
    results.steps = {
        "build": StepResult("builds", "done", 2.0, "", [{"check": "build", "ok": True}]),
        "race": StepResult("repeats", "cut short", 9.0, "out of time", [{"check": "paper", "ok": True}]),
    }
    results.write()
    again = Results(tmp_path / "gpu", False, [])
    again.steps = {name: StepResult("") for name in ("build", "race", "capture")}
    assert again.resume() == ["build"] and again.started == results.started
    assert again.steps["build"].rows == [{"check": "build", "ok": True}]
    assert again.steps["race"].status == again.steps["capture"].status == "not run"
    other = Results(tmp_path / "gpu", False, [], commit="another")
    with pytest.raises(ValueError, match=r"is of another run, .*; run without --resume"):
        other.resume()
    with pytest.raises(ValueError, match="does not exist"):
        Results(tmp_path / "none", False, []).resume()


def test_counters_of_launches_are_added_up() -> None:
    text = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","attention_forward_kernel","gpu__time_duration.sum","nsecond","1,000"
"0","7","attention_forward_kernel","smsp__inst_executed.sum","inst","200"
"0","7","attention_forward_kernel","sm__warps_active.avg.pct_of_peak_sustained_active","%","10"
"1","7","attention_forward_kernel","gpu__time_duration.sum","nsecond","3,000"
"1","7","attention_forward_kernel","smsp__inst_executed.sum","inst","600"
"1","7","attention_forward_kernel","sm__warps_active.avg.pct_of_peak_sustained_active","%","20"
"2","7","attention_rows_kernel","gpu__time_duration.sum","nsecond","50"
"""
    forward, rows = counters.parse(text)
    assert forward == {
        "check": "attention_forward",
        "ok": True,
        "launches": 2,
        "nanoseconds": 4000.0,
        "instructions": 800.0,
        "occupancy_percent": 17.5,
    }
    assert rows["check"] == "attention_rows" and rows["nanoseconds"] == 50.0
    assert counters.parse("==ERROR== no permission") == []


def test_far_tiles_are_swept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "architecture_of", lambda device: "sm_90")
    context = Context(dry_run=False, folder="", name="")
    tried = sweep.candidates(context, ("attention_forward", 16, 64))
    assert len(tried) == len(set(tried)) > len(sweep.FAR_TILES)
    assert {tile.rows for tile in tried} >= {32, 64, 128} and max(tile.dims for tile in tried) <= 64


FAKES = """
import os, time

def _cases(context, shard=0, shards=1, after=0):
    for n in range(6)[shard::shards][after:]:
        if n == 2:
            os._exit(11)  # like a driver that aborts
        row = {"check": f"case {n}", "ok": n != 5}
        yield row | {"fatal": True, "ok": False} if n == 3 else row

def slow(context):
    yield {"check": "first", "ok": True}
    time.sleep(60)

def dying(context):
    yield {"check": "first", "ok": True}
    raise RuntimeError("as it happens")

cases = _cases
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("validate_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_fake(
    script: ModuleType, folder: Path, function: str, *, seconds: float, shards: int = 1
) -> StepResult:
    (folder / "fake_steps.py").write_text(FAKES)
    step = Step("fake", "a step that fails", f"fake_steps.{function}", seconds, shards)
    results = Results(folder / "out", False, [], {"fake": StepResult(step.about)})
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench"), str(folder)])
    context = Context(dry_run=False, folder=str(folder), name="out")
    runner: Any = script.StepRunner(step, context, results, {**os.environ, "PYTHONPATH": path})
    runner.run(seconds)
    results.write()
    written = json.loads((folder / "out.json").read_text())["steps"]["fake"]
    assert written["rows"] == results.steps["fake"].rows and written["status"] == results.steps["fake"].status
    return results.steps["fake"]


def test_processes_that_die_are_started_again_after_their_case(script: ModuleType, tmp_path: Path) -> None:
    result = run_fake(script, tmp_path, "cases", seconds=60, shards=2)
    rows = {row["check"]: row for row in result.rows}
    assert result.status == "done" and not result.ok
    assert {f"case {n}" for n in (0, 1, 3, 4, 5)} <= set(rows)
    assert not rows["case 3"]["ok"] and not rows["case 5"]["ok"] and rows["case 4"]["ok"]
    (crash,) = (row for row in result.rows if row["check"].startswith("process"))
    assert "ended with code 11" in crash["reason"]
    assert len(result.failures) == 3


def test_a_step_of_one_process_ends_with_it(script: ModuleType, tmp_path: Path) -> None:
    result = run_fake(script, tmp_path, "dying", seconds=60)
    assert result.status == "failed" and "as it happens" in result.reason
    assert result.rows[0] == {"check": "first", "ok": True}


def test_a_slow_step_is_cut_short_and_keeps_its_rows(script: ModuleType, tmp_path: Path) -> None:
    start = time.perf_counter()
    result = run_fake(script, tmp_path, "slow", seconds=4)
    assert time.perf_counter() - start < 40
    assert result.status == "cut short" and result.reason == "out of time after 4 s"
    assert result.rows == [{"check": "first", "ok": True}]


def test_device_errors_are_fatal_and_others_are_rows() -> None:
    def broken() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert attempt("x", broken) | {"seconds": 0} == {
        "check": "x",
        "ok": False,
        "fatal": True,
        "reason": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "seconds": 0,
    }
    assert "fatal" not in attempt("x", lambda: 1 // 0)  # type: ignore[arg-type, return-value]


def test_targets() -> None:
    def timed(operation: str, us: float, above: float = 1.0, **fields: Any) -> dict[str, Any]:
        return {
            "check": "",
            "operation": operation,
            "eager_us": 9e9,
            "graph_us": us,
            "above_floor": above,
        } | {
            "phase": "forward+backward",
            "n_hashes": 4,
            "preset": "paper",
            **fields,
        }

    rows = [timed("attend", 1.0, 1.2, phase="forward"), timed("attend", 1.0, 1.5)]
    rows += [timed("lsh_attention", 10.0, length=L) for L in (2048, 3072, 65536)]
    rows += [timed("SDPA flash", us, length=L) for L, us in ((2048, 9.0), (3072, 11.0), (65536, 150.0))]
    rows += [timed("bucket_sort", 2.0), timed("torch.sort int32 stable", 5.0), timed("lsh_hash", 1.0, 1.7)]
    targets = {row["check"]: (row["ok"], row.get("value")) for row in target_rows(rows, dry_run=False)}
    assert list(targets.values()) == [
        (None, None),  # one round was not timed
        (None, None),
        (True, 1.2),
        (False, 1.5),
        (True, 3072),
        (False, 15.0),
        (True, 2.5),
        (False, 1.7),
    ]
