"""`reformer-kernels info` and `bench`: what they print, write and refuse."""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reformer_kernels.benchmarks.problem import (
    Problem,
    attention_work,
    full_attention_work,
    hash_work,
    sort_work,
)
from typer.testing import CliRunner, Result

from reformer_kernels import functional
from reformer_kernels.benchmarks import agreement, machine, peers, workloads
from reformer_kernels.cli import app

SMALL = ["--seq-lens", "256", "--heads", "2", "--head-dim", "16", "--hashes", "2", "--budget", "0.02"]
QUICK = [*SMALL, "--repeats", "2", "--no-memory"]


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def plain(text: str) -> str:
    """Text without line breaks and frames, as messages wrap."""
    return " ".join(text.replace("│", " ").split())


def test_info_tells_of_every_back_end() -> None:
    result = invoke("info", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.output)
    assert {row["backend"] for row in facts["backends"]} == {"reference", "native", "triton"}
    for row in facts["backends"]:
        assert row["live"] == (row["reason"] is None)
    assert facts["versions"]["torch"] == str(torch.__version__)
    assert facts["threads"] == torch.get_num_threads()
    live = {(row["backend"], row["device"]): row["live"] for row in facts["backends"]}
    assert live["reference", "cpu"]
    assert live["native", "cpu"] == facts["native"]["available"]
    (gpu_sort,) = (row for row in facts["backends"] if (row["backend"], row["device"]) == ("native", "cuda"))
    assert gpu_sort["covers"] == "bucket_sort"
    assert ("torch.sort" in (gpu_sort["reason"] or "")) == (not facts["native"]["cuda"]["built"])
    shown = invoke("info").output
    for part in ("reference", "native", "triton", "SIMD", "threads", str(torch.__version__)):
        assert part in shown


def test_module_and_function_are_one_command() -> None:
    command = [sys.executable, "-m", "reformer_kernels", "bench", "--seq-lens", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--seq-lens must be positive integers" in plain(done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "OPERATION must be one of hash, sort, attention, lsh"),
        (["--seq-lens", "1k"], "--seq-lens must be positive integers separated by commas, got '1k'"),
        (["--seq-lens", ""], "--seq-lens must be positive integers"),
        (["--hashes", "2,-1"], "--hashes must be positive integers"),
        (["--heads", "0"], "--heads must be positive, got 0"),
        (["--batch", "-3"], "--batch must be positive, got -3"),
        (["--head-dim", "257"], "--head-dim must be at most 256, got 257"),
        (["--chunk", "0"], "--chunk must be positive, got 0"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, float64, got 'int8'"),
        (["--backend", "fast"], "--backend must be one of auto, reference, native, triton, got 'fast'"),
        (["--device", "tpu9"], "--device must be cpu, cuda or cuda:N, got 'tpu9'"),
        (["--device", "meta"], "--device must be cpu, cuda or cuda:N, got 'meta'"),
        (["--device", "cuda:77"], "CUDA devices; 'reformer-kernels info' lists what runs here"),
        (["--compare", "xformers"], "one of sdpa, flash, cudnn, hf, lucidrains, got 'xformers'"),
        (["--budget", "nan"], "--budget must be positive, got nan"),
        (["--json", "/nowhere/out.json"], "--json: the folder /nowhere does not exist"),
        (["--csv", "/"], "--csv must name a file, got the folder /"),
        (["--heads", "many"], "--heads"),
        (["--backend", "native", "--dtype", "float64", *QUICK], "backend='native'"),
    ],
)
def test_bad_arguments_end_with_code_2_and_a_reason(arguments: list[str], message: str) -> None:
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert message in plain(result.output)
    assert "Traceback" not in result.output


