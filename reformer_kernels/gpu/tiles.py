"""The one table of tile sizes: (kernel, architecture, bits of an element, head dimension, options) -> `Tile`.

`tiles.json` beside this file holds the tiles that `python -m reformer_kernels.gpu.tile_search` chose from the
compiler's reports. Kernels without a row take `default_tile`. The environment variable `REFORMER_TILES` names
a file of the same form whose rows take precedence (bench/validate_gpu.py writes one from measured times). The
length is not part of the key and nothing is tuned at run time, so that no call compiles because its sequence
has a new length.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reformer_kernels._files import write_atomically
from reformer_kernels._limits import MAX_HEAD_DIM
from reformer_kernels.gpu.architectures import ARCHITECTURES, INTERPRETER

OVERRIDE_VARIABLE = "REFORMER_TILES"
"""The environment variable that names a file of tiles."""

SHIPPED = Path(__file__).with_name("tiles.json")
"""The file of tiles that comes with the package."""

SCHEMA = 1
MAX_WARPS = 16
MAX_STAGES = 8
MAX_TILE = 1024
KEY_FIELDS = ("kernel", "architecture", "bits", "head_dim", "options")
OPTIONS = ("off", "all")
"""Rows for "off" serve calls with no padding and no dropout, whose kernels need fewer registers. Rows for
"all" serve every call that has no row of its own."""

TILE_FIELDS = ("rows", "keys", "dims", "warps", "stages")


@dataclass(frozen=True)
class Tile:
    """How one program of a kernel cuts its work.

    Attributes:
        rows: the queries (rows of the left matrix) that it holds.
        keys: the keys (columns of the logits) in one step of its loop.
        dims: the dimensions that one product takes at a time; the whole head dimension where it is not split.
        warps: warps of a program.
        stages: steps whose loads are under way at once (software pipelining); 1 loads no step ahead.

    Raises ValueError for sizes that kernels cannot have.
    """

    rows: int
    keys: int
    dims: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name in TILE_FIELDS[:4]:
            most = MAX_WARPS if name == "warps" else MAX_TILE
            value, least = getattr(self, name), 1 if name == "warps" else 16
            if not _is_integer(value) or not least <= value <= most or value & (value - 1):
                raise ValueError(f"{name} must be a power of two in {least}..{most}, got {value!r}")
        if not _is_integer(self.stages) or not 1 <= self.stages <= MAX_STAGES:
            raise ValueError(f"stages must be an integer in 1..{MAX_STAGES}, got {self.stages!r}")

    def __str__(self) -> str:
        return f"{self.rows}x{self.keys}x{self.dims} w{self.warps} s{self.stages}"


@dataclass(frozen=True)
class TileRow:
    """One row of the table: where a tile is used, and what the compiler then spills.

    `spill_bytes` is the most that a thread spills with any of the kernel's options, None where it is not
    known.
    """

    kernel: str
    architecture: str
    bits: int
    head_dim: int
    tile: Tile
    spill_bytes: int | None = None
    options: str = "all"

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """What the table finds the row by."""
        return (self.kernel, self.architecture, self.bits, self.head_dim, self.options)


_NONE: Mapping[str, Tile] = {}
_REPLACED: ContextVar[Mapping[str, Tile]] = ContextVar("replaced tiles", default=_NONE)


@contextlib.contextmanager
def replacing(by_kernel: Mapping[str, Tile]) -> Iterator[None]:
    """Within the block, `tile` gives these kernels these tiles. The search for tiles tries them so."""
    token = _REPLACED.set(by_kernel)
    try:
        yield
    finally:
        _REPLACED.reset(token)


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, to which kernels pad a head dimension, as products take no less."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile(kernel: str, *, architecture: str, bits: int, head_dim: int, options: str = "all") -> Tile:
    """The tile of `kernel` (such as "attention_forward") for elements of `bits` bits (16 or 32).

    architecture: one of `ARCHITECTURES`, or "interpreter"; see `architecture_of`. head_dim: in 1..256, padded
    by `padded_head_dim`. options: one of `OPTIONS`. Raises ValueError for anything else and for a file of
    tiles that is not valid.
    """
    replaced = _REPLACED.get().get(kernel)
    if replaced is not None:
        return replaced
    row = table_row(kernel, architecture=architecture, bits=bits, head_dim=head_dim, options=options)
    return row.tile if row else default_tile(architecture=architecture, bits=bits, head_dim=head_dim)


def table_row(
    kernel: str, *, architecture: str, bits: int, head_dim: int, options: str = "all"
) -> TileRow | None:
    """The row that `tile` takes, from the override file if it has one; None where there is only a default."""
    _check_key(architecture, bits, head_dim, options)
    key = (kernel, architecture, bits, padded_head_dim(head_dim))
    override = os.environ.get(OVERRIDE_VARIABLE)
    for path in filter(None, (override, str(SHIPPED))):
        rows = table(path)
        row = rows.get((*key, options)) or rows.get((*key, "all"))
        if row:
            return row
    return None


def default_tile(*, architecture: str, bits: int, head_dim: int) -> Tile:
    """The tile of kernels that the table does not list: a rule from a probe of a plain forward kernel.

    64 x 64 tiles fit the registers of 4 warps up to a head dimension of 64 (of 128 where products can read
    their operands from shared memory) and of 8 warps beyond. Above 128, the head dimension has to be split.
    """
    _check_key(architecture, bits, head_dim)
    width = padded_head_dim(head_dim)
    if architecture == INTERPRETER:
        return Tile(rows=16, keys=16, dims=min(width, 32), warps=1, stages=1)
    narrow = width <= 64 or (width == 128 and bits == 16 and architecture in ("sm_90", "sm_100"))
    return Tile(rows=64, keys=64, dims=min(width, 128), warps=4 if narrow else 8, stages=2)


# The file


def read_tiles(path: Path) -> list[TileRow]:
    """The rows of a file of tiles. Raises ValueError, naming file and row, where it is not valid."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of tiles ({OVERRIDE_VARIABLE} names it)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f'{path}: must be an object with "schema": {SCHEMA} and "tiles": [...]')
    if not isinstance(document.get("tiles"), list):
        raise ValueError(f'{path}: "tiles" must be a list of rows, got {document.get("tiles")!r}')
    rows: dict[tuple[str, str, int, int, str], TileRow] = {}
    for index, fields in enumerate(document["tiles"]):
        try:
            row = _parse(fields)
            if row.key in rows:
                raise ValueError(f"a second row for {row.key}")
        except ValueError as error:
            raise ValueError(f"{path}: row {index}: {error}") from error
        rows[row.key] = row
    return list(rows.values())


