"""Bucket ids that sorts find hard, for the tests of every sort."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("uniform", "equal", "sorted", "reversed", "distinct", "one huge bucket", "out of range")


def distribution(kind: str, shape: tuple[int, ...], n: int) -> Tensor:
    """Ids int32 of n buckets; "out of range" has few that are among them."""
    L = shape[-1]
    ids = torch.randint(0, n, shape)
    if kind == "equal":
        ids.fill_(n // 2)
    elif kind == "sorted":
        ids = ids.sort(dim=-1).values
    elif kind == "reversed":
        ids = ids.sort(dim=-1, descending=True).values
    elif kind == "distinct":
        ids = (torch.argsort(torch.rand(shape), dim=-1) * n) // max(L, 1)
    elif kind == "one huge bucket":
        ids = torch.where(torch.rand(shape) < 0.95, n - 1, ids)
    elif kind == "out of range":
        ids = torch.randint(-(2**31), 2**31, shape)
    return ids.to(torch.int32)
