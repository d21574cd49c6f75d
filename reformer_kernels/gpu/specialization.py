"""One compile of one Triton kernel, described so that it needs no device and no tensor.

The module that `MODULES` names for an operation has a function

    specializations(*, architecture, dtype, head_dim, options, tiles={}) -> list[Specialization]

that lists its kernels as its launcher would compile them for such tensors: with `options` "off" the least
that can be asked of them, with "all" everything at once. `tiles` replaces the table's tile by kernel name,
for the search of tiles. `all_specializations` collects them; tests, `reformer-kernels inspect` and the search
read them. Neither this module nor `tiles` imports Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from reformer_kernels.gpu.tiles import Tile

MODULES = {
    "attention": "reformer_kernels.ops.attention.triton.specializations",
    "hash": "reformer_kernels.ops.hash.triton",
    "residual": "reformer_kernels.ops.residual.triton",
}
"""The operations that have Triton kernels, and the module of each that lists them."""

OPERATIONS = tuple(MODULES)

OPTIONS = ("off", "all")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (32, 64, 128, 256)

TRITON_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
"""How signatures spell a dtype; a pointer to it is "*" and this."""


@dataclass(frozen=True)
class Specialization:
    """What `triton.compile` needs to know of one kernel.

    Attributes:
        kernel: the `@triton.jit` function.
        name: what the table of tiles and `inspect` call it, such as "attention_forward".
        signature: the type of each argument that is no constexpr, such as {"q": "*bf16", "length": "i32"}.
        constexprs: the value of each constexpr.
        tile: rows, keys and dims are among the constexprs; warps and stages are the compiler's. None for a
            kernel that is not in the table and is launched with Triton's own defaults.
        architecture, dtype, head_dim, options: what it was made for, as `specializations` was asked.
        divisible: arguments that a launch finds to be multiples of 16 (addresses and strides), which is what
            lets the compiler load 16 bytes at once.
        multiplies: whether tensor-core instructions are expected.
        gathers: whether rows of the tensors are loaded, 16 bytes at a time.
    """

    kernel: Any
    name: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    tile: Tile | None
    architecture: str
    dtype: torch.dtype
    head_dim: int
    options: str
    divisible: tuple[str, ...] = ()
    multiplies: bool = True
    gathers: bool = True

    def __post_init__(self) -> None:
        arguments = set(self.signature) | set(self.constexprs)
        expected = set(self.kernel.arg_names)
        if arguments != expected or set(self.signature) & set(self.constexprs):
            raise ValueError(
                f"{self.name}: signature and constexprs must name each argument of the kernel once; "
                f"missing {sorted(expected - arguments)}, unknown {sorted(arguments - expected)}, "
                f"twice {sorted(set(self.signature) & set(self.constexprs))}"
            )
        unknown = set(self.divisible) - set(self.signature)
        if unknown:
            raise ValueError(f"{self.name}: divisible names {sorted(unknown)}, which the signature has not")

    @property
    def bits(self) -> int:
        return self.dtype.itemsize * 8

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name} {dtype} D={self.head_dim} options {self.options} on {self.architecture}"


def all_specializations(
    *,
    architecture: str,
    dtype: torch.dtype,
    head_dim: int,
    options: str,
    operations: tuple[str, ...] = OPERATIONS,
    tiles: Mapping[str, Tile] | None = None,
) -> Iterator[Specialization]:
    """Every kernel of `operations`, as their launchers compile it. Imports Triton."""
    if options not in OPTIONS:
        raise ValueError(f"options must be one of {', '.join(OPTIONS)}, got {options!r}")
    for operation in operations:
        module = importlib.import_module(MODULES[operation])
        yield from module.specializations(
            architecture=architecture, dtype=dtype, head_dim=head_dim, options=options, tiles=tiles or {}
        )
