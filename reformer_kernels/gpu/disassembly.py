"""Machine code as a list of instructions: what NVIDIA's disassembler and the AMD compiler print, parsed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: with its modifiers, such as "LDG.E.128" or "v_mfma_f32_32x32x8_bf16".
        operands: the text after the name.
        predicated: whether it is carried out under a condition only.
        target: the index of the instruction that it jumps to; None where it does not jump.
    """

    name: str
    operands: str = ""
    predicated: bool = False
    target: int | None = None

    @property
    def kind(self) -> str:
        """The name without modifiers, such as "LDG"."""
        return self.name.split(".")[0]


@dataclass(frozen=True)
class Listing:
    """A kernel as the disassembler shows it: `text`, and the facts that are read from it.

    `registers` and `spill_bytes` (local memory, scratch) are those of one thread.
    """

    text: str
    instructions: list[Instruction]
    registers: int
    spill_bytes: int


# NVIDIA


def disassembler() -> Path:
    """Where cuobjdump is, which comes with Triton's wheel."""
    import triton.backends.nvidia

    return Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_LINE = re.compile(
    r"^\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@!?U?P\w+ )?\s*"
    r"(?P<name>[A-Z][\w.]*)(?P<operands>[^;/]*)",
    re.MULTILINE,
)
_JUMPS = ("BRA", "JMP")
_ADDRESS = re.compile(r"0x([0-9a-f]+)\s*$")


def read_cubin(cubin: bytes) -> Listing:
    """The listing of a compiled NVIDIA kernel.

    Raises RuntimeError where the disassembler's output is not understood.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, text = (
            subprocess.run(
                [str(disassembler()), option, str(file)], check=True, capture_output=True, text=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    resources = _RESOURCES.search(usage)
    instructions = parse_sass(text)
    if resources is None or not instructions:
        raise RuntimeError(f"the disassembler's output was not understood: {usage[:200]!r}")
    registers, stack = map(int, resources.groups())
    # ptxas spills to a stack frame. Local memory that is accessed without one is counted by access widths.
    local = sum(access_width(i.name) for i in instructions if i.kind in ("LDL", "STL"))
    return Listing(text, instructions, registers, stack or local)


def parse_sass(text: str) -> list[Instruction]:
    """The instructions of a kernel as cuobjdump prints them."""
    lines = list(_LINE.finditer(text))
    index = {int(line["address"], 16): n for n, line in enumerate(lines)}
    instructions = []
    for line in lines:
        name, operands = line["name"], line["operands"].strip()
        address = _ADDRESS.search(operands) if name.split(".")[0] in _JUMPS else None
        target = index.get(int(address[1], 16)) if address else None
        # A jump under a uniform predicate names it among its operands: BRA UP0, 0x100.
        predicated = bool(line["predicate"]) or bool(address and re.search(r"\bU?P\d", operands))
        instructions.append(Instruction(name, operands, predicated, target))
    return instructions


def tcgen05_descriptors(ptx: str) -> list[int]:
    """The instruction descriptors of the tcgen05 products of a PTX text, in order, which hold their sizes.

    Empty unless all of them are constants.
    """
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (-?\d+);", ptx))
    used = re.findall(r"tcgen05\.mma\.\S+ \[.*?\], (?:\[.*?\]|%rd\d+), %rd\d+, (%r\d+)", ptx)
    return [int(constants[register]) for register in used] if set(used) <= set(constants) else []


# AMD


_AMD_LINE = re.compile(
    r"^(?:(?P<label>\.LBB\w+):|\s+(?P<name>(?:[vs]|global|buffer|flat|ds|scratch)_\w+)(?P<operands>[^;\n]*))",
    re.MULTILINE,
)


def read_amdgcn(text: str) -> Listing:
    """The listing of a kernel in the AMD compiler's assembly.

    Raises RuntimeError where the assembly does not state the registers and the scratch size.
    """
    registers = re.search(r"^; TotalNumVgprs: (\d+)", text, re.MULTILINE)
    scratch = re.search(r"^; ScratchSize: (\d+)", text, re.MULTILINE)
    if registers is None or scratch is None:
        raise RuntimeError("the AMD compiler's assembly does not state registers and scratch size")
    return Listing(text, parse_amdgcn(text), int(registers[1]), int(scratch[1]))


def parse_amdgcn(text: str) -> list[Instruction]:
    """The instructions of a kernel in the AMD compiler's assembly."""
    labels: dict[str, int] = {}
    lines: list[re.Match[str]] = []
    for line in _AMD_LINE.finditer(text):
        if line["label"]:
            labels[line["label"]] = len(lines)
        else:
            lines.append(line)
    instructions = []
    for line in lines:
        name, operands = line["name"], line["operands"].strip()
        jumps = name.startswith(("s_cbranch", "s_branch"))
        target = labels.get(operands) if jumps else None
        instructions.append(Instruction(name, operands, name.startswith("s_cbranch"), target))
    return instructions


# Widths


def access_width(name: str) -> int:
    """Bytes that an NVIDIA instruction such as LDG.E.128.CONSTANT moves for one thread."""
    for part in name.split("."):
        if part in ("64", "128", "256"):
            return int(part) // 8
        if part in ("U8", "S8", "U16", "S16"):
            return int(part[1:]) // 8
    return 4


_AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


def load_width(name: str) -> int:
    """The bytes that a thread loads from device memory, 0 for an instruction that is no such load."""
    return _memory_width(name, ("LDG", "LDGSTS"), "load")


def store_width(name: str) -> int:
    """The bytes that a thread stores to device memory, 0 for an instruction that is no such store."""
    return _memory_width(name, ("STG",), "store")


def _memory_width(name: str, nvidia: tuple[str, ...], amd: str) -> int:
    if name.split(".")[0] in nvidia:
        return access_width(name)
    access = re.match(rf"(?:global|buffer|flat)_{amd}_(\w+)", name)
    if access is None:
        return 0
    for kind, width in _AMD_WIDTHS.items():
        if access[1].startswith(kind):
            return width
    return 1 if "byte" in access[1] else 2
