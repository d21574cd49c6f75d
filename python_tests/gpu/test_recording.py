"""Launches that are noted in place of being run: kernels, constants, types and programs."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from reformer_kernels.gpu import tiles  # noqa: E402
from reformer_kernels.gpu.architectures import architecture_of, cache_and_multiprocessors  # noqa: E402
from reformer_kernels.gpu.cost_model import Shape  # noqa: E402
from reformer_kernels.gpu.presets import PRESETS  # noqa: E402
from reformer_kernels.gpu.recording import recording  # noqa: E402
from reformer_kernels.gpu.tiles import Tile  # noqa: E402
from reformer_kernels.ops.attention.triton import specializations  # noqa: E402


@triton.jit(do_not_specialize=["length"])
def sample_kernel(x, y, nothing, length, stride, one, scale, D: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(y + tl.arange(0, D) * stride, tl.load(x + tl.arange(0, D) + one) * scale + length)


def test_types_are_those_of_a_launch() -> None:
    x = torch.empty(64, dtype=torch.bfloat16, device="meta")
    with recording("sm_90") as launches:
        sample_kernel[lambda arguments: (arguments["D"], 2)](
            x, x[1:].view(torch.bfloat16), None, 16, 32, 1, 0.5, D=8, num_warps=2
        )
        sample_kernel[(3,)](x, x, None, 2**31, stride=2**31, one=2, scale=1.0, D=8)
    first, second = launches
    assert (first.name, first.programs, first.warps, first.stages) == ("sample", 16, 2, 3)
    signature, constants, divisible = first.types()
    assert signature == {"x": "*bf16", "y": "*bf16", "length": "i32", "stride": "i32", "scale": "fp32"}
    assert constants == {"nothing": None, "one": 1, "D": 8}
    assert divisible == ("x", "stride")  # y starts 2 bytes into its memory; length is not to be specialized
    signature, constants, divisible = second.types()
    assert (signature["length"], signature["stride"], signature["one"]) == ("i64", "i64", "i32")
    assert divisible == ("x", "y", "stride") and second.warps == 4


def test_the_block_sees_another_architecture_and_ends_as_it_began() -> None:
    meta, ordinary = torch.device("meta"), triton.runtime.jit.JITFunction.run
    tile = Tile(32, 32, 32, 2, 1)
    with recording("sm_100", {"attention_forward": tile}):
        assert architecture_of(meta) == "sm_100" and cache_and_multiprocessors(meta)[1] == 148
        assert tiles.tile("attention_forward", architecture="sm_100", bits=16, head_dim=64) == tile
    assert triton.runtime.jit.JITFunction.run is ordinary
    assert tiles.tile("attention_forward", architecture="sm_100", bits=16, head_dim=64) != tile
    with pytest.raises(RuntimeError, match="got a tensor on meta"):
        architecture_of(meta)


@pytest.mark.parametrize("preset", PRESETS)
def test_launches_of_a_call(preset: str) -> None:
    shape = Shape(heads=6, length=3000, n_hashes=2)
    forward = specializations.launches("sm_90", shape, torch.bfloat16, preset, backward=False)
    both = specializations.launches("sm_90", shape, torch.bfloat16, preset, options="all")
    assert {one.specialization.preset for one in both} == {preset} and len(both) > len(forward)
    attending = [one for one in forward if one.specialization.products == 2]
    rows = sum(one.programs * one.specialization.tile.rows for one in attending if one.specialization.tile)
    needed = PRESETS[preset].rounds(2) * 6 * 3000
    assert needed <= rows <= needed * 1.05  # each row of each round once, and the ends of tiles
    assert {name for one in both for name in one.specialization.signature} >= {"key_bias", "seed", "grad_lse"}
