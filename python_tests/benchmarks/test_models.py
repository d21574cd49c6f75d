"""The measuring functions of the models' benchmarks, on problems too small to time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reformer_kernels.benchmarks.steps import Row
from typer.testing import CliRunner

from reformer_kernels.benchmarks import huggingface, models
from reformer_kernels.benchmarks.peers import Peer
from reformer_kernels.cli import app

QUICK: dict[str, Any] = {"budget": 0.0, "repeats": 1}


def check(rows: list[Row], plain: str, cases: set[str]) -> None:
    assert {row["case"] for row in rows} == cases
    for row in rows:
        assert row["n"] >= 1
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["peak_bytes"] > 0
        assert row["time_ratio"] > 0
        if row["case"] == plain:
            assert row["time_ratio"] == row["memory_ratio"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_model(dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("reformer_pytorch")
    rows = models.bench_language_model(128, 1, 16, 2, 2, 16, dtype=dtype, **QUICK)
    check(rows, "reformer_kernels", {"reformer_kernels", "Hugging Face", "reformer_pytorch"})


def test_huggingface(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8}
    model = {"attn_layers": ["lsh"], "axial_pos_embds_dim": [4, 12], "feed_forward_size": 8}
    monkeypatch.setitem(huggingface.MODELS, "small", small | model)
    rows = huggingface.bench_attention((128,), (("lsh", 2), ("local", 1)), sizes=small, **QUICK)
    rows += huggingface.bench_models((("small", 128),), **QUICK)
    check(rows, "transformers", {"transformers", "accelerated"})
    assert [row["phase"] for row in rows[::2]] == ["forward", "forward+backward"] * 2 + [
        "forward",
        "training step",
    ]
    assert all(row["output_error"] < 1e-5 for row in rows[:8])
    monkeypatch.setattr(Peer, "missing", lambda _: "pip install transformers")
    done = CliRunner().invoke(app, ["bench", "huggingface"])
    assert done.exit_code == 2 and "pip install transformers" in done.output


def test_multihead_attention() -> None:
    rows = models.bench_multihead_attention((32, 300), 16, 2, **QUICK)
    for length in (32, 300):
        part = [row for row in rows if row["length"] == length]
        check(part, "nn.MultiheadAttention", {"nn.MultiheadAttention", "default", "LSH"})


def test_encoder() -> None:
    rows = models.bench_encoder(64, 1, 16, 2, **QUICK)
    check(rows, "nn.TransformerEncoder", {"nn.TransformerEncoder", "replace_attention"})
