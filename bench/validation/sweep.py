"""Times tiles around the present ones and far from them, and writes the fastest for REFORMER_TILES."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reformer_kernels.gpu import tiles
from reformer_kernels.gpu.architectures import architecture_of
from reformer_kernels.gpu.tile_search import kernels_of, neighbours
from reformer_kernels.gpu.tiles import Tile, TileRow
from reformer_kernels.testing import TOLERANCE, relative_error
from validation import calls
from validation.calls import BOTH, FORWARD, Call, shape_of
from validation.context import Context, Row, attempt
from validation.timings import fastest_us, time_call

MARGIN = 0.98
"""A tile replaces the best one so far if it takes less than this share of its time."""

Key = tuple[str, int, int]
"""Kernel, bits, head dimension."""


def title(key: Key) -> str:
    return f"{key[0]}, {key[1]} bits, D = {key[2]}"


def tiles_file(context: Context) -> Path:
    return Path(context.folder) / f"{context.name}-tiles.json"


def keys(context: Context) -> list[Key]:
    """The rows of the table that are swept, the most used first."""
    if context.dry_run:
        return [("attention_forward", 32, 16)]
    architecture = architecture_of(context.device)
    return [
        (kernel, bits, head_dim)
        for bits, head_dim in ((16, 64), (16, 128), (32, 64))
        for kernel in kernels_of(architecture, bits, head_dim)
    ]


FAR_TILES = [
    Tile(rows, keys, 128, warps, stages)
    for rows, keys, warps, stages in (
        *(
            (64, 128, 4, 1),
            (64, 128, 4, 2),
            (64, 128, 8, 2),
            (64, 64, 4, 3),
            (128, 64, 8, 2),
            (128, 128, 8, 2),
        ),
        *((128, 64, 4, 2), (64, 32, 4, 4), (32, 128, 4, 2), (128, 32, 4, 2), (64, 16, 4, 4)),
    )
]
"""Whole tiles that no walk by single fields reaches."""


def candidates(context: Context, key: Key) -> list[Tile]:
    """The present tile, the tiles that differ from it in one field, and those of `FAR_TILES`."""
    kernel, bits, head_dim = key
    present = tiles.tile(kernel, architecture=architecture_of(context.device), bits=bits, head_dim=head_dim)
    width = tiles.padded_head_dim(head_dim)
    far = [dataclasses.replace(tile, dims=min(tile.dims, width)) for tile in FAR_TILES]
    tried = list(dict.fromkeys([present, *neighbours(present, head_dim), *far]))
    return tried[: context.pick(len(tried), 2)]


def warm_steps(context: Context, shard: int = 0, shards: int = 1, after: int = 0) -> Iterator[Row]:
    """Compiles every candidate in several processes, so that the sweep itself only runs them."""
    every = [(key, tile) for key in keys(context) for tile in candidates(context, key)]
    for key, tile in every[shard::shards][after:]:
        row = attempt(f"{title(key)}: {tile}", partial(_run_once, context, key, tile))
        if row["ok"] is False and not row.get("fatal"):
            row |= {"ok": True, "refused": row.pop("reason")}  # such as a tile too large for this chip
        yield row


def sweep_steps(context: Context) -> Iterator[Row]:
    """Times the candidates of each key, and writes the file again after each key."""
    chosen: list[TileRow] = []
    for key in keys(context):
        best: tuple[float, Tile] | None = None
        expected: Any = None
        for tile in candidates(context, key):
            row = attempt(f"{title(key)}: {tile}", partial(_measure, context, key, tile, expected))
            expected = expected or row.pop("_results", None)
            row.pop("_results", None)
            if row["ok"] and "us" in row and (best is None or row["us"] < MARGIN * best[0]):
                best = (row["us"], tile)
            if not row["ok"] and not row.get("fatal") and "wrong" not in row:
                row |= {"ok": True, "refused": row.pop("reason")}
            yield row
        if best is not None:
            kernel, bits, head_dim = key
            size = tiles.padded_head_dim(head_dim)
            chosen.append(TileRow(kernel, architecture_of(context.device), bits, size, best[1]))
            tiles.write_tiles(tiles_file(context), chosen, made_by="measured by bench/validate_gpu.py")
            yield {"check": f"{title(key)}: chosen", "ok": True, "tile": str(best[1]), "us": best[0]}


def _call(context: Context, key: Key) -> Call:
    kernel, bits, head_dim = key
    shape = shape_of(context, bits=bits, head_dim=head_dim)
    torch.manual_seed(0)
    if kernel.startswith("attention"):
        return calls.attend(context, shape, FORWARD if "forward" in kernel else BOTH)
    return calls.lsh_hash(context, shape)


def _with_tile(context: Context, key: Key, tile: Tile, folder: str) -> None:
    """Makes the kernel of `key` take `tile` from now on."""
    kernel, bits, head_dim = key
    row = TileRow(kernel, architecture_of(context.device), bits, tiles.padded_head_dim(head_dim), tile)
    file = Path(folder) / "tiles.json"
    tiles.write_tiles(file, [row])
    os.environ[tiles.OVERRIDE_VARIABLE] = str(file)


def _run_once(context: Context, key: Key, tile: Tile) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        _with_tile(context, key, tile, folder)
        try:
            _call(context, key)()
            context.synchronize()
        finally:
            del os.environ[tiles.OVERRIDE_VARIABLE]
    return {}


def _measure(context: Context, key: Key, tile: Tile, expected: Any) -> Row:
    """The time with this tile. Its results must be those of the first tile, within the dtype's tolerance."""
    with tempfile.TemporaryDirectory() as folder:
        _with_tile(context, key, tile, folder)
        try:
            call = _call(context, key)
            results = call()
            spreads = time_call(context, call, budget=0.1, most=10)
        finally:
            del os.environ[tiles.OVERRIDE_VARIABLE]
    row = {"us": fastest_us({f"{way}_us": round(1e6 * s.median, 2) for way, s in spreads.items()})}
    tensors = results if isinstance(results, tuple) else (results,)
    if expected is None:
        return row | {"_results": tensors}
    wrong = [reason for a, b in zip(tensors, expected, strict=True) if (reason := _differ(a, b))]
    return row | {"ok": False, "wrong": wrong[0]} if wrong else row


def _differ(ours: Tensor, expected: Tensor) -> str:
    """How two results differ by more than their dtype allows, "" where they do not."""
    if not ours.is_floating_point():  # bucket ids, where near-ties may differ
        share = float((ours != expected).double().mean())
        return f"{share:.3g} of the ids differ" if share > 1e-3 else ""
    try:
        error = relative_error(ours, expected) / TOLERANCE[ours.dtype]
    except AssertionError as reason:
        return str(reason)
    return f"{error:.3g} times the tolerance away" if error > 1 else ""
