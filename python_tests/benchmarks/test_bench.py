"""`reformer-kernels info` and `bench`: what they print, write and refuse."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from reformer_kernels import functional
from reformer_kernels.benchmarks import machine, registry
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


def test_info_lists_every_back_end() -> None:
    result = invoke("info", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.output)
    assert {row["backend"] for row in facts["backends"]} == {"reference", "native", "triton"}
    for row in facts["backends"]:
        assert row["available"] == (row["reason"] is None)
    assert facts["versions"]["torch"] == str(torch.__version__)
    assert facts["threads"] == torch.get_num_threads()
    available = {(row["backend"], row["device"]): row["available"] for row in facts["backends"]}
    assert available["reference", "cpu"]
    assert available["native", "cpu"] == facts["native"]["available"]
    (gpu_sort,) = (row for row in facts["backends"] if (row["backend"], row["device"]) == ("native", "cuda"))
    assert gpu_sort["covers"] == "bucket_sort"
    assert ("Triton" in (gpu_sort["reason"] or "")) == (not facts["native"]["cuda"]["built"])
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
        (["nothing"], "OPERATION must be one of lsh, hash, sort, attention"),
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
        (["--plot", "plot.pdf"], "--plot: a plot must end in .png or .svg, got 'plot.pdf'"),
        (["--heads", "many"], "--heads"),
        (["--backend", "native", "--dtype", "float64", *QUICK], "backend='native'"),
        (
            ["hash", "--causal"],
            "bench hash takes no --causal; it takes --seq-lens, --batch, --heads, --head-dim,",
        ),
        (["hash", "--compare", "sdpa"], "--compare must be one of hf, lucidrains, got 'sdpa'"),
        (["sort", "--compare", "hf"], "bench sort takes no --compare"),
        (
            ["ffn", "--hashes", "4"],
            "bench ffn takes no --hashes; it takes --seq-lens, --batch, --width, --d-ff,",
        ),
        (["ffn", "--variants", "tanh"], "--variants must be one of gelu, relu, silu, gelu_tanh, got 'tanh'"),
        (["ffn", "--variants", "none"], "--variants must name one or more of gelu"),
        (["ffn", "--no-such=1"], "bench ffn takes no --no-such; it takes"),
        (["loss", "--d-ff", "64"], "bench loss takes no --d-ff"),
        (["loss", "8192"], "bench loss takes options only, got '8192'"),
        (["model", "--backend", "native"], "bench model takes no --backend"),
        (["mha", "--heads", "3"], "--width must be a multiple of --heads"),
        (["encoder", "--head-dim", "64"], "bench encoder takes no --head-dim"),
    ],
)
def test_bad_arguments_end_with_code_2_and_a_reason(arguments: list[str], message: str) -> None:
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert message in plain(result.output)
    assert "Traceback" not in result.output


@pytest.mark.parametrize("operation", list(registry.OPERATIONS))
def test_every_option_is_used_or_refused(operation: str) -> None:
    """Each option is in the operation's own help, or the command ends with code 2 and names it."""
    taken = {*registry.OPERATIONS[operation].options}
    shown = plain(invoke("bench", operation, "--help").output)
    for option in {*registry.AXES, *registry.SINGLE, "compare", "max_seconds"}:
        flag = "--" + option.replace("_", "-")
        assert (f"{flag} " in shown) == (option in taken), flag
        if option not in taken:
            result = invoke("bench", operation, flag, "1")
            assert result.exit_code == 2
            assert f"bench {operation} takes no {flag}; it takes" in plain(result.output)


