"""The operators that draw random rotations, and the choice of back end.

`torch.ops.reformer_kernels.native_sample_rotations` and `triton_sample_rotations` give the same bits as
`reference.sample_rotations`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from reformer_kernels.ops.hash import native, reference


def sample_rotations(
    seed: Tensor, heads: int, head_dim: int, rounds: int, width: int, backend: str
) -> Tensor:
    """Nearly normal numbers (heads, head_dim, rounds, width) float32 on the device of `seed`.

    `seed` is an int64 tensor of one element. Every back end gives the same bits: see `reference`.
    """
    if backend == "reference":
        return reference.sample_rotations(seed, heads, head_dim, rounds, width)
    operators = torch.ops.reformer_kernels
    operator = operators.native_sample_rotations if backend == "native" else operators.triton_sample_rotations
    return operator(seed, heads, head_dim, rounds, width)


def check_seed(seed: Tensor) -> None:
    """Raises TypeError unless `seed` is an int64 tensor of one element."""
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"seed must be an int64 tensor of one element, got {seed.dtype} {tuple(seed.shape)}")


def _triton() -> ModuleType:
    """The Triton kernel, imported when it first runs, because importing Triton takes a while."""
    from reformer_kernels.ops.hash import triton_rotations

    return triton_rotations


def _define(name: str, devices: tuple[str, ...], kernel: Callable[[], Any]) -> None:
    """Defines the operator `name` on `devices`, which runs `kernel().sample_rotations`."""
    qualified = f"reformer_kernels::{name}"
    torch.library.define(
        qualified,
        "(Tensor seed, SymInt heads, SymInt head_dim, SymInt rounds, SymInt width) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def run(seed: Tensor, heads: int, head_dim: int, rounds: int, width: int) -> Tensor:
        check_seed(seed)
        shape = (heads, head_dim, rounds, width)
        if min(shape) < 0:
            raise ValueError(f"sizes of rotations must not be negative, got {shape}")
        out = torch.empty(shape, dtype=torch.float32, device=seed.device)
        if out.numel():
            kernel().sample_rotations(seed, out)
        return out

    def fake(seed: Tensor, heads: int, head_dim: int, rounds: int, width: int) -> Tensor:
        check_seed(seed)
        return torch.empty((heads, head_dim, rounds, width), dtype=torch.float32, device=seed.device)

    torch.library.register_fake(qualified, fake)
    for device in devices:
        torch.library.impl(qualified, device, run)


_define("native_sample_rotations", ("CPU",), lambda: native)
_define("triton_sample_rotations", ("CUDA", "CPU"), _triton)  # on the CPU, Triton's interpreter runs it
