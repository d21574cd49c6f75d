"""The paper's experiments: each runs at its smallest, goes on where it stopped, and is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.paper import duplication, language, report
from bench.paper.__main__ import EXPERIMENTS, main
from bench.paper.records import Records, RecordsError
from bench.paper.training import Schedule, train

TEXT = "--text"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_bytes(bytes(range(32, 127)) * 40)
    return file


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_smallest_run_and_its_report(
    experiment: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"{experiment}-smoke.json"
    command = [experiment, "--preset", "smoke", "--output", str(file)]
    if experiment in language.EXPERIMENTS:
        command += [TEXT, str(text)]
    assert main(command) == 0
    first = file.read_bytes()
    assert main(command) == 0  # nothing is missing, so nothing is done again
    assert file.read_bytes() == first
    for run in json.loads(first)["runs"].values():
        assert {"machine", "commit", "versions"} <= run["provenance"].keys()
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(report, "TABLES", tmp_path / "tables.md")
    (tmp_path / "images").mkdir()
    assert main(["report", str(file)]) == 0
    assert "| --- |" in (tmp_path / "tables.md").read_text()


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def points(stop_at: int | None) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        settings = duplication.PRESETS["smoke"]
        model = duplication.make_model(settings, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

        def loss_of(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            tokens = duplication.sequences(settings, 2, step)
            return model(tokens, labels=tokens)

        def evaluate() -> dict[str, Any]:
            return {"accuracy": duplication.accuracy(model, settings, 2)}

        return train(
            model, [optimizer], Schedule(8, 2), loss_of, evaluate, tmp_path / "run.checkpoint", lambda _: None
        )

    whole = points(None)
    monkeypatch.setattr("bench.paper.training.SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        points(5)
    for one, other in zip(whole, points(None), strict=True):
        for name in ("step", "loss", "accuracy"):
            assert one[name] == other[name]


def test_a_file_of_other_settings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    Records(file, "hashes", {"steps": 1}).run("full seed 0", lambda: {"points": []})
    with pytest.raises(RecordsError, match="other settings"):
        Records(file, "hashes", {"steps": 2})


def test_more_seeds_join_a_file(tmp_path: Path) -> None:
    file = tmp_path / "duplication.json"
    command = ["duplication", "--preset", "smoke", "--output", str(file), "--seeds"]
    assert main([*command, "0"]) == 0
    assert main([*command, "0,1"]) == 0
    runs = json.loads(file.read_text())["runs"]
    assert len(runs) == 2 * len(duplication.PRESETS["smoke"].trained)


def test_nonsense_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["hashes", "--preset", "smoke", "--only", "17 hashes", TEXT, __file__]) == 2
    assert "17 hashes" in capsys.readouterr().err
    assert main(["hashes", "--preset", "smoke", TEXT, str(tmp_path / "missing")]) == 2
    assert "neither a file nor a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["duplication", "--steps", "0"])


def test_models_of_an_experiment_have_the_same_parameters() -> None:
    """Bits per byte are compared at equal parameters; separate keys have a projection more."""
    settings = language.PRESETS["smoke"]
    for experiment, variants in language.EXPERIMENTS.items():
        if experiment == "sharing":
            continue
        counts = {
            sum(p.numel() for p in language.make_model(name, variant(settings)).parameters())
            for name, variant in variants.items()
        }
        assert len(counts) == 1, experiment
