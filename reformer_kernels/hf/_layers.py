"""The layers that `accelerate` puts in place of transformers' own. Imports transformers.

Each is a subclass that overrides `forward` alone. A layer is changed by giving it another class, so that its
parameters, buffers, hooks and attributes stay the same objects, it pickles and copies as before, and going
back leaves nothing behind.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers.models.reformer import modeling_reformer as peer

from reformer_kernels import _autocast, functional
from reformer_kernels._backend import resolve_backend
from reformer_kernels.config import LSHConfig, check_factors
from reformer_kernels.layout import Layout

BACKEND = "reformer_kernels_backend"
"""The one attribute that an accelerated layer has and the original has not."""


class AcceleratedLSHSelfAttention(peer.LSHSelfAttention):
    """transformers' `LSHSelfAttention` on our kernels; see `reformer_kernels.hf.accelerate`."""

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        call = _bind(peer.LSHSelfAttention, self, hidden_states, args, options)
        buckets, rounds = call["buckets"], call["num_hashes"]
        rounds = self.num_hashes if rounds is None else rounds
        if _needs_original(self, call, rounds) or (buckets is not None and buckets.dim() != 4):
            return super().forward(hidden_states, *args, **options)
        qk = self._split_hidden_size_dim(
            self.query_key(hidden_states), self.num_attention_heads, self.attention_head_size
        )
        v = self._split_hidden_size_dim(
            self.value(hidden_states), self.num_attention_heads, self.attention_head_size
        )
        B, H, L, _ = qk.shape
        if L <= self.chunk_length:
            rounds, order = 1, torch.arange(L, device=qk.device, dtype=torch.int32).expand(B, H, 1, L)
        else:
            if self.num_buckets is None:
                self._set_num_buckets(L)
            buckets, order = self._hash_and_sort(qk, buckets, rounds, call["attention_mask"])
            rounds = order.shape[2]
        ends = torch.tensor([0, L], device=qk.device, dtype=torch.int32).expand(B, H, rounds, 2)
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
            key_padding_mask=_padding(call["attention_mask"]),
            dropout_p=dropout_p,
            backend=getattr(self, BACKEND),
            return_lse=True,
        )
        return peer.LSHSelfAttentionOutput(_merge_heads(out), (), buckets)

    def _hash_and_sort(
        self, qk: Tensor, buckets: Tensor | None, rounds: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The original's bucket ids (B, H, R, L), each round's apart from the others', and their order.

        Given buckets are those of the forward pass, in the recomputation by the backward pass.
        """
        factors = check_factors(self.num_buckets)
        # The original's own test of whether padding has a bucket, for which every round then has room.
        padded = mask is not None and mask.sum().item() < mask.numel()
        n_buckets = math.prod(factors) + padded
        if buckets is not None:
            rounds = buckets.shape[2]
        offsets = n_buckets * torch.arange(rounds, device=qk.device)[:, None]
        if buckets is None:
            rotations = self._draw_rotations(qk, rounds, factors)
            ids = functional.lsh_hash(
                qk, rotations, factors, _padding(mask) if padded else None, getattr(self, BACKEND)
            )
            buckets = ids + offsets
        else:
            if self.training:
                # So that the random numbers after this are the forward pass's; the original forgets.
                self._draw_rotations(qk, rounds, factors)
            ids = (buckets - offsets).int()
        return buckets, functional.bucket_sort(ids, n_buckets, getattr(self, BACKEND))

    def _draw_rotations(self, qk: Tensor, rounds: int, factors: tuple[int, ...]) -> Tensor:
        """As the original draws them: from the global generator, seeded by `hash_seed` if there is one."""
        if self.hash_seed is not None:
            torch.manual_seed(self.hash_seed)
        shape = (qk.shape[1], qk.shape[3], rounds, sum(factors) // 2)
        rotations = torch.randn(shape, device=qk.device, dtype=qk.dtype)
        return rotations if qk.dtype == torch.float64 else rotations.float()


class AcceleratedLocalSelfAttention(peer.LocalSelfAttention):
    """transformers' `LocalSelfAttention` on our kernels; see `reformer_kernels.hf.accelerate`."""

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        call = _bind(peer.LocalSelfAttention, self, hidden_states, args, options)
        if _needs_original(self, call, rounds=1):
            return super().forward(hidden_states, *args, **options)
        q, k, v = (
            self._split_hidden_size_dim(
                project(hidden_states), self.num_attention_heads, self.attention_head_size
            )
            for project in (self.query, self.key, self.value)
        )
        out = functional.local_attention(
            q,
            k,
            v,
            chunk_length=self.chunk_length,
            chunks_before=self.num_chunks_before,
            chunks_after=self.num_chunks_after,
            causal=self.is_decoder is True,
            wrap=True,
            key_padding_mask=_padding(call["attention_mask"]),
            dropout_p=_dropout_p(self),
            backend=getattr(self, BACKEND),
        )
        return peer.LocalSelfAttentionOutput(_merge_heads(out), ())


ACCELERATED: dict[type[nn.Module], type[nn.Module]] = {
    peer.LSHSelfAttention: AcceleratedLSHSelfAttention,
    peer.LocalSelfAttention: AcceleratedLocalSelfAttention,
}

ORIGINAL = {ours: theirs for theirs, ours in ACCELERATED.items()}

_SIGNATURES = {theirs: inspect.signature(theirs.forward) for theirs in ACCELERATED}


def substitute(layer: nn.Module, backend: str) -> None:
    """An original or accelerated layer becomes an accelerated one."""
    setattr(layer, BACKEND, backend)
    layer.__class__ = ACCELERATED.get(type(layer), type(layer))


def withdraw(layer: nn.Module) -> None:
    """An accelerated layer becomes the original again."""
    layer.__class__ = ORIGINAL[type(layer)]
    delattr(layer, BACKEND)


def _bind(
    original: type[nn.Module],
    layer: nn.Module,
    hidden_states: Tensor,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The call's arguments by name, whatever their order in this version of transformers."""
    bound = _SIGNATURES[original].bind(layer, hidden_states, *args, **options)
    bound.apply_defaults()
    return bound.arguments


def _needs_original(layer: Any, call: dict[str, Any], rounds: int) -> bool:
    """Whether the call is one of those that `accelerate` leaves to the original, as its docstring lists."""
    x, mask = call["hidden_states"], call["attention_mask"]
    if call["output_attentions"] or call.get("head_mask") is not None:
        return True
    if _is_cached(layer, call["past_buckets_states"]):
        return True
    if torch.jit.is_tracing() or torch.compiler.is_exporting() or x.dim() != 3 or not x.numel():
        return True
    B, L, _ = x.shape
    if mask is not None and mask.shape != (B, L):
        return True
    if L > layer.chunk_length:
        chunks, rest = divmod(rounds * L, layer.chunk_length)
        if L % layer.chunk_length or max(layer.num_chunks_before, layer.num_chunks_after) > chunks:
            return True
    if layer.training and layer.dropout == 1:
        return True
    if getattr(layer, BACKEND) != "auto":
        return False
    dtype = x.dtype
    if _autocast.enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    return resolve_backend("auto", x.device, dtype) == "reference"


def _is_cached(layer: Any, past: Any) -> bool:
    """Whether past states hold this layer's; older versions hand over the layer's own pair."""
    if past is None:
        return False
    if isinstance(past, (tuple, list)):
        return past[1] is not None
    return len(past) > layer.layer_idx


def _padding(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else ~mask.to(torch.bool)


def _dropout_p(layer: Any) -> float:
    return layer.dropout if layer.training else 0.0


def _merge_heads(out: Tensor) -> Tensor:
    """(B, H, L, D) to (B, L, H * D)."""
    return out.transpose(1, 2).flatten(2)
