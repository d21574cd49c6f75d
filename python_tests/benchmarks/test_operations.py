"""Every operation of the registry, run on sizes too small to time, and the measures beside the times."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from reformer_kernels.benchmarks import huggingface, layers
from reformer_kernels.benchmarks.calls import Call
from reformer_kernels.benchmarks.harness import Settings, run
from reformer_kernels.benchmarks.memory import peak_allocated
from reformer_kernels.benchmarks.peers import PEERS
from reformer_kernels.benchmarks.registry import AXES, OPERATIONS, SINGLE
from reformer_kernels.benchmarks.results import Report
from reformer_kernels.benchmarks.sizes import Sizes

SIZES: dict[str, Any] = {"batch": 1, "heads": 2, "head_dim": 8, "width": 16, "chunk": 16, "causal": True}
VALUES: dict[str, Any] = {
    "seq_lens": (64, 128),
    "layers": (1,),
    "d_ff": (32,),
    "vocabulary": (300,),
    "hashes": (1, 2),
}


def measure(name: str, dtype: str = "float32", **changes: Any) -> Report:
    """The report of an operation on small sizes."""
    operation = OPERATIONS[name]
    values = VALUES | {"variants": operation.variants} | changes
    sizes = {SINGLE[option]: SIZES[option] for option in operation.options if option in SIZES}
    axes = {AXES[option]: values[option] for option in operation.options if option in AXES}
    # In the registry's order, as the command line puts them.
    axes = {axis: axes[axis] for axis in AXES.values() if axis in axes}
    compare = [key for key in operation.peers if PEERS[key].device is None and PEERS[key].missing() is None]
    memory = operation.memory == "allocated"
    settings = Settings(
        operation,
        Sizes(**sizes, dtype=dtype),
        axes,
        compare,
        budget=0.0,
        max_repeats=1,
        measure_memory=memory,
    )
    return run(settings)


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8, "feed_forward_size": 8}
    model = {**small, "attn_layers": ["lsh"], "axial_pos_embds_dim": [4, 12]}
    monkeypatch.setattr(huggingface, "MODELS", {"default": model})
    operation = dataclasses.replace(OPERATIONS["huggingface-model"], variants=("default",))
    monkeypatch.setitem(OPERATIONS, "huggingface-model", operation)


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_every_operation(name: str, small_models: None) -> None:
    operation = OPERATIONS[name]
    if operation.package is not None:
        pytest.importorskip("transformers")
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    report = measure(name)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert report.agrees, [str(check) for check in report.checks]
    assert report.left_out == []
    compared = {peer.title for peer in PEERS.values() if peer.device is None and peer.missing() is None}
    peers = set(operation.peers.values()) & compared
    assert {row.name for row in report.rows} == {*operation.ours, *operation.baselines, *peers}

    document = report.to_json()
    for row in document["rows"]:
        assert row["n"] == 1 and row["p20"] == row["median"] == row["p80"] > 0
        assert set(operation.fields) <= set(row)
        if operation.memory == "allocated" and row["phase"] != "backward":
            assert row["working_memory_bytes"] >= 0
        beside = {*operation.baselines, *peers}
        assert row["ours"] == (row["name"] in operation.ours)
        if row["ours"]:
            assert beside <= set(row["ratios"])
    for option, values in VALUES.items():
        if option in operation.options:
            axis = AXES[option]
            found = {row[axis] for row in document["rows"] if row["name"] in operation.ours}
            assert found == set(values), axis
    if operation.variants:
        assert {row["variant"] for row in document["rows"]} == set(operation.variants)


def test_rows_without_hash_rounds_are_timed_once() -> None:
    report = measure("mha")
    plain = [row for row in report.rows if row.name == "nn.MultiheadAttention" and row.phase == "forward"]
    assert [row.sizes.length for row in plain] == [64, 128]
    assert len([row for row in report.rows if row.name == "LSH" and row.phase == "forward"]) == 4


@pytest.mark.parametrize("name", ["model", "mha", "encoder", "ffn", "reversible"])
def test_bfloat16(name: str) -> None:
    assert measure(name, "bfloat16", seq_lens=(64,), hashes=(1,)).rows


def test_forward_only() -> None:
    operation = OPERATIONS["ffn"]
    axes = {"length": (32,), "d_ff": (16,), "variant": ("gelu",)}
    settings = Settings(operation, Sizes(width=8), axes, backward=False, budget=0.0, max_repeats=1)
    assert {row.phase for row in run(settings).rows} == {"forward"}


def test_a_wrong_result_is_found() -> None:
    sizes = Sizes(length=16, width=8, d_ff=16, variant="gelu")
    calls = {name: OPERATIONS["ffn"].build(name, sizes) for name in ("plain", "chunked")}
    assert all(check.ok for check in OPERATIONS["ffn"].check(sizes, calls))
    right = calls["chunked"]
    wrong = Call("chunked", sizes, lambda: [1.1 * right.forward()[0]])
    assert not any(check.ok for check in OPERATIONS["ffn"].check(sizes, calls | {"chunked": wrong}))


def test_drift() -> None:
    sizes = Sizes(layers=4, n_hashes=2, chunk_length=16, variant="attention")
    found = {(check.peer, check.quantity): check for check in layers.check_drift(sizes, {})}
    assert all(check.ok for check in found.values()), found
    assert found["reversible exact", "rebuilt elements that differ"].value == 0
    assert 0 < found["reversible float", "rebuilt input error"].value < 1e-5


def test_peak_allocated_counts_what_lives_at_once() -> None:
    def call() -> None:
        for _ in range(3):
            torch.empty(1000)
        kept = torch.empty(500)
        torch.empty(250)
        del kept

    assert peak_allocated(call) == 4000
    assert peak_allocated(lambda: [torch.empty(1000) for _ in range(3)]) == 12000


def test_memory_of_reversible_blocks_does_not_grow_with_depth() -> None:
    report = measure("reversible", seq_lens=(256,), layers=(2, 6), hashes=(1,), variants=("attention",))
    peaks = {
        (row.name, row.sizes.layers): row.memory
        for row in report.rows
        if row.phase == "forward+backward" and row.memory is not None
    }
    # Random-number states, 10 KB a block, are the larger part of what grows here.
    assert peaks["reversible float", 6] < peaks["reversible float", 2] + 4 * 2 * 11000
    assert peaks["plain", 6] > 2 * peaks["plain", 2]


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from reformer_kernels.benchmarks.peers import Peer
    from reformer_kernels.cli import app

    monkeypatch.setattr(Peer, "missing", lambda _: "pip install transformers")
    done = CliRunner().invoke(app, ["bench", "huggingface"])
    assert done.exit_code == 2 and "pip install transformers" in done.output