def test_help_lists_the_operations() -> None:
    shown = invoke("bench", "--help").output
    for operation in registry.OPERATIONS:
        assert operation in shown


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
        assert (row["length"], row["heads"], row["head_dim"]) == (256, 2, 16)
        assert row["n_hashes"] == (None if name == "torch SDPA" else 2)
        assert (row["dtype"], row["causal"]) == ("float32", True)
        assert row["gflops"] > 0
        assert row["share_of_matmul"] == pytest.approx(row["gflops"] / report["rates"]["matmul_gflops"])
        if phase != "backward":
            assert row["working_memory_bytes"] >= 0, name
    ours = rows["trax()", "forward+backward"]
    peers_seconds = {
        "torch SDPA": rows["torch SDPA", "forward+backward"]["median"],
        "Hugging Face": rows["Hugging Face", "forward+backward"]["median"],
        "reformer_pytorch": rows["reformer_pytorch", "forward+backward"]["median"],
    }
    ratios = {key: seconds / ours["median"] for key, seconds in peers_seconds.items()}
    faster = min(ratios["Hugging Face"], ratios["reformer_pytorch"])
    assert ours["ratios"] == pytest.approx({**ratios, "the faster Reformer": faster})
    assert set(ours["memory_ratios"]) == {"torch SDPA", "Hugging Face", "reformer_pytorch"}
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
def test_each_operation_of_attention_has_its_table(operation: str, names: list[str]) -> None:
    result = invoke("bench", operation, *QUICK)
    assert result.exit_code == 0, result.output
    for name in names:
        assert name in result.output
    assert "FAILED" not in result.output


def test_dtypes_lengths_and_no_peers() -> None:
    arguments = ["--compare", "none", "--dtype", "bfloat16", "--no-causal", "--forward-only"]
    result = invoke("bench", "lsh", *QUICK, "--seq-lens", "1,100", *arguments)
    assert result.exit_code == 0, result.output
    assert "L = 1," in result.output
    assert "L = 100," in result.output
    assert "bfloat16, not causal" in result.output
    assert "Hugging Face  " not in result.output
    assert "bwd" not in result.output


def test_a_length_that_a_peer_refuses_is_said() -> None:
    result = invoke("bench", "lsh", *QUICK, "--seq-lens", "100", "--compare", "lucidrains,hf")
    assert result.exit_code == 0, result.output
    assert "reformer_pytorch needs a length that is a multiple of twice the chunk length (128)" in plain(
        result.output
    )
    assert "needs a length that is a multiple of the chunk length (64), got 100" in plain(result.output)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["model", "--seq-lens", "100", "--layers", "1", "--width", "32"],
            0,
            "Left out: Hugging Face at L = 100: Hugging Face's model needs a length that is a multiple of",
        ),
        (
            ["huggingface", "--seq-lens", "100"],
            2,
            "nothing could be timed: transformers' layer needs a length",
        ),
        (["huggingface-model", "--seq-lens", "100"], 2, "multiple of its chunk lengths (256), got 100"),
    ],
)
def test_lengths_that_models_refuse(arguments: list[str], code: int, message: str) -> None:
    pytest.importorskip("transformers")
    result = invoke("bench", *arguments, "--budget", "0.01", "--repeats", "1", "--no-memory")
    assert result.exit_code == code, result.output
    assert message in plain(result.output)


def test_a_peer_predicted_to_take_too_long_is_left_out() -> None:
    result = invoke("bench", "lsh", *QUICK, "--compare", "sdpa", "--max-seconds", "1e-9")
    assert result.exit_code == 0
    assert "predicted to take" in plain(result.output)


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


def test_cross_attention_is_checked_against_full_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    for causal in ("--causal", "--no-causal"):
        result = invoke("bench", "cross", *QUICK, causal)
        assert result.exit_code == 0
        assert "lsh_cross_attention" in result.output and "torch SDPA: agrees" in plain(result.output)
    attend = functional.lsh_cross_attention

    def wrong(q: torch.Tensor, k: torch.Tensor, *rest: object, **options: object) -> object:
        return attend(q, 1.1 * k, *rest, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(functional, "lsh_cross_attention", wrong)
    assert invoke("bench", "cross", *QUICK).exit_code == 1
