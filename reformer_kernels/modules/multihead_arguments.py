"""The arguments of `MultiheadAttention`, checked: the options of a module and the tensors of a call."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from reformer_kernels._backend import BACKENDS
from reformer_kernels._checks import check_config
from reformer_kernels.config import LSHConfig, check_choice, check_flag, check_integer

Fallback = Literal["exact", "raise"]

TorchMultiheadAttention = nn.MultiheadAttention
"""torch's class, bound here at import: a program may set `torch.nn.MultiheadAttention` to this package's."""

FULL_ATTENTION_THRESHOLD = 512
"""The default `full_attention_threshold` of separate queries and keys: where LSH attention becomes the faster
one on a CPU, as `reformer-kernels bench mha` measures it."""

MAX_THRESHOLD = 2**31 - 1


@dataclass(frozen=True)
class MultiheadOptions:
    """What `MultiheadAttention` has beyond `nn.MultiheadAttention`, by attribute name.

    Made by `checked_options`.
    """

    full_attention_threshold: int
    shared_qk: bool
    seed: int
    backend: str
    fallback: Fallback
    config: LSHConfig

    def why_unsuited(self, module: TorchMultiheadAttention) -> str | None:
        """Why a module with these parameters cannot have these options; None if it can."""
        if self.shared_qk and (module.bias_k is not None or module.add_zero_attn):
            return "shared_qk has no form of add_bias_kv and add_zero_attn; use shared_qk=False"
        return None


def checked_options(
    config: LSHConfig,
    full_attention_threshold: int | None,
    shared_qk: bool,
    seed: int,
    backend: str,
    fallback: Fallback | None,
) -> MultiheadOptions:
    """The options with their defaults filled in.

    Raises ValueError for values out of range, TypeError for a config that is not an LSHConfig.
    """
    check_not_causal(config)
    check_flag("shared_qk", shared_qk)
    if full_attention_threshold is None:
        full_attention_threshold = 0 if shared_qk else FULL_ATTENTION_THRESHOLD
    check_integer("full_attention_threshold", full_attention_threshold, 0, MAX_THRESHOLD)
    check_integer("seed", seed, -(2**63), 2**64 - 1)
    check_choice("backend", backend, BACKENDS)
    if fallback is None:
        fallback = "raise" if shared_qk else "exact"
    check_choice("fallback", fallback, get_args(Fallback))
    return MultiheadOptions(full_attention_threshold, shared_qk, seed, backend, fallback, config)


def check_not_causal(config: LSHConfig) -> None:
    check_config(config)
    if config.causal:
        raise ValueError(
            "config.causal must be False, got True: as in nn.MultiheadAttention, each call says whether it "
            "is causal, by is_causal=True or attn_mask"
        )


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
    """Raises ValueError for shapes that do not fit, TypeError for mask dtypes that are not accepted.

    `sizes` are embed_dim, kdim and vdim.
    """
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
        expected: tuple[int, ...] = (key_length,) if batch is None else (batch, key_length)
        if key_padding_mask.shape != expected:
            raise ValueError(
                f"key_padding_mask must have shape {expected}, (batch, key length) or (key length) if "
                f"unbatched, got {tuple(key_padding_mask.shape)}"
            )
    if attn_mask is not None:
        _check_mask_dtype("attn_mask", attn_mask)
        shared, by_head = (length, key_length), ((batch or 1) * num_heads, length, key_length)
        if attn_mask.shape not in (shared, by_head):
            raise ValueError(
                f"attn_mask must have shape {shared}, (length, key length), or {by_head}, one for each head "
                f"of each sequence, got {tuple(attn_mask.shape)}"
            )


def refuse_or_warn(
    reason: str, fallback: Fallback, query: Tensor, key: Tensor, threshold: int, *, quiet: bool
) -> None:
    """Raises RuntimeError where full attention is forbidden; else warns of it once for each reason.

    `quiet`: the caller asked for what full attention alone can give.
    """
    if fallback == "raise":
        raise RuntimeError(
            f"this call needs full attention: {reason}. Query {tuple(query.shape)} and key "
            f"{tuple(key.shape)} are above full_attention_threshold {threshold}, "
            "where fallback='raise' forbids it; fallback='exact' allows it"
        )
    if not quiet and not torch.compiler.is_compiling():
        warn_of_full_attention(reason)


@functools.cache
def warn_of_full_attention(reason: str) -> None:
    warnings.warn(
        "reformer_kernels.MultiheadAttention computes full attention beyond its threshold, in time and "
        f"memory that grow with the square of the length: {reason}. This is said once; "
        "fallback='raise' forbids it",
        stacklevel=4,
    )


def check_nested(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: tuple[Tensor | None, Tensor | None],
    batch_first: bool,
) -> None:
    """Raises ValueError unless these nested tensors and masks are ones that can be padded."""
    if query is not key or key is not value or masks != (None, None) or not batch_first:
        raise ValueError(
            "nested tensors are accepted for self-attention (query, key and value one tensor) with "
            "batch_first=True and without masks; otherwise pad them and pass key_padding_mask"
        )
    if query.layout != torch.strided:
        raise ValueError(
            f"nested tensors must have the strided layout, got {query.layout}; pad them with "
            "torch.nested.to_padded_tensor and pass key_padding_mask"
        )


def _check_mask_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"{name} must be bool, True = not seen, or float, added to the logits, got {mask.dtype}; "
            f"from a mask with 1 for what is seen, pass {name} == 0"
        )
