"""Models in files: exact, once each, harmless, and refused where damaged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from reformer_kernels import LSHConfig, Reformer, ReformerConfig, ReformerLM
from reformer_kernels.models.files import CheckpointError

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loaded_model_is_the_saved_one(tmp_path: Path, dtype: torch.dtype) -> None:
    for cls in (Reformer, ReformerLM):
        model = cls(CONFIG).to(dtype).eval()
        path = tmp_path / f"{cls.__name__}.pt"
        model.save(path)
        state = torch.get_rng_state()
        again = cls.load(path)
        assert torch.equal(torch.get_rng_state(), state)
        assert again.training and again.config == CONFIG
        assert torch.equal(again.eval()(TOKENS), model(TOKENS))
        assert all(parameter.requires_grad for parameter in again.parameters())
        again(TOKENS).float().sum().backward()
    other = "Reformer" if cls is ReformerLM else "ReformerLM"
    with pytest.raises(CheckpointError, match="holds a ReformerLM, not a Reformer"):
        Reformer.load(tmp_path / "ReformerLM.pt")
    assert (tmp_path / f"{other}.pt").exists()


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path: Path) -> None:
    sizes = []
    for tied in (True, False):
        config = ReformerConfig(
            vocab_size=5000, d_model=16, layers=("local",), streams="mean", tie_embeddings=tied
        )
        ReformerLM(config).save(tmp_path / "model.pt")
        sizes.append((tmp_path / "model.pt").stat().st_size)
        again = ReformerLM.load(tmp_path / "model.pt")
        assert (again.head.weight is again.reformer.embedding.tokens.weight) == tied
    assert sizes[1] - sizes[0] > 0.9 * 5000 * 16 * 4


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    model = ReformerLM(CONFIG)
    model.save(path)
    whole = path.read_bytes()
    contents = torch.load(path, weights_only=True)

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            ReformerLM.load(path)

    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused("is damaged or no checkpoint")
    path.unlink()
    refused("there is no checkpoint")
    torch.save(torch.zeros(3), path)
    refused("it holds a Tensor")
    torch.save({"state_dict": {}}, path)
    refused("it lacks class, config")
    config: dict[str, Any] = contents["config"]
    for wrong, message in [
        ({"d_model": 15}, "d_model must be a multiple of num_heads"),
        ({"colour": 1}, "unknown colour"),
        ({"d_model": 32, "axial_dims": (8, 24)}, "size mismatch"),
        ({"layers": ("local", "lsh", "lsh")}, "Missing key"),
        ({"layers": ("local",)}, "Unexpected key"),
    ]:
        torch.save({**contents, "config": {**config, **wrong}}, path)
        refused(message)
    torch.save({**contents, "config": 3}, path)
    refused("holds no whole ReformerLM")


def test_a_file_runs_no_code(tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"class": "ReformerLM", "config": Malice(), "state_dict": {}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="damaged"):
        ReformerLM.load(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt"
    ReformerLM(CONFIG).save(path)
    before = path.read_bytes()

    def half(contents: object, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"):
        ReformerLM(CONFIG).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
