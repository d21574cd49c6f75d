"""`reformer-kernels recall`: its shares against masks written out, its data, its refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from reformer_kernels import LSHConfig, LSHSelfAttention, ReformerConfig, ReformerLM
from reformer_kernels import functional as F
from reformer_kernels.benchmarks import recall
from reformer_kernels.cli import app
from reformer_kernels.models.config import LayerKind
from reformer_kernels.testing import normal

runner = CliRunner()


def cursor_mask(q: Tensor, k: Tensor, config: LSHConfig) -> Tensor:
    """(L_q, L_k): what each query of the one head sees in any round, by the definition."""
    queries, keys = F.lsh_cross_layout(q, k, config, seed=recall.SEED)
    L_q, L_k, w = q.shape[2], k.shape[2], config.window_size
    before, after = (w, 0) if config.causal else (w // 2, w - w // 2)
    seen = torch.zeros(L_q, L_k, dtype=torch.bool)
    for r in range(config.n_hashes):
        starts, key_starts = queries.bucket_starts[0, 0, r].tolist(), keys.bucket_starts[0, 0, r].tolist()
        order, key_order = queries.order[0, 0, r].tolist(), keys.order[0, 0, r].tolist()
        for x in range(len(starts) - 1):
            own = key_order[key_starts[x] : key_starts[x + 1]]
            for i in order[starts[x] : starts[x + 1]]:
                place = i if config.causal else i * L_k // L_q
                c = sum(j <= place for j in own)
                seen[i, own[max(0, c - before) : c + after]] = True
    return seen


@pytest.mark.parametrize("causal", [True, False])
def test_shares_are_those_of_written_out_masks(causal: bool) -> None:
    q, k = normal(1, 1, 90, 8, dtype=torch.float32), normal(1, 1, 140, 8, dtype=torch.float32, seed=1)
    row = next(recall.measure(recall.Heads("x", 2 * q, k), [10], [2], causal))
    config = LSHConfig(window="bucket", bucket_window=10, n_hashes=2, causal=causal)
    hidden = torch.ones(90, 140, dtype=torch.bool).triu(1) & causal
    p = ((2 * q[0, 0] @ k[0, 0].T) * 8**-0.5).masked_fill(hidden, -math.inf).softmax(-1)
    seen = cursor_mask(2 * q, k, config)
    assert row.cursor == pytest.approx(float((p * seen).sum(-1).mean()), rel=1e-4)
    assert row.cursor_across is not None and row.cursor_across > row.cursor
    layout = F.lsh_cross_layout(2 * q, k, config, seed=recall.SEED)
    ranks, key_ranks = (one.order[0, 0].long().argsort(-1) for one in layout)
    distance = (ranks * 140 // 90 // 5)[:, :, None] - (key_ranks // 5)[:, None]
    aligned = ((distance == 0) | (distance == 1)).any(0)
    assert row.equal_rank == pytest.approx(float((p * aligned).sum(-1).mean()), rel=1e-4)
    assert row.shared_qk is None


def test_windows_over_everything_catch_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "BLOCK_PAIRS", 2000)  # several blocks
    heads = recall.clusters("uneven", 2, 64, 8, 0.5, 0.0)
    for causal in (True, False):
        row = next(recall.measure(heads, [128], [64], causal))
        assert row.cursor == pytest.approx(1, abs=0.02)
        assert row.equal_rank == pytest.approx(1, abs=1e-5)
        assert row.shared_qk == pytest.approx(1, abs=0.02)


def test_command(tmp_path: Path) -> None:
    q, k = normal(1, 2, 60, 8), normal(1, 2, 80, 8, seed=1)
    torch.save({"q": q, "k": k}, tmp_path / "heads.pt")
    options = ["--windows", "8,16", "--hashes", "1,2", "--seq-len", "64", "--offset", "1"]
    result = runner.invoke(
        app,
        [
            "recall",
            *options,
            "--clusters",
            "even,uneven",
            "--activations",
            str(tmp_path / "heads.pt"),
            "--json",
            str(tmp_path / "out.json"),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "uneven" in result.output and "heads.pt" in result.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 3 * 2 * 2 * 2
    for row in rows:
        assert 0 < row["cursor"] < 1 and (row["shared_qk"] is None) == (row["data"] == "heads.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clusters", "odd"], "--clusters must be one of even, uneven"),
        (["--clusters", "none"], "nothing to measure"),
        (["--noise", "-1"], "--noise"),
        (["--windows", "0"], "--windows must be positive integers"),
        (["--masks", "none"], "--masks must name causal, both, or both words"),
        (["--activations", "/nowhere.pt"], "/nowhere.pt is not a file of tensors"),
        (
            ["--activations", "/nowhere.pt", "--noise", "1"],
            "--noise is of synthetic data; give --clusters too",
        ),
        (["--activations", "/nowhere.pt", "--seq-len", "9"], "--seq-len is of synthetic data or of a model"),
        (["--text", "/nowhere.txt"], "--text is what a model reads; give --model too"),
        (["--model", "/nowhere"], "/nowhere: "),
        (["--heads", "0"], "--heads must be positive, got 0"),
    ],
)
def test_refuses(options: list[str], message: str) -> None:
    result = runner.invoke(app, ["recall", *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_refuses_tensors_that_do_not_fit(tmp_path: Path) -> None:
    wrong = {
        "q": {"q": normal(1, 2, 8, 4)},
        "dims": {"qk": normal(2, 8, 4)},
        "heads": {"q": normal(1, 2, 8, 4), "k": normal(1, 1, 8, 4)},
    }
    for name, tensors in wrong.items():
        torch.save(tensors, tmp_path / "x.pt")
        result = runner.invoke(app, ["recall", "--activations", str(tmp_path / "x.pt")])
        assert result.exit_code == 2, name


def test_activations_of_trained_models(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    script = [sys.executable, str(root / "bench" / "recall_activations.py"), "a.safetensors", "--steps", "1"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    heads = recall.read_heads(tmp_path / "a.safetensors")
    assert all(x.shape == (4, 4, 2048, 64) and x.std() > 0.01 for x in (heads.q, heads.k, heads.qk))
    assert not torch.equal(heads.q, heads.k)


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level causal model of transformers: a local and an LSH layer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    config = transformers.ReformerConfig(
        vocab_size=258,
        attn_layers=["local", "lsh"],
        hidden_size=32,
        num_attention_heads=2,
        attention_head_size=16,
        feed_forward_size=32,
        axial_pos_shape=(8, 16),
        axial_pos_embds_dim=[8, 24],
        max_position_embeddings=128,
        is_decoder=True,
        num_hashes=2,
        num_buckets=16,
        local_attn_chunk_length=16,
        lsh_attn_chunk_length=16,
    )
    torch.manual_seed(0)
    transformers.ReformerModelWithLMHead(config).save_pretrained(folder)
    return folder


def test_a_models_own_layers(transformers_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("what the model reads " * 100)
    options = ["--text", str(text), "--seq-len", "128", "--windows", "32,256", "--hashes", "2"]
    result = runner.invoke(
        app, ["recall", "--model", str(transformers_folder), *options, "--json", str(tmp_path / "out.json")]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["window"] for row in rows] == [32, 256]
    for row in rows:
        # The model is causal and shares queries and keys.
        assert row["causal"] and row["cursor"] is None and "attention" in row["data"]
    assert 0 < rows[0]["shared_qk"] < 1
    assert rows[1]["shared_qk"] == pytest.approx(1, abs=1e-4)
    assert "cursor" not in result.output and "shared-QK" in result.output
    long = ["recall", "--model", str(transformers_folder), "--seq-len", "512"]
    result = runner.invoke(app, long)
    assert result.exit_code == 2
    assert "does not read 512 bytes of text" in " ".join(result.output.replace("│", " ").split())


def test_query_keys_are_those_that_the_layer_attends_with() -> None:
    kind: LayerKind = "lsh"
    config = ReformerConfig(
        vocab_size=256, d_model=16, layers=(kind, kind), num_heads=2, causal=True, max_length=64
    )
    model = ReformerLM(config).eval()
    text = torch.arange(64, dtype=torch.uint8)
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, LSHSelfAttention):
            module.query_key.register_forward_hook(lambda module, inputs, output: seen.append(output))
    heads = recall.model_heads(model, text)
    assert len(heads) == len(seen) == 2
    for one, projected in zip(heads, seen, strict=True):
        assert one.qk is not None and one.qk.shape == (1, 2, 64, 8)
        assert torch.equal(one.qk[0, 1], projected[0, :, 8:])
        assert one.rule is not None and one.rule.causal
    with pytest.raises(recall.RecallError, match="no LSH layer"):
        recall.model_heads(torch.nn.Linear(2, 2), text)
    small = ReformerLM(dataclasses.replace(config, vocab_size=100))
    with pytest.raises(recall.RecallError, match="vocabulary has 100 tokens"):
        recall.model_heads(small, text)


def test_our_own_folders_are_loaded_by_their_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(ReformerLM, "load", lambda folder: model)
    config = {"format": "reformer-kernels", "class": "ReformerLM", "config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert recall.load_model(tmp_path) is model
    (tmp_path / "config.json").write_text(json.dumps(config | {"class": "Other"}))
    with pytest.raises(recall.RecallError, match="holds a Other; recall reads Reformer, ReformerLM"):
        recall.load_model(tmp_path)
