"""Checks of the sizes and probabilities that layers are made with."""

from __future__ import annotations

from typing import Any, cast

import torch

from reformer_kernels._limits import MAX_HEAD_DIM


def check_positive(name: str, value: Any) -> int:
    """`value`; raises ValueError unless it is an int (not a bool), or a symbolic one, of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return cast(int, value)


def refuse_tracing(what: str) -> None:
    """Raises RuntimeError under `torch.jit.trace`, whose program would fit one length only."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            f"torch.jit.trace cannot trace {what}: the traced program would be silently wrong at other "
            "lengths; use torch.export with a dynamic length, or torch.compile"
        )


def check_dropout(dropout: float) -> float:
    """`dropout` as a float; raises ValueError unless it is at least 0 and below 1."""
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}; 1 would drop everything")
    return float(dropout)


def check_head_sizes(
    embed_dim: int, num_heads: int, head_dim: int | None, value_dim: int | None
) -> tuple[int, int]:
    """The head dimension D of queries and keys and the head dimension D_v of values.

    `head_dim` None means embed_dim / num_heads, `value_dim` None means D. Raises ValueError for sizes that
    are not positive, that do not divide, or that are above 256.
    """
    check_positive("embed_dim", embed_dim)
    check_positive("num_heads", num_heads)
    if head_dim is None:
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads where head_dim is not given, "
                f"got embed_dim {embed_dim} and num_heads {num_heads}; give head_dim"
            )
        head_dim = embed_dim // num_heads
    if value_dim is None:
        value_dim = head_dim
    for name, value in (("head_dim", head_dim), ("value_dim", value_dim)):
        if check_positive(name, value) > MAX_HEAD_DIM:
            raise ValueError(f"{name} must be at most {MAX_HEAD_DIM}, got {value}; use more heads")
    return head_dim, value_dim
