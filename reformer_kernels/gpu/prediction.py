"""The predicted time of attention on a shape: what its launches cost by their machine code.

Nothing here is measured.

A launch of P programs on a chip of S multiprocessors takes at least as long as

- what is busiest in a multiprocessor (`instruction_issue`) needs for ceil(P / S) programs, each of which
  carries out the code outside the steady loop once and as many steps of the loop as its range of keys has
  (`reach`);
- its rows take through the second-level cache, merged rounds' reading and writing included.

A pass takes its launches one after the other, or as long as its bytes take through memory (`cost_model`), and
`LAUNCH_SECONDS` for each launch. That is the time under CUDA graphs. Launched one by one, it takes at least
`HOST_SECONDS` a launch.

`share` is the share of the perfect rate of issue that kernels reach. 1 is a bound that none reaches; 0.5 is
an assumption, which only a GPU can confirm. So are `LAUNCH_SECONDS` and `HOST_SECONDS`.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reformer_kernels.gpu import cost_model, machine_code, reach
from reformer_kernels.gpu.architectures import CHIPS
from reformer_kernels.gpu.cost_model import Shape
from reformer_kernels.gpu.machine_code import Inspected, MachineCode
from reformer_kernels.gpu.presets import PRESETS
from reformer_kernels.gpu.specializations import MODULES, Launched, Specialization

LAUNCH_SECONDS = 2e-6
"""What a kernel that waits for the one before adds to a CUDA graph: assumed."""

HOST_SECONDS = 30e-6
"""What the host takes for an eager launch of a Triton kernel with dozens of arguments: assumed."""

SORT_LAUNCHES = 4
"""Launches of the CUDA sort by one digit. It is no Triton kernel, so that its bytes alone are counted."""

FLASH_RATES = {"FlashAttention-2": 270e12, "FlashAttention-3": 400e12}
"""Published operations a second of dense causal attention, forward and backward together, on an H100."""

FLASH_ARCHITECTURE = "sm_90"
"""The architecture of an H100."""

SHARES = (1.0, 0.5)
"""The shares of the perfect rate of issue for which times are shown."""


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel in a pass.

    Attributes:
        kernel: its name. launches, programs: how many there are of them in all.
        multiprocessor_seconds: the time of what is busiest in the multiprocessors, at perfect issue.
        cache_seconds: the time of the rows' bytes through the second-level cache.
        busiest: what is busiest. cycles: those of each resource, over all programs.
        instructions: the instructions that all warps carry out.
    """

    kernel: str
    launches: int
    programs: int
    multiprocessor_seconds: float
    cache_seconds: float
    busiest: str
    cycles: dict[str, float]
    instructions: float


@dataclass(frozen=True)
class PassTime:
    """A pass of a call (hashing, sorting, forward, backward): its kernels and the bytes that it must move."""

    name: str
    kernels: tuple[KernelTime, ...]
    memory_seconds: float
    launches: int

    def device_seconds(self, share: float) -> float:
        """The predicted time under CUDA graphs, where kernels reach `share` of the perfect rate of issue."""
        kernels = sum(max(k.multiprocessor_seconds / share, k.cache_seconds) for k in self.kernels)
        return max(kernels, self.memory_seconds) + self.launches * LAUNCH_SECONDS

    def bound(self, share: float) -> str:
        """What the time comes from, mostly."""
        parts = {"memory": self.memory_seconds, "launches": self.launches * LAUNCH_SECONDS}
        for kernel in self.kernels:
            slow = kernel.multiprocessor_seconds / share
            name, seconds = (
                ("cache", kernel.cache_seconds) if kernel.cache_seconds > slow else (kernel.busiest, slow)
            )
            parts[name] = parts.get(name, 0.0) + seconds
        return max(parts, key=lambda name: parts[name])


def predict_call(
    shape: Shape,
    dtype: torch.dtype,
    preset: str,
    architecture: str,
    read: Callable[[Specialization], MachineCode],
) -> list[PassTime]:
    """The passes of one call of a kind of attention, forward and backward.

    shape.bits must be those of dtype. `read` compiles a kernel and reads its code.
    """
    hashing, attention = (importlib.import_module(MODULES[name]) for name in ("hash", "attention"))
    forward = attention.launches(architecture, shape, dtype, preset, backward=False)
    both = attention.launches(architecture, shape, dtype, preset)
    passes = []
    if PRESETS[preset].hashed:
        sides = 2 if PRESETS[preset].keys == "apart" else 1
        hashed = hashing.launches(architecture, shape, dtype) * sides
        passes = [
            predict_pass("hash", hashed, shape, None, architecture, read),
            dataclasses.replace(
                predict_pass("sort", [], shape, None, architecture, read), launches=SORT_LAUNCHES * sides
            ),
        ]
    return [
        *passes,
        predict_pass("attention_forward", forward, shape, preset, architecture, read),
        predict_pass("attention_backward", both[len(forward) :], shape, preset, architecture, read),
    ]


