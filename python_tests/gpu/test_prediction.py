"""Predicted times: the keys that tiles walk, what launches cost, where a call is ahead of dense attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from reformer_kernels import functional
from reformer_kernels.gpu import prediction, reach
from reformer_kernels.gpu.architectures import CHIPS
from reformer_kernels.gpu.cost_model import Shape
from reformer_kernels.gpu.instruction_issue import Cost, IssueCount
from reformer_kernels.gpu.machine_code import MachineCode
from reformer_kernels.gpu.prediction import HOST_SECONDS, LAUNCH_SECONDS, Prediction, Question
from reformer_kernels.gpu.presets import PRESETS
from reformer_kernels.gpu.specializations import Launched, Specialization
from reformer_kernels.gpu.tiles import Tile


def test_ranges_of_chunks_are_what_the_rule_says() -> None:
    # Chunk 0 looks back at nothing without a ring, and at a whole chunk with one.
    assert reach.tile_ranges("local", 640, 64, 64).tolist() == [64] + [128] * 9
    assert reach.tile_ranges("trax", 640, 64, 64).tolist() == [128] * 10
    assert reach.tile_ranges("full", 640, 64, 64).tolist() == [640] * 10
    assert reach.steps("trax", 640, 64, rows=64, first=0, keys=32) == 4
    assert reach.steps("trax", 640, 64, rows=64, first=128, keys=32) == 0
    assert reach.steps("local", 640, 64, rows=64, first=32, keys=64) == (1 + 9 * 2) / 10
    # A tile of two chunks walks three.
    assert reach.tile_ranges("local", 640, 64, 128).tolist() == [128] + [192] * 4


def test_ranges_inside_buckets_are_about_those_of_a_layout() -> None:
    """The paper's ranges, against a layout of random vectors that was hashed and sorted."""
    config, L = PRESETS["paper"].config, 4096
    x = torch.randn(1, 1, L, 64, generator=torch.Generator().manual_seed(0))
    layout = functional.lsh_layout(x, config, seed=0)
    starts = layout.bucket_starts[0, 0].long()
    total = 0.0
    for round_ in starts:
        rank = torch.arange(L)
        bucket = torch.searchsorted(round_, rank, right=True) - 1
        low = round_[bucket].maximum((rank // 64 - 1) * 64)
        high = round_[bucket + 1].minimum((rank // 64 + 1) * 64)
        total += float((high.view(-1, 64).amax(1) - low.view(-1, 64).amin(1)).double().mean()) / len(starts)
    predicted = reach.tile_ranges("paper", L, 64, 64).double()
    assert float(predicted.mean()) == pytest.approx(total, rel=0.15)
    assert float(predicted.max()) <= 128
    cross = reach.tile_ranges("cross", L, 64, 64)
    assert 64 < float(cross.double().mean()) <= 192 and int(cross.min()) >= 0


def cost(issue: float, pairs: float = 0.0, cache_bytes: float = 0.0) -> Cost:
    return Cost(issue, pairs, cache_bytes, {"issue": issue, "tensor": issue / 10}, {})


def code_of(issue: IssueCount) -> MachineCode:
    values: dict[str, Any] = dict.fromkeys((f.name for f in dataclasses.fields(MachineCode)), 0)
    return MachineCode(**values | {"issue": issue, "tile": Tile(64, 32, 64, 4, 2)})


def launched(programs: int, name: str = "kernel") -> Launched:
    fields: dict[str, Any] = {"name": name, "kernel": type("Kernel", (), {"arg_names": ()})}
    fields |= {"signature": {}, "constexprs": {}, "tile": None, "architecture": "sm_90"}
    fields |= {"dtype": torch.bfloat16, "head_dim": 64, "options": "off"}
    return Launched(Specialization(**fields), programs)


def one_pass(issue: IssueCount, *programs: int, shape: Shape | None = None) -> prediction.PassTime:
    shape = shape or Shape(heads=1, length=64 * 132, n_hashes=1)
    launches = [launched(number) for number in programs]
    return prediction.predict_pass(
        "attention_forward", launches, shape, "trax", "sm_90", lambda _: code_of(issue)
    )


def test_time_of_a_pass() -> None:
    chip = CHIPS["sm_90"]
    # One program of 64 queries on each of 132 multiprocessors: 4 steps of 32 keys each.
    looped = IssueCount(cost(1e6, 2048, 7.0), cost(5e5))
    row = one_pass(looped, 132)
    assert row.kernels[0].multiprocessor_seconds == pytest.approx(4.5e6 / chip.clock)
    assert row.kernels[0].cache_seconds == pytest.approx(132 * 4 * 7.0 / chip.cache_rate)
    assert row.device_seconds(1.0) == pytest.approx(4.5e6 / chip.clock + LAUNCH_SECONDS)
    assert row.device_seconds(0.5) == pytest.approx(2 * 4.5e6 / chip.clock + LAUNCH_SECONDS)
    assert row.bound(1.0) == "issue"
    # The programs of several launches share the steps; a launch that fills a part of the chip takes as long.
    halves = one_pass(looped, 66, 66)
    assert halves.kernels[0].multiprocessor_seconds == pytest.approx(2 * 4.5e6 / chip.clock)
    assert halves.launches == 2
    # A kernel that handles 128 keys before its loop needs no step of it; one without a loop has none.
    for issue in (IssueCount(cost(1e6, 2048), cost(5e5, 64 * 128)), IssueCount(None, cost(5e5, 64 * 128))):
        assert one_pass(issue, 132).kernels[0].multiprocessor_seconds == pytest.approx(5e5 / chip.clock)
    # A program that owns a run of four tiles walks the steps of four.
    runs = one_pass(looped, 33)
    assert runs.kernels[0].multiprocessor_seconds == pytest.approx((4 * 4e6 + 5e5) / chip.clock)


def test_what_bounds_a_pass() -> None:
    cached = one_pass(IssueCount(cost(1.0, 2048, 1e9), cost(1.0)), 132)
    assert cached.bound(1.0) == "cache" and cached.device_seconds(0.5) == cached.device_seconds(1.0)
    cheap = one_pass(IssueCount(None, cost(1.0, 64 * 128)), 132, shape=Shape(heads=1000))
    assert cheap.bound(1.0) == "memory"
    assert cheap.device_seconds(1.0) == pytest.approx(cheap.memory_seconds + LAUNCH_SECONDS)
    question = Question("sm_90", "trax", torch.bfloat16, Shape())
    many = one_pass(IssueCount(None, cost(1.0, 64 * 128)), *[1] * 50)
    assert many.bound(1.0) == "launches"
    assert Prediction(question, (many,), {}, ()).eager_seconds(1.0) == pytest.approx(50 * HOST_SECONDS)


def test_crossings() -> None:
    shape = Shape()
    linear = lambda shape: shape.length * 1e-6  # noqa: E731
    squared = lambda shape: shape.length**2 * 1e-9  # noqa: E731
    assert prediction.crossing(linear, squared, shape) == 1024  # the first multiple of 64 beyond 1000
    assert prediction.crossing(lambda s: 2 * squared(s), squared, shape) is None
    # FlashAttention-2's published rate: 0.125 ms at 3K, 3.6 ms at 16K for 8 heads of 64.
    for length, milliseconds in ((3072, 0.125), (16384, 3.6)):
        flash = prediction.flash_seconds(dataclasses.replace(shape, length=length), 270e12)
        assert flash * 1e3 == pytest.approx(milliseconds, rel=0.02)


def test_a_whole_call_is_predicted_from_its_machine_code() -> None:
    pytest.importorskip("triton")
    shape = Shape(heads=4, length=8192)
    answered = prediction.answer(Question("sm_90", "local", torch.bfloat16, shape))
    assert [row.name for row in answered.passes] == ["attention_forward", "attention_backward"]
    assert answered.launches == sum(row.launches for row in answered.passes) > 1
    forward, backward = (row.device_seconds(1.0) for row in answered.passes)
    assert 1e-6 < forward < backward < 1e-2
    assert answered.device_seconds(0.5) > answered.device_seconds(1.0)
    assert set(answered.crossings) == {
        (name, share) for name in prediction.FLASH_RATES for share in (1.0, 0.5)
    }
    for name in prediction.FLASH_RATES:
        ahead, half = answered.crossings[name, 1.0], answered.crossings[name, 0.5]
        assert ahead is not None and half is not None and 64 <= ahead <= half < 20_000
    assert {row.code.kernel for row in answered.kernels} >= {"attention_forward"}
