"""Angular hashing and its rotations in plain PyTorch, written for reading: what every other back end is
compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from reformer_kernels._precision import autocast_suspended
from reformer_kernels._random import normal_numbers, philox, split_seed

DIMENSION_ORIGIN = 2**31
"""What is added to the dimension in rotations' counters. Dropout's counters, which the same seed may serve,
have the round in that place, and so never meet them."""


def sample_rotations(seed: Tensor, heads: int, head_dim: int, rounds: int, width: int) -> Tensor:
    """Random rotations (heads, head_dim, rounds, width) float32 on the seed's device.

    The number at (h, d, r, c) is the one that `normal_numbers` makes of word c % 4 of the Philox block with
    key `seed` and counter (h, 2^31 + d, r, c // 4). So it depends on the seed and its place alone, and the
    first columns are the same however many are drawn.
    """
    groups = -(-width // 4)

    def places(n: int, dim: int) -> Tensor:
        return torch.arange(n, device=seed.device).view([-1 if i == dim else 1 for i in range(4)])

    counter = (
        places(heads, 0), places(head_dim, 1) + DIMENSION_ORIGIN, places(rounds, 2), places(groups, 3)
    )  # fmt: skip
    words = torch.stack(philox(split_seed(seed), counter), dim=-1)  # [heads, head_dim, rounds, groups, 4]
    return normal_numbers(words).flatten(3)[..., :width].contiguous()


def lsh_hash(x: Tensor, rotations: Tensor, factors: Sequence[int], padding: Tensor | None) -> Tensor:
    """Bucket ids of each row of `x` in each round (section 2 of the paper; factors as in trax).

    With f the factors and R_k the f_k / 2 columns of a round's rotation that belong to factor k,
    b_k = argmax([x R_k; -x R_k]) and id = b_0 + f_0 * b_1 + f_0 * f_1 * b_2 + ...

    x (B, H, L, D), rotations (H or 1, D, R, width >= sum(f) / 2), padding (B, L) bool or None
    -> (B, H, R, L) int32. Ties take the lowest index. A row whose projection is not finite anywhere in the
    columns of a round gets id 0 in that round; padding rows get the extra id n = prod(f).

    Projections are exact to float32 (to float64 for float64 x): they accumulate in float64, so that
    neither threads nor TF32 nor autocast can move an id.
    """
    if padding is not None:
        x = x.masked_fill(padding[:, None, :, None], 0)
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, rotations = x.double(), rotations.double()
    rounds = [_hash_round(x, rotations[:, :, r], factors, precision) for r in range(rotations.shape[2])]
    buckets = torch.stack(rounds, dim=2)
    if padding is not None:
        buckets = buckets.masked_fill(padding[:, None, None, :], math.prod(factors))
    return buckets.to(torch.int32)


def _hash_round(x: Tensor, rotation: Tensor, factors: Sequence[int], precision: torch.dtype) -> Tensor:
    """(B, H, L, D) and (H or 1, D, width) to ids (B, H, L) int64."""
    with autocast_suspended(x.device.type):
        width = sum(factors) // 2
        projected = (x @ rotation[..., :width]).to(precision)  # [B, H, L, width]
    ids = torch.zeros(x.shape[:3], dtype=torch.int64, device=x.device)
    column, stride = 0, 1
    for f in factors:
        part = projected[..., column : column + f // 2]
        ids = ids + stride * torch.cat([part, -part], dim=-1).argmax(dim=-1)
        column, stride = column + f // 2, stride * f
    return ids.masked_fill(~projected.isfinite().all(dim=-1), 0)
