"""Chooses tiles from the compiler's reports, with no GPU present, and writes them into the table.

    python -m reformer_kernels.gpu.tile_search --architecture sm_90 --bits 16 --head-dim 64 [--kernel NAME]

`predicted_seconds` gives the score of a tile, from its machine code: the time of what is busiest (instruction
issue, integer units, tensor cores, memory), lengthened where few warps are resident to hide latency and where
threads spill. A tile with faults (`machine_code.faults`) is ruled out. Where every tile spills (float32, head
dimensions above 128), the table records how much the chosen one spills. The search walks from the present
tile to a neighbour (one field doubled or halved) as long as one is better by more than the model can be
trusted for. On a GPU, bench/validate_gpu.py measures instead.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from reformer_kernels._limits import MAX_HEAD_DIM
from reformer_kernels.gpu import tiles
from reformer_kernels.gpu.architectures import ARCHITECTURES, CHIPS, PARTITIONS
from reformer_kernels.gpu.cost_model import Shape
from reformer_kernels.gpu.machine_code import Inspected, MachineCode, Request, inspect, may_spill
from reformer_kernels.gpu.prediction import steps_of_a_tile
from reformer_kernels.gpu.specializations import OPTIONS, all_specializations
from reformer_kernels.gpu.tiles import Tile, TileRow

SHAPE = Shape()
"""The shape that tiles are chosen for. Their size does not depend on the length."""

PRESET = "paper"
"""The kind of attention whose ranges of keys tiles are chosen for."""

LATENCY_WARPS = 8
"""With this many resident warps, latency doubles the time that arbitrarily many warps would take."""

SPILL_PENALTY_BYTES = 64
"""A spill of this many bytes a thread doubles the predicted time."""

LEAST_GAIN = 0.05
"""The share of predicted time that a tile must save to replace the present one."""

_DTYPES = {16: (torch.bfloat16, torch.float16), 32: (torch.float32,)}
"""The dtypes that share a tile, by bits. The search walks with the first one."""


@dataclass(frozen=True)
class Judged:
    """A tile, the kernel compiled with it, and its score: predicted seconds for a token and round."""

    tile: Tile
    inspected: Inspected
    score: float

    @property
    def usable(self) -> bool:
        """Whether the kernel has no fault that rules the tile out."""
        return not faults_but_spills(self.inspected)


def predicted_seconds(code: MachineCode) -> float:
    """The predicted time of a token and round: the busiest resource of a multiprocessor or the cache's bytes,
    by the machine code, lengthened where few warps hide latency and where threads spill."""
    chip, rows = CHIPS[code.architecture], code.tile.rows if code.tile else 1
    shape = dataclasses.replace(SHAPE, head_dim=code.head_dim)
    cost = code.issue.program(steps_of_a_tile(code, shape, PRESET if code.preset else None))
    slowest = max(
        max(cost.cycles.values()) / (chip.multiprocessors * chip.clock), cost.cache_bytes / chip.cache_rate
    )
    warps = max(1, min(code.resident_blocks * code.warps, PARTITIONS * chip.partition_warps))
    return slowest / rows * (1 + LATENCY_WARPS / warps) * (1 + code.spill_bytes / SPILL_PENALTY_BYTES)


def neighbours(tile: Tile, head_dim: int) -> Iterator[Tile]:
    """The tiles that differ from `tile` in one field, by a factor of two (in stages by one)."""
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
    """The kernel with this tile and all its options, compiled and scored."""
    inspected = _inspect(kernel, architecture, _DTYPES[bits][0], head_dim, "all", tile)
    return Judged(tile, inspected, predicted_seconds(inspected.code))


def search(
    kernel: str,
    architecture: str,
    bits: int,
    head_dim: int,
    *,
    evaluations: int,
    say: Callable[[str], None] = print,
) -> TileRow:
    """The best tile found in so many `evaluations` (compilations), as a row of the table.

    `say` gets a line for each tile. Raises RuntimeError where every tile that was tried has faults.
    """
    start = tiles.tile(kernel, architecture=architecture, bits=bits, head_dim=head_dim)
    tried: dict[Tile, Judged | None] = {}

    def rank(tile: Tile) -> tuple[bool, float]:
        if tile not in tried:
            try:
                tried[tile] = judge(kernel, architecture, bits, head_dim, tile)
            except RuntimeError as error:  # the compiler refuses such a tile
                tried[tile] = None
                say(f"  {tile}: {str(error).splitlines()[0][:120]}")
            if judged := tried[tile]:
                say(f"  {tile}: {describe(judged)}")
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
    # The walk compiled one dtype with all options. What it found is now compiled with the others, best first.
    usable = [tile for tile in tried if not rank(tile)[0]]
    for tile in sorted(usable, key=lambda tile: (tile != best, rank(tile))):
        spilled = most_spilled(kernel, architecture, bits, head_dim, tile)
        if spilled == 0 or may_spill(bits, head_dim):
            width = tiles.padded_head_dim(head_dim)
            return TileRow(kernel, architecture, bits, width, tile, spill_bytes=spilled)
        say(f"  {tile}: spills {spilled} bytes with another dtype or other options")
    raise RuntimeError(
        f"none of {len(tried)} tiles suits {kernel} on {architecture} at {bits} bits, D = {head_dim}; "
        "allow more --evaluations"
    )


def kernels_of(architecture: str, bits: int, head_dim: int) -> list[str]:
    """The names of the kernels that take their tile from the table."""
    listed = all_specializations(
        architecture=architecture, dtype=_DTYPES[bits][0], head_dim=head_dim, options="all"
    )
    return [s.name for s in listed if s.tile is not None]


def _inspect(
    kernel: str, architecture: str, dtype: torch.dtype, head_dim: int, options: str, tile: Tile
) -> Inspected:
    request = Request(architecture, dtype, head_dim, options, tiles={kernel: tile}, kernels=(kernel,))
    return inspect(request)[0]


def faults_but_spills(inspected: Inspected) -> list[str]:
    """The faults that rule a tile out: all of them but a spill where every tile may spill."""
    forgiven = may_spill(32 if inspected.code.dtype == "float32" else 16, inspected.code.head_dim)
    return [fault for fault in inspected.faults if not (forgiven and fault.startswith("spills"))]


def most_spilled(kernel: str, architecture: str, bits: int, head_dim: int, tile: Tile) -> int:
    """The most bytes that a thread spills with any dtype of so many bits and any options."""
    return max(
        _inspect(kernel, architecture, dtype, head_dim, options, tile).code.spill_bytes
        for dtype in _DTYPES[bits]
        for options in OPTIONS
    )


def describe(judged: Judged) -> str:
    """A line about a tile for people."""
    code, faults = judged.inspected.code, "; ".join(faults_but_spills(judged.inspected))
    issue = code.issue.cycles_per_pair("issue") or 0.0
    return (
        f"{judged.score * 1e12:.0f} ps predicted, {issue:.2f} issue cycles a pair, "
        f"{code.registers} registers, {code.spill_bytes} spilled, {code.resident_blocks} blocks {faults}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m reformer_kernels.gpu.tile_search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--architecture", choices=ARCHITECTURES, required=True)
    parser.add_argument("--bits", type=int, choices=(16, 32), required=True)
    parser.add_argument("--head-dim", type=int, required=True)
    parser.add_argument("--kernel", help="search for this kernel instead of all that have tiles")
    parser.add_argument(
        "--evaluations", type=int, default=12, help="how many tiles to compile for a kernel at most"
    )
    parser.add_argument(
        "--output", type=Path, default=tiles.SHIPPED, help="the file of tiles that gets the rows"
    )
    arguments = parser.parse_args()
    if not 1 <= arguments.head_dim <= MAX_HEAD_DIM:
        parser.error(f"--head-dim must be in 1..{MAX_HEAD_DIM}, got {arguments.head_dim}")
    kernels = kernels_of(arguments.architecture, arguments.bits, arguments.head_dim)
    if arguments.kernel is not None and arguments.kernel not in kernels:
        parser.error(f"--kernel must be one of {', '.join(kernels)}, got {arguments.kernel!r}")
    for kernel in [arguments.kernel] if arguments.kernel else kernels:
        print(f"{kernel}, {arguments.architecture}, {arguments.bits} bits, D = {arguments.head_dim}")
        row = search(
            kernel,
            arguments.architecture,
            arguments.bits,
            arguments.head_dim,
            evaluations=arguments.evaluations,
        )
        print(f"  chosen {row.tile}, {row.spill_bytes} bytes spilled")
        rows = tiles.read_tiles(arguments.output) if arguments.output.exists() else []
        tiles.write_tiles(arguments.output, [*(r for r in rows if r.key != row.key), row])


if __name__ == "__main__":
    main()