def predict_pass(
    name: str,
    launched: Sequence[Launched],
    shape: Shape,
    preset: str | None,
    architecture: str,
    read: Callable[[Specialization], MachineCode],
) -> PassTime:
    """The predicted time of the pass `name` (one of `cost_model.OPERATIONS`), which launches `launched`.

    preset: the kind of attention whose keys it walks, None for hashing. `read`: see `predict_call`.
    """
    chip = CHIPS[architecture]
    groups: dict[str, list[Launched]] = {}
    for one in launched:
        groups.setdefault(one.specialization.name, []).append(one)
    kernels = []
    for kernel, launches in groups.items():
        programs = sum(one.programs for one in launches)
        seconds = moved = instructions = 0.0
        totals: dict[str, float] = {}
        for one in launches:
            code = read(one.specialization)
            tiles = 1.0
            if preset is not None and code.tile is not None:
                rows = shape.rows * PRESETS[preset].rounds(shape.n_hashes)
                tiles = rows / programs / code.tile.rows
            cost = code.issue.program(tiles * steps_of_a_tile(code, shape, preset))
            rounds = -(-one.programs // chip.multiprocessors)
            seconds += rounds * max(cost.cycles.values()) / chip.clock
            moved += one.programs * cost.cache_bytes
            instructions += one.programs * code.warps * cost.instructions
            for resource, count in cost.cycles.items():
                totals[resource] = totals.get(resource, 0.0) + one.programs * count
        kernels.append(
            KernelTime(
                kernel=kernel,
                launches=len(launches),
                programs=programs,
                multiprocessor_seconds=seconds,
                cache_seconds=moved / chip.cache_rate,
                busiest=max(totals, key=lambda resource: totals[resource]),
                cycles=totals,
                instructions=instructions,
            )
        )
    memory = cost_model.floor(name, shape, chip.rates)
    return PassTime(name, tuple(kernels), memory.bytes / chip.rates.copy, len(launched))


def steps_of_a_tile(code: MachineCode, shape: Shape, preset: str | None) -> float:
    """The mean number of steps of the steady loop for one tile of rows; preset None is for hashing."""
    issue, tile = code.issue, code.tile
    if issue.step is None or tile is None:
        return 0.0
    if preset is None:  # hashing walks the columns of the rotations
        return -(-cost_model.rotation_columns(shape) // tile.keys)
    first, keys = issue.outside.pairs / tile.rows, issue.step.pairs / tile.rows
    return reach.steps(
        preset, shape.length, shape.chunk_length, rows=tile.rows, first=int(first), keys=int(keys)
    )


@dataclass(frozen=True)
class Question:
    """What is to be predicted, as a value that can be sent to another process.

    shape.bits must be those of dtype. dump: the folder that `machine_code.read` writes to.
    """

    architecture: str
    preset: str
    dtype: torch.dtype
    shape: Shape
    dump: Path | None = None


@dataclass(frozen=True)
class Prediction:
    """The predicted times of one kind of attention.

    Attributes:
        passes: "hash", "sort" (where tokens are hashed), "attention_forward", "attention_backward".
        crossings: by name of a dense kernel and share of the perfect rate of issue, the shortest length from
            which on the whole call, forward and backward, is ahead of it; None where there is none up to
            `LONGEST`. Empty where there are no published rates: they are for causal attention on an H100.
        kernels: the machine code that the times come from.
    """

    question: Question
    passes: tuple[PassTime, ...]
    crossings: dict[tuple[str, float], int | None]
    kernels: tuple[Inspected, ...]

    @property
    def launches(self) -> int:
        """Launches of the whole call, forward and backward."""
        return sum(one.launches for one in self.passes)

    def device_seconds(self, share: float) -> float:
        """The whole call, forward and backward, under CUDA graphs."""
        return sum(one.device_seconds(share) for one in self.passes)

    def eager_seconds(self, share: float) -> float:
        """The whole call where the host launches one kernel after the other."""
        return max(self.device_seconds(share), self.launches * HOST_SECONDS)


def answer(question: Question) -> Prediction:
    """Compiles the kernels of a kind of attention and predicts its times, which takes some seconds."""
    kernels: dict[Specialization, Inspected] = {}

    def read(specialization: Specialization) -> MachineCode:
        if specialization not in kernels:
            code = machine_code.read(specialization, question.dump)
            kernels[specialization] = Inspected(code, machine_code.faults(code, specialization))
        return kernels[specialization].code

    def passes(shape: Shape) -> list[PassTime]:
        return predict_call(shape, question.dtype, question.preset, question.architecture, read)

    comparable = question.architecture == FLASH_ARCHITECTURE and question.dtype != torch.float32
    comparable = comparable and PRESETS[question.preset].config.causal
    crossings = {}
    for name, share in itertools.product(FLASH_RATES if comparable else (), SHARES):
        crossings[name, share] = crossing(
            lambda shape: sum(one.device_seconds(share) for one in passes(shape)),  # noqa: B023
            lambda shape: flash_seconds(shape, FLASH_RATES[name]),  # noqa: B023
            question.shape,
        )
    return Prediction(question, tuple(passes(question.shape)), crossings, tuple(kernels.values()))


def flash_seconds(shape: Shape, rate: float) -> float:
    """The time of dense causal attention, forward and backward, at so many operations a second.

    Two products forward and five backward, half of whose pairs the causal mask leaves.
    """
    return 7.0 * shape.length**2 * shape.head_dim * shape.heads / rate


LONGEST = 2**20
"""The longest sequence for which a crossing is looked for."""


def crossing(seconds: Callable[[Shape], float], flash: Callable[[Shape], float], shape: Shape) -> int | None:
    """The shortest length from which on `seconds` stays below `flash`; None up to `LONGEST`.

    Lengths are tried in steps of 64. Both are asked for `shape` with other lengths.
    """

    def ahead(multiple: int) -> bool:
        other = dataclasses.replace(shape, length=64 * multiple)
        return seconds(other) < flash(other)

    low, high = 1, LONGEST // 64
    if not ahead(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ahead(middle) else (middle + 1, high)
    return 64 * high
