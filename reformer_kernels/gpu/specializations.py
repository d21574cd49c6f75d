"""Every Triton kernel, described as its launcher compiles it, with no device and no tensor.

The module that `MODULES` names for an operation has a function

    specializations(*, architecture, dtype, head_dim, options, tiles) -> list[Specialization]

that lists the operation's kernels as its launcher compiles them for such tensors. With `options` "off" they
do the least that can be asked of them, with "all" everything at once. `tiles` maps kernel names to tiles that
replace the table's, for the search of tiles. Operations in `WITH_PRESETS` also take `preset`, one of
`gpu.presets.PRESETS`, and `rounds`, the number of hash rounds. Tests, `reformer-kernels inspect` and the
search read the list from `all_specializations`. Triton is not imported before that.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from reformer_kernels._limits import KERNEL_DTYPES
from reformer_kernels.gpu.presets import PRESETS
from reformer_kernels.gpu.tiles import Tile

MODULES = {
    "attention": "reformer_kernels.ops.attention.triton.specializations",
    "hash": "reformer_kernels.ops.hash.triton",
    "residual": "reformer_kernels.ops.residual.triton",
    "sort": "reformer_kernels.ops.sort.triton",
}
"""The operations that have Triton kernels, and the module that lists those of each.

They are named, not imported: operations import this module, and they import Triton, which takes a while.
"""

OPERATIONS = tuple(MODULES)

WITH_PRESETS = ("attention",)
"""The operations whose kernels depend on the kind of attention."""

ROUNDS = 4
"""The hash rounds for which kernels are compiled that depend on their number."""

OPTIONS = ("off", "all")
HEAD_DIMS = (32, 64, 128, 256)
"""The head dimensions that kernels are checked for."""

TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""How signatures spell a dtype; a pointer to it is "*" and this."""

assert set(TRITON_TYPES) == set(KERNEL_DTYPES)


@dataclass(frozen=True)
class Specialization:
    """What `triton.compile` needs to know to compile one kernel for given types and constants.

    Attributes:
        kernel: the `@triton.jit` function.
        name: what the table of tiles and `inspect` call it, such as "attention_forward".
        signature: the type of each argument that is not a constexpr, such as {"q": "*bf16", "length": "i32"}.
        constexprs: the value of each constexpr.
        tile: the tile whose rows, keys and dims are among the constexprs, and whose warps and stages go to
            the compiler. None for a kernel that is launched with Triton's own defaults.
        architecture, dtype, head_dim, options: what `specializations` was asked for.
        preset, rounds: the kind of attention and its hash rounds; None and 1 for other operations.
        divisible: the arguments that a launch finds to be multiples of 16 (addresses and strides), so that
            the compiler can load 16 bytes at once.
        multiplies: whether tensor-core instructions are expected.
        products: how many matrix products with D terms it computes for each pair of a row and a key (or of a
            row and a rotation's column); 0 for a kernel that goes through no pairs.
        gathers: whether it loads rows of the tensors, 16 bytes at a time.
        scatters: whether it stores such rows, or float32 sums of them, 16 bytes at a time.

    Raises ValueError unless signature and constexprs name each argument of the kernel once.
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
    scatters: bool = False
    products: int = 0
    preset: str | None = None
    rounds: int = 1

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
            raise ValueError(
                f"{self.name}: divisible names {sorted(unknown)}, which are not in the signature"
            )

    def __hash__(self) -> int:
        constants = tuple(sorted((name, str(value)) for name, value in self.constexprs.items()))
        return hash((self.name, self.preset, self.architecture, self.dtype, self.options, constants))

    @property
    def bits(self) -> int:
        """Bits of one number of the tensors."""
        return self.dtype.itemsize * 8

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        kind = f" {self.preset}" if self.preset else ""
        return f"{self.name}{kind} {dtype} D={self.head_dim} options {self.options} on {self.architecture}"


@dataclass(frozen=True)
class Launched:
    """One launch of a kernel, in so many programs."""

    specialization: Specialization
    programs: int


def all_specializations(
    *,
    architecture: str,
    dtype: torch.dtype,
    head_dim: int,
    options: str,
    operations: tuple[str, ...] = OPERATIONS,
    presets: tuple[str, ...] = ("paper",),
    rounds: int = ROUNDS,
    tiles: Mapping[str, Tile] | None = None,
) -> Iterator[Specialization]:
    """Every kernel of `operations` for such tensors, those of attention for each of `presets`.

    Imports Triton.
    Raises ValueError for options that are not in `OPTIONS` and presets that are not in `PRESETS`.
    """
    if options not in OPTIONS:
        raise ValueError(f"options must be one of {', '.join(OPTIONS)}, got {options!r}")
    unknown = [preset for preset in presets if preset not in PRESETS]
    if unknown:
        raise ValueError(f"presets must be some of {', '.join(PRESETS)}, got {', '.join(unknown)}")
    for operation in operations:
        module = importlib.import_module(MODULES[operation])
        common = {"architecture": architecture, "dtype": dtype, "head_dim": head_dim}
        common |= {"options": options, "tiles": tiles or {}}
        if operation in WITH_PRESETS:
            for preset in presets:
                yield from module.specializations(**common, preset=preset, rounds=rounds)
        else:
            yield from module.specializations(**common)
