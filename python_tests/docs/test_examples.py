"""The scripts in examples/ run from start to end, at sizes that take seconds."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.chdir(tmp_path)  # for the files that an example writes
    monkeypatch.setattr(sys, "argv", [name, "--small"])
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_every_example_is_tested() -> None:
    names = {file.name for file in EXAMPLES.glob("*.py")}
    assert names == {"accelerate_hugging_face.py", "encoder.py", "train_bytes.py"}


def test_train_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run("train_bytes.py", tmp_path, monkeypatch, capsys)
    losses = [float(loss) for loss in re.findall(r"([\d.]+) bits per byte", out)]
    assert losses[-1] < losses[0], out
    assert "def main(" in out
    assert (tmp_path / "bytes-model").exists()


def test_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("encoder.py", tmp_path, monkeypatch, capsys)
    assert "encoder.layers.0.self_attn" in out
    assert "LSH attention, 512 tokens" in out


def test_accelerate_hugging_face(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    out = run("accelerate_hugging_face.py", tmp_path, monkeypatch, capsys)
    differences = [float(value) for value in re.findall(r"by (\d\S+e-\d+)", out)]
    assert len(differences) == 2, out
    assert max(differences) < 1e-2, out  # a near-tie may put a token into another bucket
    assert "ReformerLM" in out
