"""Chooses tiles from what the compiler reports, with no GPU present, and writes them into the table.

    python -m reformer_kernels.gpu.tile_search --architecture sm_90 --bits 16 --head-dim 64 [--kernel NAME]

A tile is judged by `predicted`: the slowest of its products, its reads from the second-level cache and its
instructions, a token and round, lengthened where few warps are there to hide latency. What must not be
(`machine_code.faults`) rules a tile out; where every tile spills (float32, head sizes above 128), the table
records how much the chosen one spills. The search walks from the present tile to a neighbour (one field
doubled or halved) that is better by more than the model can be trusted for, until none is. On a GPU,
bench/validate_gpu.py measures instead.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from reformer_kernels.gpu import tiles
from reformer_kernels.gpu.cost_model import RATES, Rates
from reformer_kernels.gpu.machine_code import CHIPS, PARTITIONS, Inspected, Request, inspect, may_spill
from reformer_kernels.gpu.specialization import all_specializations
from reformer_kernels.gpu.tiles import Tile, TileRow

CHUNK = 64
"""The chunk length that tiles are chosen for; a query meets its own chunk and the one before."""

ROTATION_COLUMNS = 32
"""Of one factor, as automatic buckets have at most."""

INSTRUCTIONS_A_SECOND = {"sm_80": 6.1e11, "sm_90": 9.2e11, "sm_100": 1.1e12, "gfx942": 2.5e12}
"""Warp instructions that the chip issues: multiprocessors * 4 * clock, from the data sheets."""

CACHE_RATE = 2.5
"""How much faster the second-level cache reads than memory."""

LATENCY_WARPS = 8
"""As many resident warps double the time that as many again would take."""

SPILL_PENALTY_BYTES = 64
"""A spill of as many bytes a thread doubles the predicted time."""

LEAST_GAIN = 0.05
"""By how much less predicted time a tile takes the present one's place."""

PRODUCTS = {"attention_forward": 2, "attention_backward_queries": 3, "attention_backward_keys": 4}
"""Matrix products over a tile's pairs; other kernels multiply rows and a rotation's columns, once."""


@dataclass(frozen=True)
class Judged:
    """A tile, what became of the kernel with it, and the score: seconds a token and round, predicted."""

    tile: Tile
    inspected: Inspected
    score: float

    @property
    def usable(self) -> bool:
        return not _hard_faults(self.inspected)


