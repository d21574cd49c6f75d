"""Models in folders: exact, each tensor once, harmless, and refused where damaged or of another program."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from reformer_kernels import LSHConfig, Reformer, ReformerConfig, ReformerEncoderDecoder, ReformerLM, hf
from reformer_kernels.models import CheckpointError, ReformerClassifier, ReformerQuestionAnswering

CONFIG = ReformerConfig(
    vocab_size=20,
    d_model=16,
    layers=("local", "lsh"),
    num_heads=2,
    causal=True,
    lsh=LSHConfig.trax(bucket_factors=(4, 8), chunk_length=8),
    axial_shape=(8, 16),
    axial_dims=(4, 12),
)
TOKENS = torch.randint(20, (2, 50), generator=torch.Generator().manual_seed(0))


def results(model: nn.Module) -> tuple[Tensor, ...]:
    out = model.eval()(TOKENS)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cls", [Reformer, ReformerLM, ReformerClassifier, ReformerQuestionAnswering])
def test_a_loaded_model_is_the_saved_one(cls: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = cls(CONFIG).to(dtype)
    folder = tmp_path / "new" / "model"
    model.save(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    state = torch.get_rng_state()
    again = cls.load(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.training and again.config == CONFIG
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert all(map(torch.equal, results(again), results(model)))
    results(again)[0].float().sum().backward()
    # Hugging Face's reader takes our folders too.
    other = hf.from_pretrained(folder, backend="reference")
    assert type(other) is cls and not other.training and other.config.backend == "reference"
    assert hf.from_pretrained(folder, dtype=torch.float16).state_dict().popitem()[1].dtype == torch.float16
    with pytest.raises(CheckpointError, match=f"of class '{cls.__name__}', not a ReformerEncoderDecoder"):
        ReformerEncoderDecoder.load(folder)


def test_a_head_keeps_its_own_options(tmp_path: Path) -> None:
    ReformerClassifier(CONFIG, 7, dropout=0.25).save(tmp_path)
    again = ReformerClassifier.load(tmp_path)
    assert (again.n_labels, again.dropout, again.config.dropout) == (7, 0.25, 0.0)


def test_a_model_in_use_does_not_change_its_file(tmp_path: Path) -> None:
    ReformerLM(CONFIG).save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    again = ReformerLM.load(tmp_path)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.fill_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    again.save(tmp_path)  # over the file that it was read from
    assert all((x == 1.0).all() for x in ReformerLM.load(tmp_path).parameters())


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path: Path) -> None:
    sizes = []
    for tied in (True, False):
        config = ReformerConfig(
            vocab_size=5000, d_model=16, layers=("local",), streams="mean", tie_embeddings=tied
        )
        ReformerLM(config).save(tmp_path)
        sizes.append((tmp_path / "model.safetensors").stat().st_size)
        again = ReformerLM.load(tmp_path)
        assert (again.head.weight is again.reformer.embedding.tokens.weight) == tied
    assert sizes[1] - sizes[0] > 0.9 * 5000 * 16 * 4


def change(folder: Path, **values: Any) -> None:
    """Rewrite entries of config.json; None removes one."""
    path = folder / "config.json"
    contents = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in contents.items() if value is not None}))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    ReformerLM(CONFIG).save(folder)
    tensors, config = folder / "model.safetensors", folder / "config.json"
    whole, text = tensors.read_bytes(), config.read_text()

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            ReformerLM.load(folder)
        tensors.write_bytes(whole)
        config.write_text(text)

    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for content in (b"", whole[:100], whole[:-1], whole + b"x", bytes(flipped)):
        tensors.write_bytes(content)
        refused(r"model\.safetensors is damaged")
    tensors.unlink()
    refused(r"there is no model\.safetensors")
    for content in ("", text[:-9], "\0", '"text"', "[" * 100_000):
        config.write_text(content)
        refused(r"config\.json (is damaged|must hold a JSON object)")
    config.unlink()
    refused("is no model folder: it has no config.json")
    for name in ("class", "config", "sha256"):
        change(folder, **{name: None})
        refused(f"config.json is not complete: it lacks {name}")
    change(folder, sha256=3)
    refused("is damaged or belongs to another model")

    values: dict[str, Any] = json.loads(text)["config"]
    for wrong, message in [
        ({"d_model": 15}, "d_model must be a multiple of num_heads"),
        ({"colour": 1}, "unknown colour"),
        (
            {"d_model": 32, "axial_dims": (8, 24)},
            r"wrong shape: reformer.embedding.tokens.weight is",
        ),
        ({"layers": ("local", "lsh", "lsh")}, "missing: reformer.layers.blocks.2.f"),
        ({"layers": ("local",)}, "unknown: reformer.layers.blocks.1.f"),
    ]:
        change(folder, config={**values, **wrong})
        refused(message)
    for config_value in (3, [], "lsh", {"encoder": {}}):
        change(folder, config=config_value)
        refused("config.json does not describe a ReformerLM")


def test_crafted_configurations_are_refused_fast(tmp_path: Path) -> None:
    """Whatever sizes a configuration asks for, nothing of that size is made."""
    ReformerLM(CONFIG).save(tmp_path)
    values: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())["config"]
    huge = 2**31 - 1
    start = time.perf_counter()
    for wrong, message in [
        ({"layers": ["lsh"] * 100_000}, "layers has 100000 entries, the file of tensors only"),
        ({"axial_dims": [1] * 10**6, "d_model": 10**6, "axial_shape": [1] * 10**6}, "has 1000000 entries"),
        ({"vocab_size": huge, "d_model": 2 * (huge // 2), "axial_dims": None, "axial_shape": None}, "."),
        ({"vocab_size": huge, "token_context": 64}, "wrong shape"),
        ({"d_ff": huge, "max_length": huge, "axial_shape": [huge, huge]}, "wrong shape"),
        ({"num_heads": huge, "head_dim": huge}, "."),
    ]:
        change(tmp_path, config={**values, **wrong})
        with pytest.raises(CheckpointError, match=message):
            ReformerLM.load(tmp_path)
    assert time.perf_counter() - start < 20


def test_folders_and_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    """One sentence each that says what it is and what to do."""
    with pytest.raises(CheckpointError, match="there is no folder"):
        ReformerLM.load(tmp_path / "nothing")
    old = {"class": "ReformerLM", "config": CONFIG.to_dict(), "state_dict": ReformerLM(CONFIG).state_dict()}
    torch.save(old, tmp_path / "model.pt")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(old["config"]))
    safetensors.torch.save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    for name in ("model.pt", "model.pkl", "model.safetensors"):
        with pytest.raises(CheckpointError, match="is a file; a model is a folder with"):
            ReformerLM.load(tmp_path / name)
        with pytest.raises(NotADirectoryError, match="models are saved as folders"):
            ReformerLM(CONFIG).save(tmp_path / name)
    with pytest.raises(CheckpointError, match="is no model folder: it has no"):
        ReformerLM.load(tmp_path)

    theirs = ReformerConfig(vocab_size=20, d_model=16, layers=("lsh",), num_heads=2, lsh=LSHConfig.trax())
    hf.save_pretrained(ReformerLM(theirs), tmp_path / "transformers")
    with pytest.raises(CheckpointError, match=r"written by transformers.*hf\.from_pretrained"):
        ReformerLM.load(tmp_path / "transformers")
    change(tmp_path / "transformers", model_type=None, architectures=None, format="other")
    with pytest.raises(CheckpointError, match="is of another program"):
        ReformerLM.load(tmp_path / "transformers")


def test_files_run_no_code(tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    folder = tmp_path / "model"
    ReformerLM(CONFIG).save(folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Malice()))
        with pytest.raises(CheckpointError, match="damaged"):
            ReformerLM.load(folder)
        ReformerLM(CONFIG).save(folder)
    assert not (tmp_path / "ran").exists()


def test_a_failed_save_keeps_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full after the first or the second file."""
    ReformerLM(CONFIG).save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    real = os.fsync
    for room in (0, 1):
        calls = 0

        def full(descriptor: int, room: int = room) -> None:
            nonlocal calls
            calls += 1
            if calls > room:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            ReformerLM(CONFIG).save(tmp_path)
        with pytest.raises(OSError, match="No space left"):
            hf.save_pretrained(
                ReformerLM(ReformerConfig(vocab_size=20, layers=("lsh",), lsh=LSHConfig.trax())), tmp_path
            )
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    ReformerLM.load(tmp_path)
