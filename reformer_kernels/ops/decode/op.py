"""The operator of a step of cached generation: schema, checks, fake kernel, and the choice of back end.

The arguments of `torch.ops.reformer_kernels.native_decode_step` are the fields of `reference.Step`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reformer_kernels._limits import MAX_HEAD_DIM
from reformer_kernels.ops.decode import native, reference
from reformer_kernels.ops.decode.reference import Step
from reformer_kernels.ops.hash.op import lsh_hash

_ARGUMENTS = (
    "Tensor q, Tensor? k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) lengths, SymInt capacity, "
    "int[] rule, float scale, Tensor? hashed, Tensor? rotations, int[] factors, Tensor(d!)? buckets, "
    "Tensor? order, Tensor? starts, Tensor(e!)? recent, Tensor(f!)? recent_buckets, SymInt recent_count"
)


def decode_step(step: Step, backend: str) -> Tensor:
    """Append new tokens to a cache and attend from them: see `reference.decode_step`.

    The "triton" back end hashes by its kernel and does the rest in plain torch.
    """
    if backend == "native":
        result: Tensor = torch.ops.reformer_kernels.native_decode_step(*step)
        return result
    ids = None
    if step.hashed is not None and step.rotations is not None:
        ids = lsh_hash(step.hashed, step.rotations, step.factors, None, backend)
    return reference.decode_step(step, ids)


def _check(step: Step) -> None:
    """Raises ValueError for sizes that do not agree with each other; the kernel's caller checks the rest."""
    for name, tensor in (("keys", step.keys), ("values", step.values)):
        if tensor.dim() != 4 or not 1 <= tensor.size(3) <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must be (B, H, room, 1..{MAX_HEAD_DIM}), got shape {tuple(tensor.shape)}"
            )
    if step.buckets is None:
        return
    parts = (step.hashed, step.rotations, step.order, step.starts, step.recent, step.recent_buckets)
    if any(part is None or part.dim() != 4 for part in (*parts, step.buckets)):
        raise ValueError("a step with buckets needs hashed, rotations and all parts of the order, each 4-D")
    _, rotations, _, starts, _, _ = parts
    assert rotations is not None and starts is not None
    if rotations.size(0) not in (1, step.keys.size(1)):
        raise ValueError(f"rotations must be of 1 or {step.keys.size(1)} heads, got {rotations.size(0)}")
    if not step.factors or any(factor < 2 or factor % 2 for factor in step.factors):
        raise ValueError(f"bucket factors must be positive even numbers, got {list(step.factors)}")
    if sum(step.factors) > 2 * rotations.size(3):
        raise ValueError(f"factors {list(step.factors)} need more columns than {rotations.size(3)}")
    if starts.size(3) < math.prod(step.factors) + 1:
        raise ValueError(f"starts must hold {math.prod(step.factors) + 1} entries, got {starts.size(3)}")
    if step.recent_count < 0:
        raise ValueError(f"recent_count must be at least 0, got {step.recent_count}")


def _run(*arguments: Any) -> Tensor:
    step = Step(*arguments)
    _check(step)
    return native.decode_step(step)


def _fake(*arguments: Any) -> Tensor:
    step = Step(*arguments)
    _check(step)
    return step.q.new_empty((*step.q.shape[:3], step.values.size(3)))


_library = torch.library.Library("reformer_kernels", "FRAGMENT")
_library.define(f"native_decode_step({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("reformer_kernels::native_decode_step", _fake, lib=_library)
_library.impl("native_decode_step", _run, "CPU")