def test_bench_writes_all_that_it_measures(tmp_path: Path) -> None:
    json_file, csv_file = tmp_path / "out.json", tmp_path / "out.csv"
    result = invoke(
        "bench", "lsh", *SMALL, "--repeats", "2", "--json", str(json_file), "--csv", str(csv_file)
    )
    assert result.exit_code == 0, result.output
    report = json.loads(json_file.read_text())
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["versions"]["torch"] == str(torch.__version__)
    assert report["commit"] == machine.commit()
    assert report["rates"]["matmul_gflops"] > 0
    assert report["rates"]["copy_gbs"] > 0
    assert all(check["ok"] for check in report["checks"])
    assert {check["peer"] for check in report["checks"]} == {"Hugging Face", "reformer_pytorch"}
    assert report["left_out"] == []

    rows = {(row["name"], row["phase"]): row for row in report["rows"]}
    names = {"trax()", "paper()", "window=bucket", "torch SDPA", "Hugging Face", "reformer_pytorch"}
    phases = {"forward", "backward", "forward+backward"}
    assert set(rows) == {(name, phase) for name in names for phase in phases}
    for (name, phase), row in rows.items():
        assert row["n"] >= 1
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert (row["length"], row["heads"], row["head_dim"], row["n_hashes"]) == (256, 2, 16, 2)
        assert (row["dtype"], row["causal"]) == ("float32", True)
        assert row["gflops"] > 0
        assert row["share_of_matmul"] == pytest.approx(row["gflops"] / report["rates"]["matmul_gflops"])
        if phase != "backward":
            assert row["working_memory_bytes"] >= 0, name
    ours = rows["trax()", "forward+backward"]
    peers_seconds = {
        "sdpa": rows["torch SDPA", "forward+backward"]["median"],
        "hf": rows["Hugging Face", "forward+backward"]["median"],
        "lucidrains": rows["reformer_pytorch", "forward+backward"]["median"],
    }
    ratios = {key: seconds / ours["median"] for key, seconds in peers_seconds.items()}
    faster = min(ratios["hf"], ratios["lucidrains"])
    assert ours["ratios"] == pytest.approx({**ratios, "faster_reformer_peer": faster})
    # The peers hold the products of all pairs; at this size several times what ours holds.
    memory = rows["Hugging Face", "forward+backward"]["working_memory_bytes"]
    assert memory > 4 * 2 * 256 * 2 * 128

    with csv_file.open() as file:
        records = list(csv.DictReader(file))
    assert len(records) == len(report["rows"])
    first = records[0]
    assert float(first["median"]) == pytest.approx(report["rows"][0]["median"])
    assert first["machine_cpu"] == report["machine"]["cpu"]
    assert first["versions_torch"] == str(torch.__version__)


@pytest.mark.parametrize(
    ("operation", "names"),
    [
        ("hash", ["lsh_hash", "Hugging Face", "reformer_pytorch"]),
        ("sort", ["bucket_sort", "torch.sort(stable)"]),
        ("attention", ["trax()", "paper()", "window=bucket", "torch SDPA", "Hugging Face"]),
    ],
)
def test_each_operation_has_its_table(operation: str, names: list[str]) -> None:
    result = invoke("bench", operation, *QUICK)
    assert result.exit_code == 0, result.output
    for name in names:
        assert name in result.output
    assert "FAILED" not in result.output


def test_dtypes_lengths_and_no_peers() -> None:
    arguments = ["--compare", "none", "--dtype", "bfloat16", "--no-causal", "--forward-only"]
    result = invoke("bench", "lsh", *QUICK, "--seq-lens", "1,100", *arguments)
    assert result.exit_code == 0, result.output
    assert "L = 1:" in result.output
    assert "L = 100:" in result.output
    assert "bfloat16, not causal" in result.output
    assert "Hugging Face  " not in result.output
    assert "fwd + bwd" not in result.output


def test_a_length_that_a_peer_refuses_is_said() -> None:
    result = invoke("bench", "lsh", *QUICK, "--seq-lens", "100", "--compare", "lucidrains,hf")
    assert result.exit_code == 0, result.output
    assert "reformer_pytorch needs a length that is a multiple of twice the chunk length (128)" in plain(
        result.output
    )
    assert "needs a length that is a multiple of the chunk length (64), got 100" in plain(result.output)


def test_a_peer_predicted_to_take_too_long_is_left_out() -> None:
    result = invoke("bench", "lsh", *QUICK, "--compare", "sdpa", "--max-seconds", "1e-9")
    assert result.exit_code == 0
    assert "predicted to take" in plain(result.output)


def test_sdpas_gpu_back_ends() -> None:
    result = invoke("bench", "lsh", *QUICK, "--compare", "flash,cudnn")
    assert result.exit_code == 0
    assert "SDPA flash is compared on cuda, not on cpu" in plain(result.output)
    # The same code as on a GPU: torch has a flash back end for the CPU too, and no cuDNN one.
    small = Problem(length=40, heads=2, head_dim=16, causal=True)
    q, v = workloads.make_inputs(small)
    chosen, flash = (workloads.build("lsh", name, small) for name in ("torch SDPA", "SDPA flash"))
    assert torch.equal(chosen.inputs[0], q) and torch.equal(flash.inputs[2], v)
    torch.testing.assert_close(flash.forward(), chosen.forward())
    with pytest.raises(
        peers.PeerRefusesError, match="SDPA cuDNN cannot take float32 with heads of 16 on cpu"
    ):
        workloads.build("attention", "SDPA cuDNN", small)


def test_a_missing_peer_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "transformers":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = invoke("bench", "lsh", *QUICK, "--compare", "hf")
    assert result.exit_code == 0
    assert "Hugging Face is not installed; install it with: pip install transformers" in plain(result.output)


