"""The measuring functions of the models' benchmarks, on problems too small to time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reformer_kernels.cli import models
from reformer_kernels.cli.steps import Row

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


def test_huggingface() -> None:
    pytest.importorskip("transformers")
    rows = models.bench_huggingface((128,), 32, 2, 2, **QUICK)
    check(rows, "Hugging Face", {"Hugging Face", "accelerated"})


def test_multihead_attention() -> None:
    rows = models.bench_multihead_attention((32, 300), 16, 2, **QUICK)
    for length in (32, 300):
        part = [row for row in rows if row["length"] == length]
        check(part, "nn.MultiheadAttention", {"nn.MultiheadAttention", "default", "LSH"})


def test_encoder() -> None:
    rows = models.bench_encoder(64, 1, 16, 2, **QUICK)
    check(rows, "nn.TransformerEncoder", {"nn.TransformerEncoder", "replace_attention"})
