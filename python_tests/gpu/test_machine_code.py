"""The machine code of every Triton kernel, compiled with no GPU present.

The ordinary run compiles some of the configurations, and REFORMER_COMPILE_ALL=1 all of them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from reformer_kernels._limits import KERNEL_DTYPES  # noqa: E402
from reformer_kernels.gpu import machine_code, tiles  # noqa: E402
from reformer_kernels.gpu.architectures import ARCHITECTURES, CHIPS  # noqa: E402
from reformer_kernels.gpu.machine_code import Inspected, Request  # noqa: E402
from reformer_kernels.gpu.presets import PRESETS  # noqa: E402
from reformer_kernels.gpu.specializations import HEAD_DIMS, OPTIONS, TRITON_TYPES, Specialization  # noqa: E402
from reformer_kernels.gpu.tiles import Tile, TileRow  # noqa: E402


def requests() -> list[Request]:
    if os.environ.get("REFORMER_COMPILE_ALL") == "1":
        keys = itertools.product(ARCHITECTURES, KERNEL_DTYPES, HEAD_DIMS, OPTIONS)
        return [Request(*key, presets=tuple(PRESETS)) for key in keys]
    chosen = [Request(a, torch.bfloat16, 128, "all") for a in ARCHITECTURES]
    chosen += [Request(a, torch.bfloat16, 64, "all") for a in ("sm_80", "sm_90", "sm_100")]
    chosen += [Request("sm_90", torch.float32, 64, "all")]
    chosen += [Request("sm_90", torch.bfloat16, 64, "off", presets=(preset,)) for preset in PRESETS]
    return chosen


@pytest.fixture(scope="module")
def compiled() -> list[Inspected]:
    return list(itertools.chain(*machine_code.in_processes(machine_code.inspect, requests(), processes=2)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_have_no_faults(architecture: str, compiled: list[Inspected]) -> None:
    mine = [row for row in compiled if row.code.architecture == architecture]
    assert {row.code.kernel for row in mine} >= {"attention_forward", "lsh_hash", "residual_step"}
    wrong = [f"{row.code}: {fault}" for row in mine for fault in row.faults]
    assert not wrong, "\n".join(wrong)
    for row in mine:
        # The rule on spills once more, without `faults`.
        if row.code.dtype != "float32" and row.code.head_dim <= 128:
            assert row.code.spill_bytes == 0
        assert 0 < row.code.occupancy <= 1


# Faults of a probe kernel


@triton.jit
def probe(  # type: ignore[no-untyped-def]
    q, k, v, order, out, stride, length,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """Attention that gathers rows, without the softmax."""
    i, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    rows = tl.load(q + tl.load(order + i, i < length, other=0)[:, None] * stride + d[None, :])
    total = tl.zeros((ROWS, D), tl.float32)
    for first in range(0, length, KEYS):
        j = first + tl.arange(0, KEYS)
        offsets = tl.load(order + j, j < length, other=0)[:, None] * stride + d[None, :]
        keys = tl.load(k + offsets, (j < length)[:, None], other=0.0)
        values = tl.load(v + offsets, (j < length)[:, None], other=0.0)
        if PRODUCTS:
            total = tl.dot(tl.exp2(tl.dot(rows, keys.T)).to(values.dtype), values, total)
        else:
            total += tl.sum(rows.to(tl.float32) * values.to(tl.float32) * keys.to(tl.float32), axis=1)[
                :, None
            ]
    tl.store(out + i[:, None] * stride + d[None, :], total)


def specialize(
    tile: Tile, *, dtype: torch.dtype = torch.bfloat16, architecture: str = "sm_90", **changes: Any
) -> Specialization:
    pointer = "*" + TRITON_TYPES[dtype]
    return Specialization(
        kernel=probe,
        name="probe",
        signature=dict.fromkeys("qkv", pointer)
        | {"order": "*i32", "out": "*fp32", "stride": "i64", "length": "i32"},
        constexprs={"ROWS": tile.rows, "KEYS": tile.keys, "D": tile.dims}
        | {"PRODUCTS": changes.pop("products", True)},
        tile=tile,
        architecture=architecture,
        dtype=dtype,
        head_dim=tile.dims,
        options="off",
        divisible=changes.pop("divisible", ("q", "k", "v", "order", "out", "stride")),
        scatters=changes.pop("scatters", False),
    )


GOOD = Tile(64, 64, 64, 4, 2)


def judge(specialization: Specialization) -> str:
    return "; ".join(machine_code.faults(machine_code.read(specialization), specialization))


def test_a_good_kernel_has_no_fault_and_its_figures_are_read() -> None:
    for architecture, tensor_core in (("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")):
        specialization = specialize(GOOD, architecture=architecture)
        code = machine_code.read(specialization)
        assert machine_code.faults(code, specialization) == []
        assert any(name.startswith(tensor_core) for name in code.tensor_core_instructions)
        assert 32 < code.registers < 256 and code.loads[16] >= 8
        assert code.shared_bytes >= 2 * 64 * 64 * 2


def test_an_oversized_tile_is_caught() -> None:
    faults = judge(specialize(Tile(128, 128, 256, 4, 2)))
    assert "spills" in faults and "bytes of shared memory, a block may have 232448" in faults


def test_a_kernel_without_tensor_cores_is_caught() -> None:
    assert "has no HGMMA instruction, found none" in judge(specialize(GOOD, products=False))
    # A tile too small for Hopper's own instruction falls back to Ampere's.
    assert "has no HGMMA instruction, found {'HMMA" in judge(specialize(Tile(16, 64, 64, 4, 2)))


def test_narrow_loads_are_caught() -> None:
    assert "has no 16-byte load, found {2:" in judge(specialize(GOOD, divisible=()))


def test_narrow_stores_are_caught() -> None:
    for divisible, fault in (
        (("q", "k", "v", "order", "out", "stride"), ""),
        (("q", "k", "v", "order"), "stores rows"),
    ):
        faults = judge(specialize(GOOD, divisible=divisible, scatters=True))
        assert ("stores rows less than 16 bytes at a time, found {4:" in faults) == bool(fault)


def test_a_spill_that_grows_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spilling = specialize(Tile(128, 32, 128, 4, 1), dtype=torch.float32)
    bytes_now = machine_code.read(spilling).spill_bytes
    assert bytes_now > 0
    file = tmp_path / "tiles.json"
    for recorded, fault in ((bytes_now, ""), (bytes_now - 1, f"spills {bytes_now} bytes a thread")):
        assert spilling.tile is not None
        tiles.write_tiles(file, [TileRow("probe", "sm_90", 32, 128, spilling.tile, recorded)])
        tiles.table.cache_clear()
        monkeypatch.setenv(tiles.OVERRIDE_VARIABLE, str(file))
        assert fault in judge(spilling)
        assert ("spills" in judge(spilling)) == bool(fault)


@pytest.fixture(autouse=True)
def forget_files() -> Iterator[None]:
    yield
    tiles.table.cache_clear()


@pytest.mark.parametrize(
    ("architecture", "registers", "warps", "shared", "tensor_memory", "expected"),
    [
        # What the vendors' occupancy calculators say.
        ("sm_90", 128, 4, 0, 0, (4, "registers")),
        ("sm_90", 129, 4, 0, 0, (3, "registers")),
        ("sm_90", 32, 4, 0, 0, (16, "warps")),
        ("sm_90", 16, 1, 0, 0, (32, "blocks")),
        ("sm_90", 255, 8, 0, 0, (1, "registers")),
        ("sm_90", 64, 8, 75 * 1024, 0, (3, "shared memory")),
        ("sm_80", 64, 8, 75 * 1024, 0, (2, "shared memory")),
        ("sm_80", 64, 8, 164 * 1024, 0, (0, "shared memory")),
        ("sm_100", 64, 4, 32 * 1024, 256, (2, "tensor memory")),
        ("gfx942", 128, 4, 0, 0, (4, "registers")),
        ("gfx942", 160, 8, 0, 0, (1, "registers")),
        ("gfx942", 64, 4, 24 * 1024, 0, (2, "shared memory")),
    ],
)
def test_resident_blocks(
    architecture: str, registers: int, warps: int, shared: int, tensor_memory: int, expected: tuple[int, str]
) -> None:
    resident = machine_code.resident_blocks(CHIPS[architecture], registers, warps, shared, tensor_memory)
    assert resident == expected


def test_specializations_name_each_argument_once() -> None:
    fields = {"name": "probe", "tile": GOOD, "architecture": "sm_90", "dtype": torch.bfloat16}
    fields |= {"head_dim": 64, "options": "off", "kernel": probe}
    good = specialize(GOOD)
    signature = {("x" if name == "q" else name): kind for name, kind in good.signature.items()}
    with pytest.raises(ValueError, match=r"probe: .* missing \['q'\], unknown \['x'\]"):
        Specialization(**fields, signature=signature, constexprs=good.constexprs)
    with pytest.raises(ValueError, match=r"divisible names \['x'\]"):
        Specialization(**fields, signature=good.signature, constexprs=good.constexprs, divisible=("x",))
