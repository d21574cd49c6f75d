"""Everyday mishaps of commands: readers that leave, early Ctrl-C, killed runs, absurd sizes, ASCII alone."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from reformer_kernels import _files
from reformer_kernels.cli import app
from reformer_kernels.training.checkpoint import Recipe, read_checkpoint
from reformer_kernels.training.text import load_text
from reformer_kernels.training.trainer import Trainer

TINY = Recipe(seq_len=64, batch=1, layers=1, dim=16, heads=2, hashes=2, chunk=8, steps=3)
FILES = ["config.json", "model.safetensors", "training.json", "training.safetensors"]
SIZES = [
    f"--{name.replace('_', '-')}={value}"
    for name, value in dataclasses.asdict(TINY).items()
    if name not in ("lr", "seed")
]


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Commands started here can be interrupted, also where the tests' own process ignores Ctrl-C.

    A shell starts its background jobs so, and a process inherits what its parent ignores.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_bytes(b"the quick brown fox jumps over the lazy dog; " * 100)
    return file


def command(*arguments: object, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "reformer_kernels", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )


def refused(*arguments: object) -> str:
    """The message of a command that must end with code 2 and no traceback."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("│", " ").split())


def test_a_reader_that_leaves_does_not_end_the_run(text_file: Path, tmp_path: Path) -> None:
    """As in `train | head -1`."""
    path = tmp_path / "run"
    process = command("train", text_file, *SIZES, "--checkpoint", path)
    assert process.stdout is not None and process.stderr is not None
    assert b"million parameters" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
    assert read_checkpoint(path).step == TINY.steps


@pytest.mark.parametrize("seconds", [0.3, 0.9])
def test_an_early_interrupt_has_no_traceback(text_file: Path, tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "run"
    process = command("train", text_file, *SIZES, "--steps", 100000, "--checkpoint", path)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (-signal.SIGINT, 130)
    assert b"Traceback" not in errors


def test_importing_the_package_leaves_ctrl_c_alone() -> None:
    script = "import signal, reformer_kernels; print(signal.getsignal(signal.SIGINT).__name__)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "default_int_handler\n"


def test_what_killed_runs_leave_is_removed(text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / ".model.safetensors.0123456789abcdef.tmp").write_bytes(b"half")
    call = ["train", str(text_file), *SIZES, "--sample-length=0", "--checkpoint", str(path)]
    assert CliRunner().invoke(app, call).exit_code == 0
    assert sorted(file.name for file in path.iterdir()) == FILES


def test_the_unfinished_files_of_a_running_writer_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        _files.remove_left_over(tmp_path)

    monkeypatch.setattr(os, "fsync", fsync)
    _files.write_together({tmp_path / "a": "1", tmp_path / "b": "2"})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("field", ["seq_len", "layers", "dim", "hashes", "chunk"])
def test_a_recipe_edited_by_hand_is_refused(text_file: Path, tmp_path: Path, field: str) -> None:
    path = tmp_path / "run"
    trainer = Trainer(TINY, load_text(text_file, TINY.seq_len))
    trainer.train_step()
    trainer.save(path)
    state = json.loads((path / "training.json").read_text())
    state["recipe"][field] *= 2
    (path / "training.json").write_text(json.dumps(state))
    message = refused("train", text_file, "--resume", "--checkpoint", path)
    assert "the model is not the one of the recipe in training.json" in message
    for value in ("x", None, 2**70, 1.5, -1):
        state["recipe"][field] = value
        (path / "training.json").write_text(json.dumps(state))
        assert f"{field} must be an integer from" in refused(
            "train", text_file, "--resume", "--checkpoint", path
        )


def test_weights_that_are_not_finite_are_refused(text_file: Path, tmp_path: Path) -> None:
    trainer = Trainer(TINY, load_text(text_file, TINY.seq_len))
    with torch.no_grad():
        trainer.model.head.bias[3] = float("nan")
    path = tmp_path / "run"
    trainer.save(path)
    for call in (
        ("train", text_file, "--resume", "--checkpoint", path),
        ("generate", path, "--prompt", "a"),
    ):
        assert "not finite (head.bias)" in refused(*call)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--threads", 10**8),
        ("train", "--threads", 10**30),
        ("train", "--hashes", 10**8),
        ("train", "--chunk", 10**10),
        ("train", "--layers", 10**9),
        ("train", "--steps", 10**30),
        ("train", "--lr", 1e39),
        ("train", "--batch", 10**30),
        ("bench", "lsh", "--threads", 10**8),
        ("bench", "lsh", "--hashes", 10**8),
        ("bench", "lsh", "--chunk", 10**10),
        ("bench", "lsh", "--seq-lens", 10**30),
        ("bench", "lsh", "--head-dim", 257),
        ("bench", "lsh", "--heads", 10**30),
        ("recall", "--threads", 10**8),
        ("recall", "--hashes", 10**8),
        ("recall", "--windows", 10**10),
        ("recall", "--seq-len", 10**30),
        ("recall", "--head-dim", 257),
        ("inspect", "--head-dim", 257),
        ("inspect", "--processes", 10**8),
        ("generate", "none", "--prompt", "a", "--threads", 10**8),
        ("generate", "none", "--prompt", "a", "--seed", -1),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_values_out_of_range(arguments: tuple[object, ...]) -> None:
    message = refused(*arguments)
    assert f"{arguments[-2]} must be" in message


def test_sizes_that_do_not_fit_in_memory(text_file: Path) -> None:
    call = ("bench", "lsh", "--seq-lens", 2**31 - 1, "--heads", 2**20, "--no-memory", "--compare", "none")
    assert "not enough memory" in refused(*call)


@pytest.mark.parametrize("environment", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}])
def test_a_terminal_without_unicode(text_file: Path, environment: dict[str, str]) -> None:
    process = command("train", text_file, *SIZES, "--sample-length", 40, **environment)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert b"the model's own" in out and not errors
