"""The GPU architectures that kernels are compiled for: limits, rates, and which one a device counts as."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from reformer_kernels._backend import interpreted

PARTITIONS = 4
"""Parts of a multiprocessor, each with registers and a scheduler of its own."""

KIB = 1024


@dataclass(frozen=True)
class Rates:
    """What a chip moves and multiplies at most, in bytes and operations a second.

    `measured` says that the rates come from a machine. Otherwise they are the data sheet's peaks, which no
    kernel reaches. Products of 32-bit numbers are those of TF32 (XF32).
    """

    device: str
    copy: float
    matmul_16_bit: float
    matmul_32_bit: float
    measured: bool

    def matmul(self, bits: int) -> float:
        """Operations a second of products of 16-bit or 32-bit numbers."""
        return self.matmul_16_bit if bits == 16 else self.matmul_32_bit


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor (a compute unit in AMD's terms) and rates of the whole chip.

    The limits are from the vendors' manuals.

    Attributes:
        target: the arguments of `triton.backends.compiler.GPUTarget`.
        registers: 32-bit registers of a lane in one of its partitions, times the lanes of a warp.
        register_unit: a warp gets registers in multiples of this.
        partition_warps: the most warps of one partition.
        blocks: the most resident blocks.
        shared_bytes: shared memory of the multiprocessor.
        block_bytes: the most shared memory of one block.
        reserved_bytes: what the system keeps of each block's shared memory.
        tensor_memory: columns of tensor memory, 0 where there is none.
        tensor_core: how the names of its tensor-core instructions begin.
        multiprocessors, clock: how many there are, and their cycles a second under load.
        tensor_operations: operations of products of 16-bit numbers that one multiprocessor carries out in a
            cycle; half as many of 32-bit ones.
        vector_cycles: the cycles that a partition takes to issue one vector instruction of a warp.
        cache_bytes: the second-level cache (on AMD the one that all dies share). cache_rate: bytes that it
            reads or writes a second.
        rates: what the chip moves and multiplies.
    """

    target: tuple[str, int | str, int]
    registers: int
    register_unit: int
    partition_warps: int
    blocks: int
    shared_bytes: int
    block_bytes: int
    reserved_bytes: int
    tensor_memory: int
    tensor_core: str
    multiprocessors: int
    clock: float
    tensor_operations: float
    cache_bytes: int
    cache_rate: float
    rates: Rates
    vector_cycles: int = 1

    @property
    def lanes(self) -> int:
        """Threads of a warp (a wavefront in AMD's terms)."""
        return self.target[2]


CHIPS: Mapping[str, Chip] = {
    "sm_80": Chip(
        target=("cuda", 80, 32),
        registers=16384,
        register_unit=256,
        partition_warps=16,
        blocks=32,
        shared_bytes=164 * KIB,
        block_bytes=163 * KIB,
        reserved_bytes=KIB,
        tensor_memory=0,
        tensor_core="HMMA",
        multiprocessors=108,
        clock=1.41e9,
        tensor_operations=2048,
        cache_bytes=40 * KIB * KIB,
        cache_rate=5.0e12,
        rates=Rates("A100 80GB", 2.04e12, 312e12, 156e12, measured=False),
    ),
    "sm_90": Chip(
        target=("cuda", 90, 32),
        registers=16384,
        register_unit=256,
        partition_warps=16,
        blocks=32,
        shared_bytes=228 * KIB,
        block_bytes=227 * KIB,
        reserved_bytes=KIB,
        tensor_memory=0,
        tensor_core="HGMMA",
        multiprocessors=132,
        clock=1.75e9,
        tensor_operations=4096,
        cache_bytes=50 * KIB * KIB,
        cache_rate=5.5e12,
        rates=Rates("H100", 3.0e12, 790e12, 395e12, measured=True),
    ),
    "sm_100": Chip(
        target=("cuda", 100, 32),
        registers=16384,
        register_unit=256,
        partition_warps=16,
        blocks=32,
        shared_bytes=228 * KIB,
        block_bytes=227 * KIB,
        reserved_bytes=KIB,
        tensor_memory=512,
        tensor_core="UTCHMMA",
        multiprocessors=148,
        clock=1.85e9,
        tensor_operations=8192,
        cache_bytes=126 * KIB * KIB,
        cache_rate=10e12,
        rates=Rates("B200", 8.0e12, 2250e12, 1125e12, measured=False),
    ),
    "gfx942": Chip(
        target=("hip", "gfx942", 64),
        registers=512 * 64,
        register_unit=8 * 64,
        partition_warps=8,
        blocks=32,
        shared_bytes=64 * KIB,
        block_bytes=64 * KIB,
        reserved_bytes=0,
        tensor_memory=0,
        tensor_core="v_mfma",
        multiprocessors=304,
        clock=2.1e9,
        tensor_operations=2048,
        cache_bytes=256 * KIB * KIB,
        cache_rate=11.9e12,
        rates=Rates("MI300X", 5.3e12, 1307e12, 653e12, measured=False),
        vector_cycles=4,
    ),
}

ARCHITECTURES = tuple(CHIPS)
"""The architectures that kernels are compiled for and checked on."""

INTERPRETER = "interpreter"
"""The architecture of Triton's interpreter, whose small tiles make small tests cross tile borders."""


_ASSUMED: ContextVar[str | None] = ContextVar("assumed architecture", default=None)


@contextlib.contextmanager
def assumed_architecture(architecture: str) -> Iterator[None]:
    """Within the block, the "meta" device counts as one of this architecture."""
    token = _ASSUMED.set(architecture)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def cache_and_multiprocessors(device: torch.device) -> tuple[int, int]:
    """The bytes of a CUDA or ROCm device's last-level cache and the number of its multiprocessors.

    Those of the assumed architecture for the "meta" device, see `assumed_architecture`.
    """
    if device.type == "meta":
        chip = CHIPS[architecture_of(device)]
        return chip.cache_bytes, chip.multiprocessors
    return _device_limits(device)


@functools.cache
def _device_limits(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "L2_cache_size", 40 * 2**20), properties.multi_processor_count


def architecture_of(device: torch.device | str) -> str:
    """The architecture whose tiles suit `device`: one of `ARCHITECTURES`, or "interpreter".

    A compute capability between those listed counts as the nearest below. 12.x counts as sm_80, whose
    tensor-core instructions it has, with about as much shared memory. Every ROCm device counts as gfx942.
    Raises RuntimeError for devices that cannot run the Triton kernels.
    """
    device = torch.device(device)
    assumed = _ASSUMED.get()
    if assumed is not None and device.type == "meta":
        return assumed
    if interpreted():
        return INTERPRETER
    if device.type != "cuda":
        raise RuntimeError(
            f"Triton kernels run on CUDA and ROCm devices (or interpreted, with TRITON_INTERPRET=1), "
            f"got a tensor on {device}"
        )
    if torch.version.hip is not None:
        return "gfx942"
    return architecture_of_capability(*torch.cuda.get_device_capability(device))


def architecture_of_capability(major: int, minor: int) -> str:
    """The architecture that an NVIDIA device of this compute capability counts as; see `architecture_of`."""
    if major >= 12:
        return "sm_80"
    for least, architecture in ((10, "sm_100"), (9, "sm_90"), (8, "sm_80")):
        if major >= least:
            return architecture
    raise RuntimeError(
        f"the Triton kernels need compute capability 8.0 or higher, this device has {major}.{minor}; "
        "use backend='reference'"
    )
