"""The machine code of kernels, compiled and read with no device present.

`read(specialization)` compiles one kernel for its architecture and returns a `MachineCode`: registers,
spills, shared memory, how many blocks fit a multiprocessor, tensor-core instructions, the widths of loads and
stores, and what the instructions cost (`instruction_issue`).
`faults` lists what is wrong with it. Triton's wheel comes with NVIDIA's disassembler; the AMD compiler writes
the same facts into its assembly.
"""

from __future__ import annotations

import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from reformer_kernels._backend import interpreted
from reformer_kernels._files import write_atomically
from reformer_kernels.gpu import tiles
from reformer_kernels.gpu.architectures import CHIPS, KIB, PARTITIONS, Chip
from reformer_kernels.gpu.disassembly import (
    Listing,
    disassembler,
    load_width,
    read_amdgcn,
    read_cubin,
    store_width,
    tcgen05_descriptors,
)
from reformer_kernels.gpu.instruction_issue import TENSOR_CORE, IssueCount, Machine, count
from reformer_kernels.gpu.specializations import OPERATIONS, ROUNDS, Specialization, all_specializations

Value = TypeVar("Value", int, str)
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")

SMALL_SHARED_BYTES = 99 * KIB
"""The shared memory that a block may use on compute capability 8.6, 8.9 and 12.x, which run sm_80's tiles."""


NARROW_STORES = 0.25
"""The bytes that a kernel which stores rows may store narrowly beside each byte of wide stores: it also
stores one number a row, such as the log-sum-exp."""

WARP_STORE_BYTES = 512
"""What a warp stores at once where it stores rows: 16 bytes a thread on NVIDIA, 8 on AMD."""


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel.

    Attributes:
        kernel, preset, architecture, dtype, head_dim, options, tile: what it was compiled for.
        warps: warps of a block.
        registers: registers of a thread.
        spill_bytes: local memory (scratch) of a thread.
        shared_bytes: shared memory of a block.
        resident_blocks: how many blocks a multiprocessor holds at once.
        occupancy: the warps of those blocks as a share of the most that there can be.
        limited_by: what keeps further blocks out.
        tensor_core_instructions: the number of tensor-core instructions in the code, by kind.
        loads: the number of instructions that load from device memory (to registers or shared memory), by the
            bytes that one thread loads.
        stores: the same of the instructions that store to device memory.
        instructions: the number of instructions in the code.
        issue: what they cost a multiprocessor: see `instruction_issue`. Predicted.
    """

    kernel: str
    preset: str | None
    architecture: str
    dtype: str
    head_dim: int
    options: str
    tile: tiles.Tile | None
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    resident_blocks: int
    occupancy: float
    limited_by: str
    tensor_core_instructions: dict[str, int]
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: int
    issue: IssueCount

    def __str__(self) -> str:
        kind = f" {self.preset}" if self.preset else ""
        return (
            f"{self.kernel}{kind} {self.dtype} D={self.head_dim} options {self.options} "
            f"on {self.architecture}, {self.tile}"
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON can hold them, and the predicted cycles of each resource for a pair."""
        per_pair = {
            f"{name}_cycles_per_pair": self.issue.cycles_per_pair(name) for name in self.issue.steady.cycles
        }
        return asdict(self) | per_pair


@dataclass(frozen=True)
class Request:
    """The arguments of `all_specializations`, as a value that can be sent to another process."""

    architecture: str
    dtype: torch.dtype
    head_dim: int
    options: str
    operations: tuple[str, ...] = OPERATIONS
    presets: tuple[str, ...] = ("paper",)
    rounds: int = ROUNDS
    tiles: Mapping[str, tiles.Tile] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    """The names of the kernels to keep; all of them where it is empty."""
    dump: Path | None = None
    """The folder that `read` writes to."""


@dataclass(frozen=True)
class Inspected:
    """A kernel's machine code and its `faults`."""

    code: MachineCode
    faults: list[str]


def unavailable() -> str | None:
    """Why kernels cannot be compiled here, and what to do; None where they can."""
    if interpreted():
        return "TRITON_INTERPRET is set, which replaces Triton's compiler; unset it"
    try:
        import triton.backends.compiler
        import triton.compiler  # noqa: F401
    except ImportError as error:
        return f"Triton does not import ({error}); install it with: pip install triton"
    if not disassembler().exists():
        return f"this Triton carries no disassembler ({disassembler()}); install another: pip install triton"
    return None


