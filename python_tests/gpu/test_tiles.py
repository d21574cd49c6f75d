"""The table of tiles: keys, defaults, the override file, wrong files, and the search for tiles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reformer_kernels.gpu import architectures, tile_search, tiles
from reformer_kernels.gpu.instruction_issue import Cost, IssueCount
from reformer_kernels.gpu.machine_code import MachineCode
from reformer_kernels.gpu.tiles import Tile, TileRow

ROW = TileRow("attention_forward", "sm_90", 16, 64, Tile(32, 128, 64, 8, 3), spill_bytes=0)


@pytest.fixture(autouse=True)
def forget_files() -> Iterator[None]:
    yield
    tiles.table.cache_clear()


def test_shipped_table_is_valid_and_default_rule_covers_every_key() -> None:
    for row in tiles.read_tiles(tiles.SHIPPED):
        tile = tiles.tile(**{name: getattr(row, name) for name in tiles.KEY_FIELDS})
        assert tile == row.tile
        assert row.tile.dims <= row.head_dim
    for architecture in (*architectures.ARCHITECTURES, architectures.INTERPRETER):
        for bits in (16, 32):
            for head_dim in (1, 16, 17, 64, 65, 256):
                tile = tiles.tile("no such kernel", architecture=architecture, bits=bits, head_dim=head_dim)
                assert tile.dims <= tiles.padded_head_dim(head_dim)


def test_rows_without_options_serve_all_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(options: str) -> Tile:
        return tiles.tile("probe", architecture="sm_90", bits=16, head_dim=64, options=options)

    file = tmp_path / "tiles.json"
    every = replace(ROW, kernel="probe")
    plain = replace(every, tile=Tile(64, 64, 64, 4, 2), options="off")
    monkeypatch.setenv(tiles.OVERRIDE_VARIABLE, str(file))
    for rows, tile_of_plain in (([every], every.tile), ([every, plain], plain.tile)):
        tiles.write_tiles(file, rows)
        tiles.table.cache_clear()
        assert tiles.read_tiles(file) == rows
        assert (ask("all"), ask("off")) == (every.tile, tile_of_plain)
    with pytest.raises(ValueError, match="options must be one of off, all, got 'some'"):
        ask("some")


def test_override_file_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(head_dim: int) -> Tile:
        return tiles.tile("attention_forward", architecture="sm_90", bits=16, head_dim=head_dim)

    before, other = ask(64), ask(128)
    file = tmp_path / "tiles.json"
    tiles.write_tiles(file, [ROW, replace(ROW, head_dim=32, spill_bytes=None)], made_by="a test")
    assert tiles.read_tiles(file)[1] == ROW
    monkeypatch.setenv(tiles.OVERRIDE_VARIABLE, str(file))
    # 33..64 are padded to 64; keys that the file does not have keep the shipped tile.
    assert ask(64) == ask(33) == ROW.tile != before
    assert ask(128) == other
    monkeypatch.delenv(tiles.OVERRIDE_VARIABLE)
    assert ask(64) == before
    monkeypatch.setenv(tiles.OVERRIDE_VARIABLE, str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match="no such file of tiles"):
        ask(64)


FIELDS: dict[str, Any] = {"kernel": "k", "architecture": "sm_80", "bits": 16, "head_dim": 64}
FIELDS |= {"rows": 64, "keys": 64, "dims": 64, "warps": 4, "stages": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 48}, "rows must be a power of two in 16..1024, got 48"),
        ({"keys": 8}, "keys must be"),
        ({"dims": True}, "dims must be"),
        ({"warps": 32}, "warps must be a power of two in 1..16, got 32"),
        ({"stages": 0}, "stages must be an integer in 1..8, got 0"),
        ({"architecture": "sm_70"}, "architecture must be one of sm_80"),
        ({"bits": 64}, "bits must be 16 or 32"),
        ({"head_dim": 48}, "head_dim must be a power of two"),
        ({"head_dim": 512}, r"head_dim must be an integer in 1\.\.256"),
        ({"spill_bytes": -4}, "spill_bytes must be"),
        ({"kernel": 3}, "kernel must be a name"),
        ({"chunk": 64}, r"unknown fields \['chunk'\]"),
        ({"rows": None}, "rows must be"),
    ],
)
def test_invalid_rows_say_which_and_why(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(json.dumps({"schema": 1, "tiles": [FIELDS, FIELDS | {"head_dim": 32} | change]}))
    with pytest.raises(ValueError, match=f"tiles.json: row 1: .*{message}"):
        tiles.read_tiles(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object with"),
        ('{"schema": 2, "tiles": []}', '"schema": 1'),
        ('{"schema": 1, "tiles": {}}', '"tiles" must be a list'),
        ('{"schema": 1, "tiles": [3]}', "row 0: must be an object"),
        (json.dumps({"schema": 1, "tiles": [FIELDS, FIELDS]}), "row 1: a second row"),
        ('{"schema": 1, "tiles": [{"kernel": "k"}]}', "missing fields"),
    ],
)
def test_invalid_files_say_why(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        tiles.read_tiles(file)


def test_architectures_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = {
        c: architectures.architecture_of_capability(*c) for c in ((8, 0), (8, 9), (9, 0), (10, 3), (12, 0))
    }
    assert list(architecture.values()) == ["sm_80", "sm_80", "sm_90", "sm_100", "sm_80"]
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0 or higher, this device has 7\.5"):
        architectures.architecture_of_capability(7, 5)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="got a tensor on cpu"):
        architectures.architecture_of(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert architectures.architecture_of("cpu") == architectures.INTERPRETER


def test_score_of_a_tile() -> None:
    """Issue cycles, residency and spills decide together."""

    def code(cycles: float, **changes: Any) -> MachineCode:
        values: dict[str, Any] = dict.fromkeys((f.name for f in dataclasses.fields(MachineCode)), 0)
        step = Cost(1, 64 * 128, 0.0, {"issue": cycles, "tensor": 1.0}, {})
        values |= {
            "issue": IssueCount(
                step, dataclasses.replace(step, cycles={"issue": 0.0, "tensor": 0.0}, pairs=0)
            )
        }
        values |= {"architecture": "sm_90", "preset": "paper", "tile": Tile(64, 128, 64, 4, 2), "warps": 4}
        return MachineCode(**values | {"resident_blocks": 2, "head_dim": 64} | changes)

    def score(cycles: float, **changes: Any) -> float:
        return tile_search.predicted_seconds(code(cycles, **changes))

    chip = architectures.CHIPS["sm_90"]
    # One step of 128 keys serves a tile of 64 rows; 8 resident warps double the time.
    assert score(6400.0) == pytest.approx(2 * 100 / (chip.multiprocessors * chip.clock))
    assert score(6400.0, resident_blocks=4) == pytest.approx(0.75 * score(6400.0))
    assert score(6400.0, spill_bytes=64) == pytest.approx(2 * score(6400.0))
    # Fewer instructions win over a better residency that does not make up for them.
    assert score(4000.0) < score(6400.0, resident_blocks=4)


def test_search_walks_to_the_best_neighbour_and_records_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    """With made-up reports: more rows are better up to 128, 2 warps would be best but spill, and fewer keys
    gain too little to be believed."""

    def inspected(tile: Tile) -> Any:
        spills = 16 if tile.warps == 2 else 0
        fault = [f"spills {spills} bytes a thread, 0 allowed"] if spills else []
        return SimpleNamespace(
            faults=fault, code=SimpleNamespace(dtype="bfloat16", head_dim=64, spill_bytes=spills, registers=9)
        )

    def judge(kernel: str, architecture: str, bits: int, head_dim: int, tile: Tile) -> tile_search.Judged:
        if tile.keys > 64:
            raise RuntimeError("does not compile: out of resources")
        score = 100 * tile.warps / tile.rows + tile.stages + tile.keys / 1000
        return tile_search.Judged(tile, inspected(tile), score)

    lines: list[str] = []
    monkeypatch.setattr(tile_search, "judge", judge)
    monkeypatch.setattr(tile_search, "most_spilled", lambda *key: 0)
    monkeypatch.setattr(tile_search, "describe", lambda judged: "as judged")
    row = tile_search.search("some_kernel", "sm_90", 16, 64, evaluations=40, say=lines.append)
    assert (row.tile.rows, row.tile.warps, row.tile.stages, row.spill_bytes) == (128, 4, 1, 0)
    assert row.tile.keys == tiles.default_tile(architecture="sm_90", bits=16, head_dim=64).keys
    assert row.key == ("some_kernel", "sm_90", 16, 64, "all")
    assert any("out of resources" in line for line in lines)
    # A tile that spills with another dtype gives way to the next best.
    spills = {row.tile: 8}
    monkeypatch.setattr(tile_search, "most_spilled", lambda *key: spills.get(key[-1], 0))
    other = tile_search.search("some_kernel", "sm_90", 16, 64, evaluations=40, say=lines.append)
    assert other.tile != row.tile and other.tile.rows == 128 and other.spill_bytes == 0
    assert (
        tile_search.search("some_kernel", "sm_90", 32, 64, evaluations=40, say=lines.append).spill_bytes == 8
    )
    # Two compilations do not reach the best tile. A start that has faults is no answer.
    few = tile_search.search("some_kernel", "sm_90", 16, 64, evaluations=2, say=lines.append)
    assert few.tile != row.tile
    monkeypatch.setattr(tile_search.tiles, "tile", lambda *a, **k: Tile(128, 64, 64, 2, 1))
    with pytest.raises(RuntimeError, match="none of 1 tiles suits some_kernel on sm_90"):
        tile_search.search("some_kernel", "sm_90", 16, 64, evaluations=1, say=lines.append)
