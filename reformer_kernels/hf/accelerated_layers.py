"""The attention layers by which `accelerate` replaces transformers' own. Imports transformers.

Each is a subclass that overrides only `forward`. A layer is changed by giving it another class: its
parameters, buffers, hooks and attributes stay the same objects, it pickles and copies as before, and undoing
it leaves nothing behind.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers.models.reformer import modeling_reformer as peer

from reformer_kernels import functional
from reformer_kernels._backend import resolve_backend
from reformer_kernels._checks import autocast_enabled
from reformer_kernels.config import LSHConfig, check_factors
from reformer_kernels.layout import Layout

BACKEND = "reformer_kernels_backend"
"""The only attribute that an accelerated layer has and the original does not."""

MASKED = -1e9
"""The bias of a masked key's logit."""

SEES_ITSELF = -5e4
"""A log-sum-exp below this means that the query sees only itself (whose logit is -1e5) and masked keys."""

SEES_NOTHING = MASKED / 2
"""A log-sum-exp below this means that the query sees only masked keys."""


class AcceleratedLSHSelfAttention(peer.LSHSelfAttention):
    """transformers' `LSHSelfAttention` on our kernels; see `reformer_kernels.hf.accelerate`."""

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        mask, buckets, rounds = (options.get(key) for key in ("attention_mask", "buckets", "num_hashes"))
        if buckets is not None and not buckets.numel():
            buckets = None  # the cache stores an empty tensor for a layer without buckets
        if buckets is not None:
            rounds = buckets.shape[2]  # those of the forward pass, which may differ from the layer's
        elif rounds is None:
            rounds = self.num_hashes
        if args or _needs_original(self, hidden_states, options, rounds):
            return super().forward(hidden_states, *args, **options)
        qk = self._split_hidden_size_dim(
            self.query_key(hidden_states), self.num_attention_heads, self.attention_head_size
        )
        v = self._split_hidden_size_dim(
            self.value(hidden_states), self.num_attention_heads, self.attention_head_size
        )
        B, H, length, _ = qk.shape
        if length <= self.chunk_length:
            rounds = 1
            order = torch.arange(length, device=qk.device, dtype=torch.int32).expand(B, H, 1, length)
        else:
            if self.num_buckets is None:
                self._set_num_buckets(length)
            buckets, order = self._hash_and_sort(qk, buckets, rounds, mask)
        ends = torch.tensor([0, length], device=qk.device, dtype=torch.int32).expand(B, H, rounds, 2)
        config = LSHConfig.trax(
            n_hashes=rounds,
            chunk_length=self.chunk_length,
            chunks_before=self.num_chunks_before,
            chunks_after=self.num_chunks_after,
            causal=self.is_decoder is True,
        )
        dropout_p = _dropout_p(self)
        out, lse = functional.attend(
            qk,
            v,
            Layout(order, ends),
            config,
            key_padding_mask=_key_bias(mask),
            dropout_p=dropout_p,
            backend=getattr(self, BACKEND),
            return_lse=True,
        )
        if mask is not None or dropout_p > 0:
            # A query that sees no other key gets its own value, which each round may drop.
            own = v * dropout(v.new_ones(B, H, rounds, length, 1), dropout_p).mean(2) if dropout_p > 0 else v
            out = torch.where(lse[..., None] < SEES_ITSELF, own, out)
        return peer.LSHSelfAttentionOutput(_merge_heads(out), (), buckets)

    def _hash_and_sort(
        self, qk: Tensor, buckets: Tensor | None, rounds: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The original's bucket ids (B, H, R, L), distinct between rounds, and the order of each round.

        `buckets` are given when the backward pass recomputes; they are those of the forward pass.
        """
        factors = check_factors(self.num_buckets)
        if buckets is None:
            rotations = self._draw_rotations(qk, rounds, factors)
            # As in the original, padding has a bucket of its own in every round if there is any padding.
            padded = mask is not None and mask.sum().item() < mask.numel()
            padding = ~mask.to(torch.bool) if padded and mask is not None else None
            ids = functional.lsh_hash(qk, rotations, factors, padding, getattr(self, BACKEND))
            n_buckets = math.prod(factors) + padded
            buckets = ids + n_buckets * torch.arange(rounds, device=qk.device)[:, None]
        else:
            if self.training:
                # Later random numbers are then those of the forward pass, which the original gets wrong.
                self._draw_rotations(qk, rounds, factors)
            ids = (buckets - buckets.amin(-1, keepdim=True)).int()
            n_buckets = int(ids.max()) + 1
        return buckets, functional.bucket_sort(ids, n_buckets, getattr(self, BACKEND))

    def _draw_rotations(self, qk: Tensor, rounds: int, factors: tuple[int, ...]) -> Tensor:
        """Draw as the original does: from the global generator, seeded with `hash_seed` if it is set."""
        if self.hash_seed is not None:
            torch.manual_seed(self.hash_seed)
        shape = (qk.shape[1], qk.shape[3], rounds, sum(factors) // 2)
        rotations = torch.randn(shape, device=qk.device, dtype=qk.dtype)
        return rotations if qk.dtype == torch.float64 else rotations.float()


class AcceleratedLocalSelfAttention(peer.LocalSelfAttention):
    """transformers' `LocalSelfAttention` on our kernels; see `reformer_kernels.hf.accelerate`."""

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        if args or _needs_original(self, hidden_states, options, rounds=1):
            return super().forward(hidden_states, *args, **options)
        q, k, v = (
            self._split_hidden_size_dim(
                project(hidden_states), self.num_attention_heads, self.attention_head_size
            )
            for project in (self.query, self.key, self.value)
        )
        mask = options.get("attention_mask")
        out, lse = functional.local_attention(
            q,
            k,
            v,
            chunk_length=self.chunk_length,
            chunks_before=self.num_chunks_before,
            chunks_after=self.num_chunks_after,
            causal=self.is_decoder is True,
            ring=True,
            key_padding_mask=_key_bias(mask),
            dropout_p=_dropout_p(self),
            backend=getattr(self, BACKEND),
            return_lse=True,
        )
        if mask is not None:
            out = torch.where(lse[..., None] < SEES_NOTHING, self._masked_window(v), out)
        return peer.LocalSelfAttentionOutput(_merge_heads(out), ())

    def _masked_window(self, v: Tensor) -> Tensor:
        """The output of a query that sees only padding: a weight times the values of its window.

        The weight is what the original's arithmetic makes of equal logits of -1e9 (-1e4 in float16): 1 in
        float32, where exp(logit - logsumexp) loses the number of keys, and 1 / keys in float64.
        """
        if v.shape[2] <= self.chunk_length:
            return self._masked_weight(v, v.shape[2]) * v.sum(2, keepdim=True)
        chunks = v.unflatten(2, (-1, self.chunk_length)).sum(3)
        neighbours = range(-self.num_chunks_after, self.num_chunks_before + 1)
        total = torch.stack([chunks.roll(shift, 2) for shift in neighbours]).sum(0)
        weight = self._masked_weight(v, self.chunk_length * len(neighbours))
        return (weight * total).repeat_interleave(self.chunk_length, 2)

    def _masked_weight(self, v: Tensor, keys: int) -> Tensor:
        masked = self.mask_value_float16 if v.dtype == torch.float16 else self.mask_value_float32
        logits = v.new_full((keys,), float(masked))
        return torch.exp(logits[:1] - torch.logsumexp(logits, -1, keepdim=True)).to(v.dtype)


ACCELERATED: dict[type[nn.Module], type[nn.Module]] = {
    peer.LSHSelfAttention: AcceleratedLSHSelfAttention,
    peer.LocalSelfAttention: AcceleratedLocalSelfAttention,
}

ORIGINAL = {ours: theirs for theirs, ours in ACCELERATED.items()}


def substitute(layer: nn.Module, backend: str) -> None:
    """Turn an original or accelerated layer into an accelerated one."""
    setattr(layer, BACKEND, backend)
    layer.__class__ = ACCELERATED.get(type(layer), type(layer))


def withdraw(layer: nn.Module) -> None:
    """Turn an accelerated layer back into the original."""
    layer.__class__ = ORIGINAL[type(layer)]
    delattr(layer, BACKEND)


def _needs_original(layer: Any, x: Tensor, options: dict[str, Any], rounds: int) -> bool:
    """Whether the original code runs this call; the docstring of `accelerate` lists the cases."""
    mask = options.get("attention_mask")
    if options.get("output_attentions") or options.get("head_mask") is not None:
        return True
    if _is_cached(layer, options.get("past_buckets_states")):
        return True
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or x.dim() != 3 or not x.numel():
        return True
    length = x.shape[1]
    if mask is not None and mask.shape != x.shape[:2]:
        return True
    if length > layer.chunk_length:
        chunks = rounds * length // layer.chunk_length
        if length % layer.chunk_length or max(layer.num_chunks_before, layer.num_chunks_after) > chunks:
            return True
    if layer.training and layer.dropout == 1:
        return True
    if getattr(layer, BACKEND) != "auto":
        return False
    dtype = x.dtype
    if autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return resolve_backend("auto", x.device, dtype) == "reference"


def _is_cached(layer: Any, past: Any) -> bool:
    """Whether `past` holds this layer's states; old versions of transformers pass the layer's own pair."""
    if past is None:
        return False
    if isinstance(past, (tuple, list)):
        return past[1] is not None
    return len(past) > layer.layer_idx


def _key_bias(mask: Tensor | None) -> Tensor | None:
    """The original's mask as a bias, finite so that queries at padding attend like any other."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask.to(torch.bool), MASKED)


def _dropout_p(layer: Any) -> float:
    return layer.dropout if layer.training else 0.0


def _merge_heads(out: Tensor) -> Tensor:
    """(B, H, L, D) to (B, L, H * D)."""
    return out.transpose(1, 2).flatten(2)
