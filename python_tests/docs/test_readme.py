"""The README's Python examples run as they stand, in order, in one namespace, and are short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import reformer_kernels.hf
from reformer_kernels import functional

README = Path(__file__).resolve().parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if README.exists() else []
LONGEST = 15


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = BLOCKS[number]
    lines = [line for line in source.splitlines() if line.strip()]
    assert len(lines) <= LONGEST, f"{len(lines)} lines:\n{source}"
    monkeypatch.chdir(tmp_path)  # for what an example writes
    torch.manual_seed(0)
    exec(compile(source, f"README.md, example {number}", "exec"), {"__name__": "example"})


def test_there_are_examples() -> None:
    assert len(BLOCKS) >= 3


def test_public_names() -> None:
    names = {
        "LSHConfig", "MultiheadAttention", "LSHSelfAttention", "LocalSelfAttention", "ChunkedFeedForward",
        "ReversibleSequence", "AxialPositionalEmbedding", "Reformer", "ReformerLM", "replace_attention",
    }  # fmt: skip
    functions = {
        "sample_rotations", "lsh_hash", "bucket_sort", "lsh_layout", "attend", "lsh_attention",
        "local_attention", "lsh_cross_attention", "chunked_feed_forward", "linear_cross_entropy",
    }  # fmt: skip
    for module, wanted in ((reformer_kernels, names), (functional, functions)):
        assert wanted <= set(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
    for name in ("load_state_dict", "from_pretrained", "accelerate"):
        assert callable(getattr(reformer_kernels.hf, name))