def test_a_disagreement_fails_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = functional.attend

    def wrong(*args: object, **kwargs: object) -> object:
        result = real(*args, **kwargs)  # type: ignore[arg-type]
        return (result[0] * 1.01, result[1]) if kwargs.get("return_lse") else result

    monkeypatch.setattr(functional, "attend", wrong)
    result = invoke("bench", "lsh", *QUICK, "--compare", "hf")
    assert result.exit_code == 1
    assert "FAILED Hugging Face" in result.output
    assert "DISAGREES" in result.output


@pytest.mark.parametrize("peer", ["hf", "lucidrains"])
@pytest.mark.parametrize("causal", [True, False])
def test_agreement_in_float64(peer: str, causal: bool) -> None:
    """The same comparison at the precision where the peers are exact, factored buckets included."""
    problem = Problem(
        batch=2, heads=2, length=512, head_dim=8, n_hashes=2, chunk_length=4, causal=causal, dtype="float64"
    )
    found = list(agreement.check(peer, "lsh", problem))
    assert [check.quantity for check in found] == ["equal bucket ids", "largest output difference"]
    assert all(check.ok for check in found), found


def test_agreement_sees_a_wrong_output() -> None:
    problem = Problem(heads=1, length=128, head_dim=8, n_hashes=1)
    ours = torch.ones(1, 1, 128, 8)
    theirs = ours.clone()
    theirs[0, 0, 5, 3] += 0.01
    lse = torch.zeros(1, 1, 128)
    assert not agreement._check_outputs("peer", problem, ours, theirs, lse).ok
    lse[0, 0, 5] = -1e5  # a row that sees only itself is left out
    assert agreement._check_outputs("peer", problem, ours, theirs, lse).ok


def test_peers_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(agreement.check("hf", "lsh", Problem(heads=1, length=128, head_dim=8, n_hashes=1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_peer_rows_compute_on_the_same_tensors() -> None:
    problem = Problem(heads=2, length=128, head_dim=16, n_hashes=1)
    ours = workloads.build("lsh", "trax()", problem)
    hugging_face = workloads.build("lsh", "Hugging Face", problem)
    assert torch.equal(workloads.flat(ours.inputs[0]), hugging_face.inputs[0])
    assert torch.equal(
        ours.inputs[0].flatten(0, 1), workloads.build("lsh", "reformer_pytorch", problem).inputs[0]
    )
    out, gradients, seconds = hugging_face.forward_and_backward()
    assert out.shape == (1, 128, 32)
    assert len(gradients) == 2
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert seconds > 0


def test_work_counts() -> None:
    problem = Problem(batch=2, heads=3, length=1024, head_dim=16, n_hashes=4, chunk_length=64, causal=True)
    work = attention_work(problem, problem.config("trax"))
    pairs = 2 * 3 * 1024 * 4 * 128  # B * H * L * rounds * chunk * (1 + before + after)
    assert work.flops("forward") == 2 * 2 * pairs * 16
    assert work.flops("backward") == 5 * 2 * pairs * 16
    assert work.flops("forward+backward") == 7 * 2 * pairs * 16
    assert work.bytes("forward") == 2 * 3 * 1024 * 16 * 4 * (4 * 2 + 1)
    short = dataclasses.replace(problem, length=32)
    assert attention_work(short, short.config("trax")).flops("forward") == 2 * 2 * (2 * 3 * 32 * 32) * 16
    assert full_attention_work(problem).flops("forward") == 2 * 2 * (2 * 3 * 1024 * 1024 / 2) * 16
    assert hash_work(problem).flops("forward") == 2 * (2 * 3 * 1024) * 16 * 4 * 16  # 32 buckets: 16 columns
    assert sort_work(problem).bytes("forward") == 2 * 4 * (2 * 3 * 1024) * 4


def test_every_peer_names_its_package() -> None:
    assert {peer.install_command for peer in peers.PEERS.values()} == {
        "pip install torch",
        "pip install transformers",
        "pip install reformer-pytorch",
    }


def test_cross_attention_is_checked_against_full_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    for causal in ("--causal", "--no-causal"):
        result = invoke("bench", "cross", *QUICK, causal)
        assert result.exit_code == 0
        assert "lsh_cross_attention" in result.output and "torch SDPA (L = 256, 2 rounds): agrees" in plain(
            result.output
        )
    attend = functional.lsh_cross_attention

    def wrong(q: torch.Tensor, k: torch.Tensor, *rest: object, **options: object) -> object:
        return attend(q, 1.1 * k, *rest, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(functional, "lsh_cross_attention", wrong)
    assert invoke("bench", "cross", *QUICK).exit_code == 1