def predicted(kernel: str, tile: Tile, inspected: Inspected, bits: int, head_dim: int) -> float:
    """Seconds a token and round with this tile."""
    code, rates = inspected.code, RATES[inspected.code.architecture]
    chip = CHIPS[code.architecture]
    D, element = tiles.padded_head_dim(head_dim), bits // 8
    if kernel in PRODUCTS:
        seen = 2 * CHUNK if tile.rows <= CHUNK else tile.rows + CHUNK
        steps = -(-seen // tile.keys)
        products, gathered = PRODUCTS[kernel] * steps * tile.keys, 2 * steps * tile.keys * D * element
    else:
        steps = -(-ROTATION_COLUMNS // tile.keys)
        products, gathered = steps * tile.keys, steps * tile.keys * D * 4
    slowest = max(
        2.0 * D * products / _matmul(rates, bits),
        (gathered / tile.rows + 3 * D * element) / (CACHE_RATE * rates.copy),
        code.instructions * code.warps * steps / tile.rows / INSTRUCTIONS_A_SECOND[code.architecture],
    )
    warps = max(1, min(code.resident_blocks * code.warps, PARTITIONS * chip.partition_warps))
    return slowest * (1 + LATENCY_WARPS / warps) * (1 + code.spill_bytes / SPILL_PENALTY_BYTES)


def neighbours(tile: Tile, head_dim: int) -> Iterator[Tile]:
    """Tiles that differ in one field, by a factor of two (stages: by one)."""
    for field, least, most in (
        ("warps", 2, 8),
        ("rows", 32, 128),
        ("keys", 16, 128),
        ("dims", 32, min(128, tiles.padded_head_dim(head_dim))),
        ("stages", 1, 4),
    ):
        value = getattr(tile, field)
        for other in (value - 1, value + 1) if field == "stages" else (value // 2, value * 2):
            if least <= other <= most:
                yield dataclasses.replace(tile, **{field: other})


def judge(kernel: str, architecture: str, bits: int, head_dim: int, tile: Tile) -> Judged:
    """Compile the kernel with all its options."""
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    found = _inspect(kernel, architecture, dtype, head_dim, "all", tile)
    return Judged(tile, found, predicted(kernel, tile, found, bits, head_dim))


def search(
    kernel: str,
    architecture: str,
    bits: int,
    head_dim: int,
    *,
    evaluations: int,
    say: Callable[[str], None] = print,
) -> TileRow:
    """The best tile found in so many compilations, as a row of the table.

    Raises RuntimeError where no tile that was tried is free of faults.
    """
    start = tiles.tile(kernel, architecture=architecture, bits=bits, head_dim=head_dim)
    tried: dict[Tile, Judged | None] = {}

    def rank(tile: Tile) -> tuple[bool, float]:
        if tile not in tried:
            try:
                tried[tile] = judge(kernel, architecture, bits, head_dim, tile)
            except RuntimeError as error:  # a tile that the compiler refuses is no candidate
                tried[tile] = None
                say(f"  {_short(tile)}: {str(error).splitlines()[0][:120]}")
            if judged := tried[tile]:
                say(f"  {_short(tile)}: {_describe(judged)}")
        judged = tried[tile]
        return (True, float("inf")) if judged is None else (not judged.usable, judged.score)

    best, moved = start, True
    rank(best)
    while moved:
        moved = False
        for other in neighbours(best, head_dim):
            if other not in tried and len(tried) >= evaluations:
                continue
            faulty, score = rank(best)
            if rank(other) < (faulty, score * (1 - LEAST_GAIN)):
                best, moved = other, True
    # The walk looked at one dtype with all options; the others are looked at for what it found, best first.
    usable = [tile for tile in tried if not rank(tile)[0]]
    for tile in sorted(usable, key=lambda tile: (tile != best, rank(tile))):
        spilled = _most_spilled(kernel, architecture, bits, head_dim, tile)
        if spilled == 0 or may_spill(bits, head_dim):
            width = tiles.padded_head_dim(head_dim)
            return TileRow(kernel, architecture, bits, width, tile, spill_bytes=spilled)
        say(f"  {_short(tile)}: spills {spilled} bytes with another dtype or other options")
    raise RuntimeError(
        f"no tile of {len(tried)} suits {kernel} on {architecture} at {bits} bits, D = {head_dim}; "
        "allow more --evaluations"
    )


def kernels_of(architecture: str, bits: int, head_dim: int) -> list[str]:
    """The kernels that take their tile from the table."""
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    listed = all_specializations(architecture=architecture, dtype=dtype, head_dim=head_dim, options="all")
    return [s.name for s in listed if s.tile is not None]


def _inspect(
    kernel: str, architecture: str, dtype: torch.dtype, head_dim: int, options: str, tile: Tile
) -> Inspected:
    request = Request(architecture, dtype, head_dim, options, tiles={kernel: tile}, kernels=(kernel,))
    return inspect(request)[0]


def _hard_faults(inspected: Inspected) -> list[str]:
    """All faults but a spill where one may have to be."""
    may = may_spill(32 if inspected.code.dtype == "float32" else 16, inspected.code.head_dim)
    return [fault for fault in inspected.faults if not (may and fault.startswith("spills"))]


def _most_spilled(kernel: str, architecture: str, bits: int, head_dim: int, tile: Tile) -> int:
    dtypes = (torch.bfloat16, torch.float16) if bits == 16 else (torch.float32,)
    return max(
        _inspect(kernel, architecture, dtype, head_dim, options, tile).code.spill_bytes
        for dtype in dtypes
        for options in ("off", "all")
    )


def _matmul(rates: Rates, bits: int) -> float:
    return rates.matmul_16_bit if bits == 16 else rates.matmul_32_bit


def _describe(judged: Judged) -> str:
    code, fault = judged.inspected.code, "; ".join(_hard_faults(judged.inspected))
    return (
        f"{judged.score * 1e12:.0f} ps predicted, {code.registers} registers, "
        f"{code.spill_bytes} spilled, {code.resident_blocks} blocks {fault}"
    )


def _short(tile: Tile) -> str:
    return f"{tile.rows}x{tile.keys}x{tile.dims} w{tile.warps} s{tile.stages}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reformer_kernels.gpu.tile_search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--architecture", choices=tiles.ARCHITECTURES, required=True)
    parser.add_argument("--bits", type=int, choices=(16, 32), required=True)
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--kernel", help="one kernel instead of all in the table")
    parser.add_argument("--evaluations", type=int, default=12, help="most tiles to compile for a kernel")
    parser.add_argument("--output", type=Path, default=tiles.SHIPPED, help="file of tiles to add rows to")
    given = parser.parse_args()
    if not 1 <= given.head_dim <= 256:
        parser.error(f"--head-dim must be in 1..256, got {given.head_dim}")
    known = kernels_of(given.architecture, given.bits, given.head_dim)
    if given.kernel is not None and given.kernel not in known:
        parser.error(f"--kernel must be one of {', '.join(known)}, got {given.kernel!r}")
    for kernel in [given.kernel] if given.kernel else known:
        print(f"{kernel}, {given.architecture}, {given.bits} bits, D = {given.head_dim}")
        row = search(kernel, given.architecture, given.bits, given.head_dim, evaluations=given.evaluations)
        print(f"  chosen {_short(row.tile)}, {row.spill_bytes} bytes spilled")
        rows = tiles.read_tiles(given.output) if given.output.exists() else []
        tiles.write_tiles(given.output, [*(r for r in rows if r.key != row.key), row])


if __name__ == "__main__":
    main()
