"""What `MultiheadAttention` checks of its arguments before LSH attention runs on them."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

MASK_BLOCK = 2**24
"""Entries of an attention mask that are read at a time."""


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    sizes: tuple[int, int, int],
    num_heads: int,
    batch_first: bool,
) -> None:
    """Raises ValueError for wrong shapes, TypeError for wrong mask dtypes. `sizes`: embed_dim, kdim, vdim."""
    form = ("batch, length" if batch_first else "length, batch") if query.dim() == 3 else "length"
    names = ("query", "key", "value")
    for name, x, size in zip(names, (query, key, value), sizes, strict=True):
        if x.dim() != query.dim() or x.dim() not in (2, 3):
            raise ValueError(
                f"query, key and value must all be batched (3 dimensions) or all be unbatched (2), "
                f"got shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            )
        if x.shape[-1] != size:
            raise ValueError(f"{name} must have shape ({form}, {size}), got {tuple(x.shape)}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"key and value must have one length and batch, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    axis = 1 if batch_first and query.dim() == 3 else 0
    length, key_length = query.shape[axis], key.shape[axis]
    batch = None if query.dim() == 2 else query.shape[1 - axis]
    if batch is not None and key.shape[1 - axis] != batch:
        raise ValueError(
            f"query and key must have one batch, got {tuple(query.shape)} and {tuple(key.shape)} as "
            f"({form}, size)"
        )
    if key_padding_mask is not None:
        _check_mask_dtype("key_padding_mask", key_padding_mask)
        wanted: tuple[int, ...] = (key_length,) if batch is None else (batch, key_length)
        if key_padding_mask.shape != wanted:
            raise ValueError(
                f"key_padding_mask must have shape {wanted}, (batch, key length) or (key length) if "
                f"unbatched, got {tuple(key_padding_mask.shape)}"
            )
    if attn_mask is not None:
        _check_mask_dtype("attn_mask", attn_mask)
        plain, by_head = (length, key_length), ((batch or 1) * num_heads, length, key_length)
        if attn_mask.shape not in (plain, by_head):
            raise ValueError(
                f"attn_mask must have shape {plain}, (length, key length), or {by_head}, one for each head "
                f"of each sequence, got {tuple(attn_mask.shape)}"
            )


def _check_mask_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{name} must be bool, True = not seen, or float, added to the logits, got {mask.dtype}; "
            f"from a mask with 1 for what is seen, pass {name} == 0"
        )


def causal_mask(length: int, key_length: int, device: torch.device) -> Tensor:
    """(length, key_length) bool, True where key j comes after query i."""
    return torch.ones(length, key_length, dtype=torch.bool, device=device).triu(1)


_last_answer: tuple[weakref.ref[Tensor], int, bool] | None = None


@torch.compiler.disable
def is_causal_mask(mask: Tensor) -> bool:
    """Whether `mask` (..., L, S) hides exactly the keys j > i: True there, or -inf; False elsewhere, or 0.

    Every entry is read, as a hint is not a proof and a mask must not be ignored; once for one mask after the
    other, as all layers of a model are given the same.
    """
    global _last_answer
    if mask.is_inference():  # has no version that would tell of changes
        return _hides_later_keys(mask)
    if _last_answer is not None:
        asked, version, answer = _last_answer
        if asked() is mask and version == mask._version:
            return answer
    answer = _hides_later_keys(mask)
    _last_answer = weakref.ref(mask), mask._version, answer
    return answer


def _hides_later_keys(mask: Tensor) -> bool:
    """Read in blocks of rows, so that no copy of the mask is made."""
    planes = mask.flatten(0, -3) if mask.dim() > 2 else mask[None]
    if planes.stride(0) == 0:
        planes = planes[:1]
    length, key_length = planes.shape[-2:]
    rows = max(1, MASK_BLOCK // max(1, key_length))
    for plane in planes.detach():
        for first in range(0, length, rows):
            last = min(first + rows, length)
            corner = plane[first:last, first:last]
            after = causal_mask(corner.shape[0], corner.shape[1], mask.device)
            shown = plane[first:last, :first], corner[~after]
            hidden = plane[first:last, last:], corner[after]
            if any(bool(part.any()) for part in shown) or not all(_all_hidden(part) for part in hidden):
                return False
    return True


def _all_hidden(part: Tensor) -> bool:
    if part.dtype == torch.bool or not part.numel():
        return bool(part.all())
    return bool(part.amax() == float("-inf"))