def read(specialization: Specialization, dump: Path | None = None) -> MachineCode:
    """Compiles one kernel for its architecture and reads the binary, which takes a second or so.

    dump: a folder that gets the kernel's PTX, its machine code and a JSON file of what was counted in it.
    Raises RuntimeError where Triton cannot compile anything here, or cannot compile this kernel.
    """
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"{specialization} cannot be compiled: {reason}")
    compiled = compile_kernel(specialization)
    listing = disassemble(compiled)
    code = _machine_code(specialization, compiled, listing)
    if dump is not None:
        _dump(dump, specialization, compiled, listing, code)
    return code


def _dump(
    folder: Path, specialization: Specialization, compiled: Any, listing: Listing, code: MachineCode
) -> None:
    parts = (code.kernel, code.preset, code.architecture, code.dtype, f"D{code.head_dim}", code.options)
    # Kernels that differ in constants alone, such as those of the first and last round, get a number of them.
    constants = str(sorted((name, str(value)) for name, value in specialization.constexprs.items()))
    stem = "-".join([*filter(None, parts), f"{zlib.crc32(constants.encode()):08x}"])
    if "ptx" in compiled.asm:
        write_atomically(folder / f"{stem}.ptx", compiled.asm["ptx"])
    write_atomically(folder / f"{stem}.{'sass' if 'cubin' in compiled.asm else 'amdgcn'}", listing.text)
    counted = code.to_json() | {"constants": {n: str(v) for n, v in specialization.constexprs.items()}}
    write_atomically(folder / f"{stem}.json", json.dumps(counted, indent=1) + "\n")


def _machine_code(specialization: Specialization, compiled: Any, listing: Listing) -> MachineCode:
    chip = CHIPS[specialization.architecture]
    names = [instruction.name for instruction in listing.instructions]
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    blocks, limit = resident_blocks(
        chip, listing.registers, warps, shared, getattr(compiled.metadata, "tmem_size", None) or 0
    )
    return MachineCode(
        kernel=specialization.name,
        preset=specialization.preset,
        architecture=specialization.architecture,
        dtype=str(specialization.dtype).removeprefix("torch."),
        head_dim=specialization.head_dim,
        options=specialization.options,
        tile=specialization.tile,
        warps=warps,
        registers=listing.registers,
        spill_bytes=listing.spill_bytes,
        shared_bytes=shared,
        resident_blocks=blocks,
        occupancy=blocks * warps / (PARTITIONS * chip.partition_warps),
        limited_by=limit,
        tensor_core_instructions=_count(
            re.sub(r"\.(64|\d+x\d+x\d+)\b.*", "", name) for name in names if TENSOR_CORE.match(name)
        ),
        loads=_count(width for width in map(load_width, names) if width),
        stores=_count(width for width in map(store_width, names) if width),
        instructions=len(names),
        issue=_issue(specialization, compiled, listing, warps),
    )


def disassemble(compiled: Any) -> Listing:
    """The listing of a kernel that `compile_kernel` compiled."""
    assembly = compiled.asm
    return read_cubin(assembly["cubin"]) if "cubin" in assembly else read_amdgcn(assembly["amdgcn"])


def _issue(specialization: Specialization, compiled: Any, listing: Listing, warps: int) -> IssueCount:
    chip, tile = CHIPS[specialization.architecture], specialization.tile
    return count(
        listing.instructions,
        Machine(
            warps=warps,
            lanes=chip.lanes,
            tensor_operations=chip.tensor_operations * (1 if specialization.bits == 16 else 0.5),
            instruction_cycles=chip.vector_cycles,
            vector_prefix="v_" if chip.vector_cycles > 1 else "",
        ),
        products=specialization.products,
        depth=tiles.padded_head_dim(specialization.head_dim),
        tile_pairs=tile.rows * tile.keys if tile else 0,
        rounds=specialization.rounds,
        descriptors=tcgen05_descriptors(compiled.asm.get("ptx", "")),
    )


def inspect(request: Request) -> list[Inspected]:
    """Compiles every kernel of a request and looks for faults."""
    inspected = []
    for specialization in all_specializations(
        architecture=request.architecture,
        dtype=request.dtype,
        head_dim=request.head_dim,
        options=request.options,
        operations=request.operations,
        presets=request.presets,
        rounds=request.rounds,
        tiles=request.tiles,
    ):
        if request.kernels and specialization.name not in request.kernels:
            continue
        code = read(specialization, request.dump)
        inspected.append(Inspected(code, faults(code, specialization)))
    return inspected


