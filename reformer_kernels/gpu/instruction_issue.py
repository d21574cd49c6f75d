"""What a kernel's instructions cost a multiprocessor, counted in its machine code. All of it is predicted.

Most kernels walk pairs of a row and a key in a loop, the *steady loop*: the one whose own instructions
multiply matrices. `count` splits the instructions into those of one step of that loop and those of a tile
outside it, and says how many pairs each serves. A kernel whose window is one step has no steady loop; all of
it is outside.

A step or tile of w warps that carries out n instructions a warp keeps a multiprocessor busy for at least

    issue      n w / 4                        four schedulers issue one instruction a cycle each
    integer    n_integer w / 2                64 lanes for integers, comparisons, selections and conversions
    special    n_special w * 2                16 lanes for exp2, log2, reciprocals
    memory     bytes / 128                    the port to shared memory and the first-level cache; shuffles
    tensor     2 m n k of all products / what the chip multiplies a cycle

cycles. The figures are those of perfect overlap: every instruction of a loop is counted once a step, whatever
it waits for. Loops inside the steady one that read memory run once for each hash round, others, which wait
for a barrier, once.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from reformer_kernels.gpu.control_flow import Loop, loops_of
from reformer_kernels.gpu.disassembly import Instruction, access_width, load_width, store_width

TENSOR_CORE = re.compile(r"^(HMMA|HGMMA|UTC\w*MMA|IMMA|v_mfma)")

_FUSED = re.compile(r"^(FFMA|FMUL|FADD|v_fma|v_mul_f32|v_pk_fma)")
"""Products outside tensor cores, which mark the steady loop of kernels that use none."""

_SPECIAL = re.compile(r"^(MUFU|v_(exp|log|rcp|rsq|sqrt)_)")

_INTEGER = re.compile(
    r"^(IADD3?|VIADD\w*|VIMNMX\w*|IMNMX|IABS|ISETP|ISCADD|LEA|LOP3?|PLOP3|SHF|SHL|SHR|SGXT|BMSK|PRMT|SEL|POPC"
    r"|FLO|FSEL|FSETP|FSET|FMNMX\w*|FCHK|I2F\w*|F2F\w*|F2I\w*|I2I\w*|R2P|P2R|VOTE)$"
)
"""What NVIDIA's integer units carry out. IMAD is not among them: it runs where floating point does."""

_SHARED_MEMORY = re.compile(r"^(LDS|STS|LDSM|STSM|ATOMS|SHFL|ds_)")


@dataclass(frozen=True)
class Cost:
    """What so many instructions cost a multiprocessor.

    Attributes:
        instructions: those that one warp carries out.
        pairs: the pairs of a row and a key that they serve, for all warps of the block together.
        cache_bytes: what all warps load from and store to the second-level cache or memory. Loads of less
            than 8 bytes are left out: they are indices, of which many threads load the same.
        cycles: the least cycles of a multiprocessor for all warps of the block, by what is busy.
        kinds: the instructions by name, without modifiers, most frequent first.
    """

    instructions: float
    pairs: float
    cache_bytes: float
    cycles: dict[str, float]
    kinds: dict[str, float]

    @property
    def bound(self) -> str:
        """What is busy longest."""
        return max(self.cycles, key=lambda name: self.cycles[name])


@dataclass(frozen=True)
class IssueCount:
    """One step of the steady loop, None where there is none, and a tile's instructions outside it."""

    step: Cost | None
    outside: Cost

    @property
    def steady(self) -> Cost:
        """What pairs are charged for: a step of the loop, or the whole tile where there is no loop."""
        return self.step or self.outside

    def program(self, steps: float) -> Cost:
        """What a program costs that carries out so many steps of the loop."""
        if self.step is None:
            return self.outside
        inside, outside = self.step, self.outside
        return Cost(
            instructions=outside.instructions + steps * inside.instructions,
            pairs=outside.pairs + steps * inside.pairs,
            cache_bytes=outside.cache_bytes + steps * inside.cache_bytes,
            cycles={name: count + steps * inside.cycles[name] for name, count in outside.cycles.items()},
            kinds={
                name: outside.kinds.get(name, 0) + steps * inside.kinds.get(name, 0)
                for name in dict.fromkeys((*inside.kinds, *outside.kinds))
            },
        )

    def cycles_per_pair(self, name: str) -> float | None:
        """Cycles of one resource (such as "issue") for a pair and multiprocessor; None without pairs."""
        return self.steady.cycles[name] / self.steady.pairs if self.steady.pairs else None


