"""The fuzzer: 200 cases of everything, and that it finds, shrinks, prints and repeats a planted fault."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.fuzz.runner import fuzz
from bench.fuzz.targets import TARGETS, not_covered
from reformer_kernels import _native

ROOT = Path(__file__).resolve().parents[2]

CASES = {"determinism": 20}
"""Where it is not 200: one case is ten calls of attention, some of 2,300 tokens."""

pytestmark = pytest.mark.skipif(
    _native.unavailable_reason() is not None, reason=f"native: {_native.unavailable_reason()}"
)


def test_every_public_function_and_operator_is_fuzzed() -> None:
    assert not_covered() == set()


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if not target.interpreted])
def test_no_fault_is_found(name: str) -> None:
    outcome = fuzz(TARGETS[name], CASES.get(name, 200), "tests")
    assert outcome.ok, outcome.reason + outcome.reproduction
    assert outcome.cases >= CASES.get(name, 200)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.fuzz", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_no_fault_is_found_in_malformed_calls_of_operators() -> None:
    done = run("--functions", "malformed_operators", "--cases", "200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "malformed_operators: 200 cases" in done.stdout


def test_no_fault_is_found_in_the_interpreter() -> None:
    """Fewer cases, as one takes half a second there; python_tests/gpu has more."""
    pytest.importorskip("triton")
    names = "triton_attention,triton_lsh_hash,triton_bucket_sort,triton_sample_rotations,triton_residual_step"
    done = run("--functions", names, "--cases", "15", "--seed", "5")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_planted_fault_is_shrunk_printed_and_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    from reformer_kernels.ops.sort import native

    sort = native.bucket_sort

    def wrong(buckets: torch.Tensor, *sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
        order, starts = sort(buckets, *sizes)
        return (order.flip(-1), starts) if buckets.size(-1) >= 5 else (order, starts)

    monkeypatch.setattr(native, "bucket_sort", wrong)
    outcome = fuzz(TARGETS["bucket_sort"], 200, "tests")
    assert not outcome.ok
    assert "AssertionError" in outcome.reason
    assert "L=5," in outcome.reproduction, "shrunk to the shortest that fails"
    names: dict[str, object] = {}
    exec(outcome.reproduction, names)
    test = names["test_bucket_sort_again"]
    assert callable(test)
    with pytest.raises(AssertionError):
        test()
    monkeypatch.undo()
    test()


@pytest.mark.parametrize("function", ["lsh_attention", "linear_cross_entropy", "chunked_feed_forward"])
def test_a_gradient_that_is_slightly_wrong_is_found(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from reformer_kernels.ops.attention import native

    if function == "lsh_attention":
        backward = native.backward

        def scaled(*arguments: torch.Tensor) -> None:
            backward(*arguments)
            arguments[-1].mul_(1.1)

        monkeypatch.setattr(native, "backward", scaled)
    else:
        mm = torch.mm

        def wrong(a: torch.Tensor, b: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
            return mm(a, b, **options).mul_(1.1)

        monkeypatch.setattr(torch, "mm", wrong)
    assert not fuzz(TARGETS[function], 200, "tests").ok


def test_the_log_is_gone_on_with_and_a_process_that_ends_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.json"
    for cases in (5, 8):
        done = run("--functions", "bucket_sort", "--cases", str(cases), "--log", str(log))
        assert done.returncode == 0, done.stderr
        assert json.loads(log.read_text())["functions"]["bucket_sort"]["cases"] == cases
    assert "there is no nonsense" in run("--functions", "nonsense").stderr
    assert "was made with --seed 0" in run("--seed", "1", "--log", str(log)).stderr

    from bench.fuzz import __main__ as command

    dies = "import os, sys, pathlib; pathlib.Path(sys.argv[4]).write_text('it'); os.abort()"
    monkeypatch.setattr(command, "WORKER", ("-c", dies))
    outcome = command.run_piece("bucket_sort", 1, "0")
    assert "ended with code -6" in outcome["reason"]
    assert outcome["reproduction"] == "it"
