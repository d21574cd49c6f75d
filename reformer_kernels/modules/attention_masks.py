"""The causal attention mask: making it, and recognising it among masks that users pass."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

MASK_BLOCK = 2**24
"""How many entries of an attention mask are read at a time."""


HIDING_BIAS = -0.99e9
"""Biases from here on hide a key beside any that is shown: -1e9, also rounded to bfloat16, and below.

So does a dtype's smallest number, where that is larger (float16).
"""


def causal_mask(length: int, key_length: int, device: torch.device) -> Tensor:
    """(length, key_length) bool, True where key j comes after query i."""
    return torch.ones(length, key_length, dtype=torch.bool, device=device).triu(1)


_last_answer: tuple[weakref.ref[Tensor], int, bool] | None = None


@torch.compiler.disable
def is_causal_mask(mask: Tensor) -> bool:
    """Whether `mask` (..., L, S) hides exactly the keys j > i.

    It holds False or 0 elsewhere, and there True, -inf, or a bias that hides as well, see `HIDING_BIAS`.

    Every entry is read, as a hint is not a proof and a mask must not be ignored. The answer for the last mask
    is kept until the mask changes, as all layers of a model are given the same one.
    """
    global _last_answer
    if mask.is_inference():  # such tensors have no version that would show changes
        return _hides_later_keys(mask)
    if _last_answer is not None:
        last_mask, version, answer = _last_answer
        if last_mask() is mask and version == mask._version:
            return answer
    answer = _hides_later_keys(mask)
    _last_answer = weakref.ref(mask), mask._version, answer
    return answer


def check_causal_hint(mask: Tensor) -> None:
    """Raises ValueError if `is_causal=True` was given beside a mask (..., L, S) that is not the causal one.

    torch obeys the hint and ignores the mask. A mask without values, or of another shape, passes; so does one
    in a compiled call, whose graph would break.
    """
    if mask.dim() < 2 or mask.is_meta or torch.compiler.is_compiling() or is_causal_mask(mask):
        return
    raise ValueError(
        "is_causal=True says that attn_mask is the causal mask, but this one, "
        f"{mask.dtype} {tuple(mask.shape)}, hides other keys or biases some: pass "
        "is_causal=False for this mask, or no mask for the causal one"
    )


def _hides_later_keys(mask: Tensor) -> bool:
    """Reads the mask in blocks of rows, so that no copy of it is made."""
    planes = mask.flatten(0, -3) if mask.dim() > 2 else mask[None]
    if planes.stride(0) == 0:
        planes = planes[:1]
    length, key_length = planes.shape[-2:]
    rows = max(1, MASK_BLOCK // max(1, key_length))
    for plane in planes.detach():
        for first in range(0, length, rows):
            last = min(first + rows, length)
            diagonal = plane[first:last, first:last]
            later = causal_mask(diagonal.shape[0], diagonal.shape[1], mask.device)
            shown = plane[first:last, :first], diagonal[~later]
            hidden = plane[first:last, last:], diagonal[later]
            if any(bool(part.any()) for part in shown) or not all(_all_hidden(part) for part in hidden):
                return False
    return True


def _all_hidden(part: Tensor) -> bool:
    if part.dtype == torch.bool or not part.numel():
        return bool(part.all())
    hiding = max(HIDING_BIAS, torch.finfo(part.dtype).min)
    return bool(part.amax() <= hiding)
