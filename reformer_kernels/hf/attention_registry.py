"""`register_attention`: LSH attention under any transformers model that asks the registry for its attention.

transformers keeps two registries: functions that attend, and functions that make the mask for them. Both are
needed: the second must not build an L x L mask for long sequences, and the first must know that it did not.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, get_args

import torch
from torch import Tensor, nn

from reformer_kernels import functional
from reformer_kernels._backend import BACKENDS
from reformer_kernels._limits import MAX_HEAD_DIM
from reformer_kernels.config import LSHConfig, check_choice, check_integer
from reformer_kernels.modules.multihead_arguments import MAX_THRESHOLD, Fallback, check_not_causal


@dataclass(frozen=True)
class AttentionOptions:
    """What `register_attention` puts under a model.

    Attributes:
        config: how to hash and attend, see `functional.lsh_cross_attention`. Its `causal` must be False: each
            layer says whether it is causal.
        full_attention_threshold: where L_q * L_k is at most its square, attention is full and exact.
        seed: of the rotations in evaluation, to which a layer's index is added. In training each call draws
            new rotations from torch's global generator.
        backend: "auto", "native", "triton" or "reference".
        fallback: what a long call does that LSH attention cannot serve: "exact" computes full attention and
            warns once with the reason, "raise" raises RuntimeError.

    Raises ValueError for values out of range, TypeError for a config that is not an LSHConfig.
    """

    config: LSHConfig = LSHConfig()  # noqa: RUF009  (frozen, so one shared default is safe)
    full_attention_threshold: int = 1024
    seed: int = 0
    backend: str = "auto"
    fallback: Fallback = "exact"

    def __post_init__(self) -> None:
        check_not_causal(self.config)
        check_integer("full_attention_threshold", self.full_attention_threshold, 0, MAX_THRESHOLD)
        check_integer("seed", self.seed, -(2**62), 2**62)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("fallback", self.fallback, get_args(Fallback))


def register_attention(name: str = "lsh", options: AttentionOptions = AttentionOptions()) -> None:
    """Register LSH attention with transformers, so that a model can be told to use it by `name`.

    `AutoModel.from_pretrained(folder, attn_implementation="lsh")` or `model.set_attn_implementation("lsh")`
    then runs `functional.lsh_cross_attention` (queries and keys hashed apart, the model's own weights) in
    every layer that asks transformers' registry, with these rules:

    - Up to `options.full_attention_threshold`, and for a single query (a step of cached generation), the
      result is that of transformers' "sdpa".
    - Beyond, causal and bidirectional layers take LSH attention, layers with a sliding window take
      `functional.sliding_window_attention`, which is exact, and no L x L mask is built. Padding masks,
      grouped-query heads (keys are not repeated in memory), cross-attention, dropout and gradients work.
    - What LSH attention cannot serve computes full attention as "sdpa" does and warns once with the reason:
      position biases, masks other than causal, sliding-window and padding, packed sequences, chunks of a
      prompt that follow others in a cache, static caches, heads of more than 256. `options.fallback="raise"`
      makes it an error.

    Under torch.compile, pass a causal model its `attention_mask`: without one transformers takes every batch
    for a packed one, whose mask is not causal alone.

    Registering a name again replaces its options, also for models that use it. Several names can stand side
    by side with options of their own.

    Args:
        name: what `attn_implementation` will say. Not the name of one of transformers' own.
        options: hashes, chunk, threshold, seed and so on.

    Raises:
        ValueError: `name` is empty or is transformers' own.
        TypeError: `options` is not an `AttentionOptions`.
        ImportError: transformers is not installed, or has no registry of masks (5.0 has).

    >>> register_attention(options=AttentionOptions(LSHConfig(n_hashes=4), full_attention_threshold=2048))
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError as error:
        raise ImportError(
            "register_attention needs transformers 5 or newer; pip install -U transformers"
        ) from error
    if "q_length" not in signature(sdpa_mask).parameters:
        raise ImportError(
            "this transformers describes masks in an older way; pip install -U transformers (5.0 or newer)"
        )
    if not isinstance(options, AttentionOptions):
        raise TypeError(f"options must be an AttentionOptions, got {type(options).__name__}")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be a word such as 'lsh', got {name!r}")
    known = AttentionInterface()
    if name == "eager" or (name in known and not isinstance(known[name], _RegisteredAttention)):
        raise ValueError(f"name {name!r} is one of transformers' own; take another, such as 'lsh'")
    registered = _RegisteredAttention(name, options)
    AttentionInterface.register(name, registered)
    AttentionMaskInterface.register(name, registered.mask)


class _RegisteredAttention:
    """The two functions that stand in transformers' registries under one name."""

    def __init__(self, name: str, options: AttentionOptions) -> None:
        self.name = name
        self.options = options
        self._configs = options.config, dataclasses.replace(options.config, causal=True)
        self._warned: set[str] = set()

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: Any = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] | None = None,
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        allow_is_bidirectional_skip: bool = False,
        config: Any = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """The mask of a call: (B, 1, 1, L_k) bool, True = seen, or None without padding, where this call is
        long and its pattern is one that the layer states itself (causal, bidirectional, sliding window).

        Else the mask that "sdpa" takes.
        """
        from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

        if mask_function is None:
            mask_function = causal_mask_function
        causal = allow_is_causal_skip and q_length == kv_length
        plain = mask_function is causal_mask_function and causal
        plain = plain or (mask_function is bidirectional_mask_function and allow_is_bidirectional_skip)
        if local_size is not None:
            # A mask by blocks of positions (`attention_chunk_size`) gives a local size too.
            window = getattr(config, "sliding_window", None)
            by_blocks = getattr(config, "attention_chunk_size", None) is not None
            plain = (causal or allow_is_bidirectional_skip) and local_size == window and not by_blocks
        aligned = not isinstance(q_offset, Tensor) and q_offset == 0 and kv_offset == 0
        whole = attention_mask is None or attention_mask.shape[-1] == kv_length
        if plain and aligned and whole and self._is_long(q_length, kv_length):
            return None if attention_mask is None else attention_mask[:, None, None, :].to(torch.bool)
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            config=config,
            **kwargs,
        )

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention of query (B, H, L_q, D) over key and value (B, H or a divisor of it, L_k, D).

        Returns (B, L_q, H, Dv), and None for the weights.
        """
        if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
            what = "softcap" if kwargs.get("softcap") is not None else "attention sinks (s_aux)"
            raise ValueError(
                f"attn_implementation={self.name!r} has no {what}, which {type(module).__name__} uses; load "
                "the model with attn_implementation='eager'"
            )
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        window = _sliding_window(module, kwargs)
        if not self._is_long(query.shape[2], key.shape[2]):
            return _full_attention(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
            )
        by_key = attention_mask is None or _is_by_key(attention_mask)
        reason = _why_full_attention(query, key, value, by_key, causal, window, kwargs)
        if reason is not None:
            self._fall_back(module, reason)
            if by_key:
                attention_mask = _written_out(attention_mask, query, key, causal, window)
            return _full_attention(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs
            )
        padding = None if attention_mask is None else ~attention_mask[:, 0, 0]
        out = self._long_attention(
            module, query, key, value, padding, causal=causal, window=window, dropout=dropout, scale=scaling
        )
        return out.transpose(1, 2).contiguous(), None

    def _is_long(self, q_length: int, kv_length: int) -> bool:
        return q_length > 1 and q_length * kv_length > self.options.full_attention_threshold**2

    def _fall_back(self, module: nn.Module, reason: str) -> None:
        if self.options.fallback == "raise":
            raise RuntimeError(
                f"{type(module).__name__} needs full attention: {reason}; beyond full_attention_threshold "
                f"{self.options.full_attention_threshold} fallback='raise' forbids it, 'exact' allows it"
            )
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"attn_implementation={self.name!r} computes full attention in {type(module).__name__}: "
                f"{reason}",
                stacklevel=4,
            )

    def _long_attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        *,
        causal: bool,
        window: int | None,
        dropout: float,
        scale: float | None,
    ) -> Tensor:
        batch, heads = query.shape[:2]
        # Each key head becomes a batch entry whose heads are the queries that share it, so that expanding
        # the keys over them moves no memory.
        key_heads = key.shape[1]
        group = heads // key_heads
        if group > 1:
            query = query.unflatten(1, (key_heads, group)).flatten(0, 1)
            key, value = (x.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for x in (key, value))
            padding = None if padding is None else padding.repeat_interleave(key_heads, dim=0)
        options = self.options
        seed = None if module.training else options.seed + int(getattr(module, "layer_idx", None) or 0)
        if window is not None and window < key.shape[2]:
            out = functional.sliding_window_attention(
                query,
                key,
                value,
                window,
                causal=causal,
                scale=scale,
                key_padding_mask=padding,
                dropout_p=dropout,
                seed=seed,
                backend=options.backend,
            )
        else:
            config = self._configs[causal]
            if scale is not None:
                config = dataclasses.replace(config, scale=scale)
            out = functional.lsh_cross_attention(
                query,
                key,
                value,
                config,
                key_padding_mask=padding,
                dropout_p=dropout,
                seed=seed,
                backend=options.backend,
            )
        return out.reshape(batch, heads, *out.shape[2:])


def _sliding_window(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """The layer's sliding window in positions, its own included; None where it has none."""
    window = kwargs.get("sliding_window")
    return getattr(module, "sliding_window", None) if window is None else window


