"""Drawing random rotations, as an operator that graph capture treats as a whole.

A `torch.Generator` cannot be traced, so drawing hides behind `reformer_kernels::sample_rotations`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("reformer_kernels", "FRAGMENT")
_LIBRARY.define(
    "sample_rotations(Tensor seed, SymInt heads, SymInt head_dim, SymInt rounds, SymInt width) -> Tensor"
)


def _sample_rotations(seed: Tensor, heads: int, head_dim: int, rounds: int, width: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(int(seed.item()))
    shape = (heads, head_dim, rounds, width)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _sample_rotations_fake(seed: Tensor, heads: int, head_dim: int, rounds: int, width: int) -> Tensor:
    return torch.empty((heads, head_dim, rounds, width), dtype=torch.float32, device="cpu")


_LIBRARY.impl("sample_rotations", _sample_rotations, "CompositeExplicitAutograd")
torch.library.register_fake("reformer_kernels::sample_rotations", _sample_rotations_fake, lib=_LIBRARY)


def sample_rotations(seed: Tensor, heads: int, head_dim: int, rounds: int, width: int) -> Tensor:
    """Independent normal numbers, (heads, head_dim, rounds, width) float32 on the CPU.

    `seed` is an int64 tensor of one element; the same seed gives the same numbers on every device.
    """
    return torch.ops.reformer_kernels.sample_rotations(seed, heads, head_dim, rounds, width)