@dataclass(frozen=True)
class Machine:
    """What `count` must know of the chip and the launch.

    Attributes:
        warps: warps of a block. lanes: threads of a warp.
        instruction_cycles: scheduler cycles of an ordinary instruction (4 where 16 lanes serve 64 threads).
        tensor_operations: operations (2 m n k) that a multiprocessor's tensor cores carry out in a cycle.
        vector_prefix: how the names of the instructions begin that take `instruction_cycles`; others take 1.
    """

    warps: int
    lanes: int
    tensor_operations: float
    instruction_cycles: int = 1
    vector_prefix: str = ""


def count(
    code: Sequence[Instruction],
    machine: Machine,
    *,
    products: int,
    depth: int,
    tile_pairs: int,
    rounds: int,
    descriptors: Sequence[int] = (),
) -> IssueCount:
    """What a step of the steady loop and the rest of a tile cost; see the head of this file.

    products: matrix products for each pair, of `depth` terms; 0 for a kernel without pairs, which has no
    steady loop. tile_pairs: the pairs of one step as the kernel was written; where the compiler put several
    into one, the sizes of the products say so. rounds: how often loops inside the steady one run.
    descriptors: those of the tensor instructions whose names hold no size, in order.
    """
    outside, loops = loops_of(code)
    operations = _operations(code, machine, descriptors)
    unsized = any(not size for size in operations.values())
    steady = _steady(code, loops) if products else []
    inside: dict[int, float] = {}
    for loop in steady:
        _repeat(code, loop, 1.0, rounds, inside)
    rest = {i: 1.0 for i in (*outside, *(i for loop in loops for i in loop.all)) if i not in inside}

    def cost(weights: dict[int, float], least_steps: int) -> Cost:
        done = sum(weight * operations.get(i, 0.0) for i, weight in weights.items())
        # Rounded down: the warps of a small tile carry out some products twice.
        steps = int(done / (2.0 * depth * products * tile_pairs)) if products else 0
        pairs = float(max(steps, least_steps) * tile_pairs)
        if unsized:  # what the pairs need, where the code does not say what it does
            done = 2.0 * depth * products * pairs
        weighted = [(code[i], weight) for i, weight in weights.items()]
        cycles = _cycles(weighted, machine) | {"tensor": done / machine.tensor_operations}
        moved = sum(weight * _row_bytes(instruction.name) for instruction, weight in weighted)
        kinds: Counter[str] = Counter()
        for instruction, weight in weighted:
            kinds[instruction.kind] += weight  # type: ignore[assignment]
        return Cost(
            instructions=sum(weights.values()),
            pairs=pairs,
            cache_bytes=moved * machine.warps * machine.lanes,
            cycles=cycles,
            kinds=dict(kinds.most_common()),
        )

    if not steady:
        return IssueCount(None, cost(rest, 1 if products else 0))
    return IssueCount(cost(inside, 1), cost(rest, 0))


def _steady(code: Sequence[Instruction], loops: Iterable[Loop]) -> list[Loop]:
    """The outermost loops among those whose own instructions multiply matrices."""

    def found(pattern: re.Pattern[str], loops: Iterable[Loop]) -> list[Loop]:
        listed = []
        for loop in loops:
            own = any(pattern.match(code[i].name) for i in loop.own)
            listed += [loop] if own else found(pattern, loop.inner)
        return listed

    steady = found(TENSOR_CORE, loops)
    if steady or any(TENSOR_CORE.match(i.name) for i in code):
        return steady
    fused = found(_FUSED, loops)
    if not fused:
        return []
    # Without tensor cores, the products are the loop with most of the multiplications.
    return [max(fused, key=lambda loop: sum(bool(_FUSED.match(code[i].name)) for i in loop.all))]