def _is_by_key(mask: Tensor) -> bool:
    """Whether a mask is (B, 1, 1, L_k) bool, which says of each key alone whether it is seen."""
    return mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1 and mask.dtype == torch.bool


def _why_full_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    by_key: bool,
    causal: bool,
    window: int | None,
    kwargs: dict[str, Any],
) -> str | None:
    """Why a long call cannot take LSH attention; None if it can."""
    if kwargs.get("position_bias") is not None:
        return "its layers add a position bias to the logits"
    if not by_key:
        return "its mask is not causal, a sliding window or padding alone"
    if kwargs.get("output_attentions"):
        return "attention weights are asked for"
    if query.shape[2] != key.shape[2] and (causal or window is not None):
        return f"{query.shape[2]} causal queries over {key.shape[2]} keys, which a cache holds"
    if max(query.shape[3], value.shape[3]) > MAX_HEAD_DIM:
        return f"heads of {query.shape[3]}, where LSH attention takes at most {MAX_HEAD_DIM}"
    return None


def _written_out(
    by_key: Tensor | None, query: Tensor, key: Tensor, causal: bool, window: int | None
) -> Tensor | None:
    """The mask (B or 1, 1, L_q, L_k), True = seen, that full attention needs where a mask by key stood."""
    if not causal and window is None:
        return by_key
    difference = torch.arange(query.shape[2], device=query.device)[:, None]
    difference = difference - torch.arange(key.shape[2], device=query.device)
    seen = difference >= 0 if causal else torch.ones_like(difference, dtype=torch.bool)
    if window is not None:
        seen &= difference.abs() < window
    return seen[None, None] if by_key is None else seen & by_key


def _full_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """What transformers' "sdpa" computes."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, weights = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
    )
    return out, weights