def write_tiles(path: Path, rows: Iterable[TileRow], **notes: Any) -> None:
    """Writes rows as `read_tiles` reads them, sorted, one a line. `notes` are further fields of the file."""
    lines = []
    for row in sorted(rows, key=lambda row: row.key):
        fields = {name: getattr(row, name) for name in KEY_FIELDS} | asdict(row.tile)
        if row.options == "all":
            del fields["options"]
        if row.spill_bytes is not None:
            fields["spill_bytes"] = row.spill_bytes
        lines.append("  " + json.dumps(fields))
    head = "".join(
        f' "{name}": {json.dumps(value)},\n' for name, value in ({"schema": SCHEMA} | notes).items()
    )
    write_atomically(path, "{\n" + head + ' "tiles": [\n' + ",\n".join(lines) + "\n ]\n}\n")


def _parse(fields: Any) -> TileRow:
    if not isinstance(fields, dict):
        raise ValueError(f"must be an object, got {fields!r}")
    fields = {"options": "all"} | fields
    missing = [name for name in (*KEY_FIELDS, *TILE_FIELDS) if name not in fields]
    unknown = sorted(set(fields) - {*KEY_FIELDS, *TILE_FIELDS, "spill_bytes"})
    if missing or unknown:
        raise ValueError(f"missing fields {missing}, unknown fields {unknown}")
    if not isinstance(fields["kernel"], str):
        raise ValueError(f"kernel must be a name, got {fields['kernel']!r}")
    _check_key(*(fields[name] for name in KEY_FIELDS[1:]))
    if fields["head_dim"] != padded_head_dim(fields["head_dim"]):
        raise ValueError(f"head_dim must be a power of two, at least 16, got {fields['head_dim']}")
    spill = fields.get("spill_bytes")
    if spill is not None and (not _is_integer(spill) or spill < 0):
        raise ValueError(f"spill_bytes must be a number of bytes, at least 0, got {spill!r}")
    tile_ = Tile(**{name: fields[name] for name in TILE_FIELDS})
    return TileRow(**{name: fields[name] for name in KEY_FIELDS}, tile=tile_, spill_bytes=spill)


@functools.cache
def table(path: str) -> dict[tuple[str, str, int, int, str], TileRow]:
    """The rows of a file of tiles by key, read once. `table.cache_clear()` forgets what was read."""
    return {row.key: row for row in read_tiles(Path(path))}


def _check_key(architecture: Any, bits: Any, head_dim: Any, options: Any = "all") -> None:
    if architecture not in (*ARCHITECTURES, INTERPRETER):
        accepted = ", ".join((*ARCHITECTURES, INTERPRETER))
        raise ValueError(f"architecture must be one of {accepted}, got {architecture!r}")
    if bits not in (16, 32):
        raise ValueError(f"bits must be 16 or 32, got {bits!r}")
    if not _is_integer(head_dim) or not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be an integer in 1..{MAX_HEAD_DIM}, got {head_dim!r}")
    if options not in OPTIONS:
        raise ValueError(f"options must be one of {', '.join(OPTIONS)}, got {options!r}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