def _repeat(
    code: Sequence[Instruction], loop: Loop, weight: float, rounds: int, into: dict[int, float]
) -> None:
    into.update(dict.fromkeys(loop.own, weight))
    for inner in loop.inner:
        reads = any(load_width(code[i].name) or code[i].kind == "LDS" for i in inner.all)
        multiplies = any(TENSOR_CORE.match(code[i].name) for i in inner.all)
        _repeat(code, inner, weight * (rounds if reads and not multiplies else 1), rounds, into)


def _cycles(weighted: Iterable[tuple[Instruction, float]], machine: Machine) -> dict[str, float]:
    issue = integer = special = memory = 0.0
    for instruction, weight in weighted:
        name, kind = instruction.name, instruction.kind
        slow = bool(machine.vector_prefix) and name.startswith(machine.vector_prefix)
        issue += weight * (machine.instruction_cycles if slow and not TENSOR_CORE.match(name) else 1)
        special += weight * bool(_SPECIAL.match(name))
        integer += weight * bool(_INTEGER.match(kind))
        width = load_width(name) or store_width(name)
        if _SHARED_MEMORY.match(name):
            width = _shared_width(name)
        memory += weight * width
    return {
        "issue": issue * machine.warps / 4,
        "integer": integer * machine.warps * machine.lanes / 64,
        "special": special * machine.warps * machine.lanes / 16,
        "memory": memory * machine.warps * machine.lanes / 128,
    }


def _row_bytes(name: str) -> int:
    """Bytes that a thread moves between registers (or shared memory) and the cache, indices left out."""
    loaded = load_width(name)
    return store_width(name) + (loaded if loaded >= 8 else 0)


def _shared_width(name: str) -> int:
    if name.startswith(("LDSM", "STSM")):  # 8 x 8 matrices of 2 bytes; .4 is four of them
        return 16 if name.endswith(".4") else 8 if name.endswith(".2") else 4
    if name.startswith("ds_"):
        return 16 if "b128" in name else 8 if "b64" in name else 4
    return access_width(name)


def _operations(
    code: Sequence[Instruction], machine: Machine, descriptors: Sequence[int]
) -> dict[int, float]:
    """The operations (2 m n k) that the block's warps together carry out by each tensor-core instruction."""
    multiplying = [i for i, instruction in enumerate(code) if TENSOR_CORE.match(instruction.name)]
    described = [i for i in multiplying if code[i].name.startswith("UTC")]
    # HGMMA is one product of the four warps of a group, HMMA and v_mfma are one of each warp.
    operations = {
        i: 2.0 * _size(code[i].name) * machine.warps / (4 if code[i].kind == "HGMMA" else 1)
        for i in multiplying
    }
    if len(described) == len(descriptors):
        operations |= {i: 2.0 * _described(d) for i, d in zip(described, descriptors, strict=True)}
    return operations


def _size(name: str) -> int:
    """m n k of an instruction that says it, such as HGMMA.64x32x16.F32.BF16."""
    # HMMA.16816 is 16 x 8 x 16, HMMA.1688 is 16 x 8 x 8.
    size = re.search(r"(\d+)x(\d+)x(\d+)", name) or re.search(r"\.(16)(8)(16|8|4)\b", name)
    return math.prod(map(int, size.groups())) if size else 0


def _described(descriptor: int) -> int:
    """m n k of a tcgen05 product, from the fields of its instruction descriptor (PTX ISA, tcgen05.mma)."""
    n, m = (descriptor >> 17 & 0x3F) * 8, (descriptor >> 24 & 0x1F) * 16
    return m * n * (8 if descriptor >> 7 & 7 == 2 else 16)  # TF32 operands have 32 bits