def in_processes(work: Callable[[Asked], Answer], asked: Sequence[Asked], processes: int) -> Iterator[Answer]:
    """`work` on each of `asked` in turn, in `processes` fresh processes (in this one if it is 1)."""
    if processes == 1 or len(asked) < 2:
        yield from map(work, asked)
        return
    with ProcessPoolExecutor(min(processes, len(asked)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, asked)


def resident_blocks(
    chip: Chip, registers: int, warps: int, shared_bytes: int, tensor_memory: int = 0
) -> tuple[int, str]:
    """How many blocks of so many `warps` one multiprocessor holds at once, and what keeps further ones out.

    `registers` are those of a thread, `shared_bytes` and `tensor_memory` (columns) those of a block.
    """
    unit = chip.register_unit
    warp_registers = -(-max(1, registers) * chip.lanes // unit) * unit
    by_registers = min(chip.partition_warps, chip.registers // warp_registers)
    limits = {
        "registers": PARTITIONS * by_registers // warps,
        "warps": PARTITIONS * chip.partition_warps // warps,
        "blocks": chip.blocks,
    }
    if warps >= PARTITIONS:  # they spread evenly
        limits["registers"] = by_registers // -(-warps // PARTITIONS)
    if shared_bytes:
        fit = chip.shared_bytes // (shared_bytes + chip.reserved_bytes)
        limits["shared memory"] = fit if shared_bytes <= chip.block_bytes else 0
    if tensor_memory:
        limits["tensor memory"] = chip.tensor_memory // tensor_memory
    # Among equal limits, the last one is what the kernel itself can change.
    name = min(reversed(limits), key=lambda name: limits[name])
    if limits["warps"] == limits[name]:
        name = "warps"
    return limits[name], name


def may_spill(bits: int, head_dim: int) -> bool:
    """Whether the table of tiles may have tiles that spill, because there may be no others."""
    return bits == 32 or head_dim > 128


def faults(code: MachineCode, specialization: Specialization) -> list[str]:
    """What is wrong with the code: spills, products without tensor cores, narrow loads or stores of rows, too
    much shared memory.

    16-bit types with a head dimension up to 128 must not spill at all, others no more than the table of tiles
    records (nothing where it records nothing).
    """
    chip, bits = CHIPS[code.architecture], specialization.bits
    reasons = []
    allowed = 0
    if specialization.tile is not None and may_spill(bits, code.head_dim):
        row = tiles.table_row(
            code.kernel,
            architecture=code.architecture,
            bits=bits,
            head_dim=code.head_dim,
            options=code.options,
        )
        allowed = row.spill_bytes or 0 if row and row.tile == specialization.tile else 0
    if code.spill_bytes > allowed:
        reasons.append(f"spills {code.spill_bytes} bytes a thread, {allowed} allowed")
    if specialization.multiplies and not any(
        name.startswith(chip.tensor_core) for name in code.tensor_core_instructions
    ):
        reasons.append(
            f"has no {chip.tensor_core} instruction, found {code.tensor_core_instructions or 'none'}"
        )
    if specialization.gathers and not code.loads.get(16):
        reasons.append(f"has no 16-byte load, found {code.loads}")
    elif specialization.gathers and bits == 16 and code.loads.get(2):
        reasons.append(f"loads single elements, found {code.loads}")
    least = WARP_STORE_BYTES // chip.lanes
    narrow, wide = (
        sum(width * count for width, count in code.stores.items() if (width >= least) == is_wide)
        for is_wide in (False, True)
    )
    if specialization.scatters and narrow > NARROW_STORES * wide:
        reasons.append(f"stores rows less than {least} bytes at a time, found {code.stores}")
    most = SMALL_SHARED_BYTES if code.architecture == "sm_80" else chip.block_bytes
    if code.shared_bytes > most:
        reasons.append(f"takes {code.shared_bytes} bytes of shared memory, a block may have {most}")
    elif code.resident_blocks < 1:
        reasons.append(f"fits no multiprocessor: {code.limited_by}")
    return reasons


def compile_kernel(specialization: Specialization) -> Any:
    """Triton's compiled kernel, whose `asm` holds every stage from "ttir" to "cubin" or "amdgcn".

    Raises RuntimeError, naming the kernel, where a stage of the compiler fails.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, chip = specialization.kernel, CHIPS[specialization.architecture]
    constexprs = dict(specialization.constexprs)
    types = {**specialization.signature, **dict.fromkeys(constexprs, "constexpr")}
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs=constexprs,
        attrs={
            (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in specialization.divisible
        },
    )
    options = {}
    if specialization.tile is not None:
        options = {"num_warps": specialization.tile.warps, "num_stages": specialization.tile.stages}
    try:
        return triton.compile(source, target=GPUTarget(*chip.target), options=options)
    except Exception as error:  # each stage of the compiler raises its own; none names the kernel
        raise RuntimeError(f"{specialization} does not compile: {error}") from error


def _count(values: Iterable[Value]) -> dict[Value, int]:
    return dict(sorted(Counter(values).items()))
