"""What a launcher launches, noted with no device: which kernels, with which constants, in how many programs.

    with recording("sm_90") as launches:
        launch.forward(...)  # on tensors of the "meta" device, which have shapes but no memory

Nothing runs inside the block. Launchers see the architecture that was named, its tiles and its limits. So
tests and `inspect` compile exactly what a call would launch, and no list of kernels can fall behind.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reformer_kernels.gpu import tiles as tile_table
from reformer_kernels.gpu.architectures import assumed_architecture
from reformer_kernels.gpu.specializations import TRITON_TYPES, Specialization
from reformer_kernels.gpu.tiles import Tile

DEFAULT_WARPS, DEFAULT_STAGES = 4, 3
"""What Triton takes where a launch names no warps or stages."""

_POINTERS = {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1", **TRITON_TYPES}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: the `@triton.jit` function. programs: how many of it were launched.
        arguments: all of them by name, constants included. warps, stages: what the compiler was told.
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Any]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        """The kernel's name in tables, such as "attention_forward"."""
        return str(self.kernel.fn.__name__).removesuffix("_kernel")

    def types(self) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
        """Signature, constants, and the arguments divisible by 16, as Triton's own launch would find them."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        divisible: list[str] = []
        for parameter in self.kernel.params:
            name, value = parameter.name, self.arguments[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None:
                constants[name] = value
            elif isinstance(value, Tensor):
                signature[name] = "*" + _POINTERS[value.dtype]
                # The allocator aligns whole tensors to 16 bytes; a view starts where it starts.
                if special and value.storage_offset() * value.element_size() % 16 == 0:
                    divisible.append(name)
            elif isinstance(value, bool):
                signature[name] = "i1"
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif special and value == 1:
                constants[name] = value
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if special and value % 16 == 0:
                    divisible.append(name)
        return signature, constants, tuple(divisible)

    def specialization(self, *, tile_names: Sequence[str] = (), **fields: Any) -> Specialization:
        """The kernel as it was launched. tile_names: the constants that are the tile's rows, keys and dims.

        fields: those of `Specialization` that a launch does not show.
        """
        signature, constants, divisible = self.types()
        tile = None
        if tile_names:
            rows, keys, dims = (constants[name] for name in tile_names)
            tile = Tile(rows, keys, dims, self.warps, self.stages)
        return Specialization(
            kernel=self.kernel,
            name=self.name,
            signature=signature,
            constexprs=constants,
            divisible=divisible,
            tile=tile,
            **fields,
        )


@contextlib.contextmanager
def recording(architecture: str, tiles: Mapping[str, Tile] | None = None) -> Iterator[list[Launch]]:
    """A list that notes the launches of the block in place of running them; see the head of this file.

    architecture: one of `ARCHITECTURES`, which tensors of the "meta" device then count as. tiles: by kernel
    name, tiles that replace the table's. Not for several threads at once, as launches are Triton's own.
    """
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def note(self: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name, None) for name in ("num_warps", "num_stages")}
        parameters = [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in self.arg_names
        ]
        arguments = inspect.Signature(parameters).bind(*positional, **named).arguments
        sizes = grid(arguments) if callable(grid) else grid
        programs = 1
        for size in sizes:
            programs *= int(size)
        launches.append(
            Launch(
                self,
                programs,
                arguments,
                options["num_warps"] or DEFAULT_WARPS,
                options["num_stages"] or DEFAULT_STAGES,
            )
        )

    ordinary, JITFunction.run = JITFunction.run, note
    try:
        with assumed_architecture(architecture), tile_table.replacing(tiles or {}):
            yield launches
    finally:
        JITFunction.run = ordinary
