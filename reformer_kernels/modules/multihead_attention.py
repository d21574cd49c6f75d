"""`MultiheadAttention`: `nn.MultiheadAttention` whose long sequences take LSH attention."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels import functional
from reformer_kernels._limits import MAX_HEAD_DIM
from reformer_kernels._random import resolve_seed
from reformer_kernels.config import LSHConfig
from reformer_kernels.modules.attention_masks import causal_mask, check_causal_hint, is_causal_mask
from reformer_kernels.modules.checks import refuse_tracing
from reformer_kernels.modules.extra_keys import merge_extra_keys
from reformer_kernels.modules.multihead_arguments import (
    Fallback,
    MultiheadOptions,
    TorchMultiheadAttention,
    check_inputs,
    check_nested,
    check_not_causal,
    checked_options,
    refuse_or_warn,
)
from reformer_kernels.reversible.remembered_values import is_remembering, remember

OPTION_NAMES = tuple(field.name for field in dataclasses.fields(MultiheadOptions))


def call_the_module(module: nn.Module, args: Any) -> None:
    """A forward hook that does nothing but be there.

    In evaluation torch's encoder layers hand an attention module's weights to a fused kernel and never call
    the module, unless it has a hook.
    """


class MultiheadAttention(TorchMultiheadAttention):
    """`nn.MultiheadAttention` for long sequences: full attention up to a threshold, LSH attention beyond.

    Constructor, `forward`, parameters, initialisation and state dict are those of `nn.MultiheadAttention`;
    the keyword arguments from `config` on are added.

    Where L_q * L_k is at most full_attention_threshold², the result is that of `nn.MultiheadAttention`.
    Beyond, it is LSH attention in O(L log L) with the same projections:

    - `shared_qk=False`: queries and keys are hashed and sorted apart (`functional.lsh_cross_attention`), by
      default with the scale of ordinary attention, so weights trained with full attention can be used. This
      serves self- and cross-attention alike. If the window covers all keys, the result is full attention.
    - `shared_qk=True`: in self-attention (`query is key`) the queries' projection also gives the keys, as in
      the paper (`functional.lsh_attention`). The keys' rows of the projection are then unused, so full
      attention with these weights would be another function. The defaults are therefore a threshold of 0 and
      fallback "raise", so that a module computes one function at all lengths. Cross-attention has no shared
      form and uses separate queries and keys.

    Beyond the threshold, LSH attention has no attention weights (`need_weights=True`, the default of
    `nn.MultiheadAttention`; torch's Transformer layers pass False), and takes no `attn_mask` other than the
    causal one, no `key_padding_mask` that requires a gradient, and no heads of more than 256. A call with one
    of these computes full attention with `fallback="exact"`, and warns once for each of these reasons but the
    weights; it raises with `fallback="raise"`. The causal mask (True, -inf, -1e9 or the dtype's smallest
    number exactly where key j comes after query i) is recognised by reading it. `is_causal=True` beside
    another mask raises at every length, except in compiled calls, which do not check it. `is_causal=True`
    without a mask is accepted at every length and means the causal mask, so long sequences need no L × L
    tensor. `key_padding_mask` may be bool, or float: a bias of each key. Every query sees the extra keys of
    `add_bias_kv` and `add_zero_attn`.

    In training each call draws new rotations (and dropout) from torch's global CPU generator, so
    `torch.manual_seed` reproduces a run; in evaluation the rotations follow from `seed` alone.

    torch's `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` call this module in evaluation too, where
    they would otherwise read an attention module's weights and skip it. Nested tensors of strided layout are
    padded inside, and work in training as well. TorchScript cannot compile this module. torch.compile can,
    but an `attn_mask` beyond the threshold breaks the graph: pass `is_causal=True` alone.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
            dtype: as in `nn.MultiheadAttention`.
        config: how to hash and attend. Its `causal` must be False: each call says whether it is causal.
            Separate queries and keys use a part of it, see `functional.lsh_cross_attention`. Full attention
            always has the scale of `nn.MultiheadAttention`, whatever `config.scale` says.
        full_attention_threshold: the length up to which full attention is computed; None means 512, or 0 with
            shared_qk.
        shared_qk: see above.
        seed: the seed of the rotations in evaluation.
        backend: the back end of LSH attention: "auto", "reference", "native" or "triton".
        fallback: "exact" or "raise", see above; None means "raise" with shared_qk, else "exact".

    Raises:
        ValueError: options are out of range, or shared_qk is given with add_bias_kv or add_zero_attn.
        TypeError: config is not an LSHConfig.

    >>> attention = MultiheadAttention(64, 4, batch_first=True, full_attention_threshold=256)
    >>> x = torch.zeros(1, 1000, 64)
    >>> attention(x, x, x, need_weights=False, is_causal=True)[0].shape
    torch.Size([1, 1000, 64])
    """

    full_attention_threshold: int
    shared_qk: bool
    seed: int
    backend: str
    fallback: Fallback

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: LSHConfig = LSHConfig(),  # noqa: B008  (frozen, so one shared default is safe)
        full_attention_threshold: int | None = None,
        shared_qk: bool = False,
        seed: int = 0,
        backend: str = "auto",
        fallback: Fallback | None = None,
    ) -> None:
        options = checked_options(config, full_attention_threshold, shared_qk, seed, backend, fallback)
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self._configure(options)

    @classmethod
    def adopt(cls, module: TorchMultiheadAttention, options: MultiheadOptions) -> None:
        """Turns `module` into one of this class; object, parameters, hooks and mode stay the same.

        Raises ValueError, and changes nothing, if `why_not_adopted` gives a reason.
        """
        reason = cls.why_not_adopted(module, options)
        if reason is not None:
            raise ValueError(f"this nn.MultiheadAttention cannot be replaced: {reason}")
        module.__class__ = cls
        assert isinstance(module, cls)
        module._configure(options)

    @staticmethod
    def why_not_adopted(module: TorchMultiheadAttention, options: MultiheadOptions) -> str | None:
        """Why `adopt` would refuse `module`; None if it would not."""
        if isinstance(module, MultiheadAttention):
            return "already a reformer_kernels.MultiheadAttention"
        if type(module) is not TorchMultiheadAttention:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            return f"a subclass, {kind}, which may compute something else"
        if "forward" in vars(module):
            return "its forward was replaced on the object"
        if module.head_dim > MAX_HEAD_DIM:
            return f"LSH attention takes heads of at most {MAX_HEAD_DIM}, not {module.head_dim}"
        return options.why_unsuited(module)

    def _configure(self, options: MultiheadOptions) -> None:
        reason = options.why_unsuited(self)
        if reason is not None:
            raise ValueError(reason)
        for name in OPTION_NAMES:
            setattr(self, name, getattr(options, name))
        if call_the_module not in self._forward_pre_hooks.values():
            self.register_forward_pre_hook(call_the_module)

    @property
    def config(self) -> LSHConfig:
        return self._configs[0]

    @config.setter
    def config(self, config: LSHConfig) -> None:
        check_not_causal(config)
        # Both are made here, as torch.compile of older versions cannot make them in a call.
        self._configs = config, dataclasses.replace(config, causal=True)

    def merge_masks(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises RuntimeError: torch calls this only to run a fused kernel instead of this module."""
        raise RuntimeError(
            "torch was about to compute full attention past reformer_kernels.MultiheadAttention; "
            "call torch.backends.mha.set_fastpath_enabled(False)"
        )

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "reformer_kernels.MultiheadAttention cannot be compiled by TorchScript; use torch.compile, "
            "or nn.MultiheadAttention, which loads the same state dict"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are those of `nn.MultiheadAttention.forward`.

        Args:
            query: (L, E), (L, N, E), or (N, L, E) with batch_first.
            key: the same form with its own length S and size `kdim`.
            value: the same form with key's length and size `vdim`.
            key_padding_mask: (N, S), or (S) if unbatched; bool, True = padding, or float, a bias of logits.
            need_weights: whether to return the attention weights, which requires full attention.
            attn_mask: (L, S) or (N * num_heads, L, S); bool, True = not seen, or float, a bias of logits.
            average_attn_weights: whether the weights are averaged over the heads.
            is_causal: a hint that attn_mask is the causal mask; without attn_mask it means that mask.

        Returns:
            The output in query's form, and the weights (None where they are not asked for): (N, L, S), or
            (N, num_heads, L, S) if not averaged.

        Raises:
            ValueError, TypeError: shapes, dtypes or is_causal do not fit (to the threshold, torch's errors).
            RuntimeError: full attention is needed beyond the threshold, where `fallback="raise"` forbids it.
        """
        refuse_tracing("reformer_kernels.MultiheadAttention")
        if query.is_nested or key.is_nested or value.is_nested:
            masks = key_padding_mask, attn_mask
            return self._forward_nested(
                query, key, value, masks, need_weights, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is not None:
            check_causal_hint(attn_mask)
        if self._is_short(query, key):
            return self._full_attention(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        sizes = (self.embed_dim, self.kdim, self.vdim)
        check_inputs(query, key, value, key_padding_mask, attn_mask, sizes, self.num_heads, self.batch_first)
        causal = is_causal
        if attn_mask is not None:
            causal = not need_weights and is_causal_mask(attn_mask)
        reason = self._why_full_attention(need_weights, key_padding_mask, attn_mask, causal)
        if reason is None:
            return self._lsh_attention(query, key, value, key_padding_mask, causal), None
        refuse_or_warn(reason, self.fallback, query, key, self.full_attention_threshold, quiet=need_weights)
        return self._full_attention(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, causal
        )

    def _is_short(self, query: Tensor, key: Tensor) -> bool:
        if query.dim() not in (2, 3) or key.dim() != query.dim():
            return True  # torch says what is wrong
        axis = 1 if self.batch_first and query.dim() == 3 else 0
        return query.shape[axis] * key.shape[axis] <= self.full_attention_threshold**2

    def _why_full_attention(
        self, need_weights: bool, key_padding_mask: Tensor | None, attn_mask: Tensor | None, causal: bool
    ) -> str | None:
        if need_weights:
            return "attention weights are asked for (pass need_weights=False)"
        if attn_mask is not None and not causal:
            return "attn_mask is not the causal mask"
        if key_padding_mask is not None and key_padding_mask.requires_grad and torch.is_grad_enabled():
            return "key_padding_mask requires grad"
        if self.head_dim > MAX_HEAD_DIM:
            return f"heads of {self.head_dim}, where LSH attention takes at most {MAX_HEAD_DIM}"
        return None

    def _full_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The result of `nn.MultiheadAttention`."""
        swap = self.batch_first and query.dim() == 3
        if is_causal and attn_mask is None:
            axis = 1 if swap else 0
            attn_mask = causal_mask(query.shape[axis], key.shape[axis], query.device)
            # With the hint, torch would hide the extra keys of add_bias_kv from the first queries.
            is_causal = self.bias_k is None and not self.add_zero_attn
        if need_weights and self._torch_may_fuse():
            view = TorchMultiheadAttention.__new__(TorchMultiheadAttention)
            view.__dict__.update(self.__dict__)
            return TorchMultiheadAttention.forward(
                view,
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if swap:
            # Inputs that are one tensor stay one, so that torch projects it once.
            same_key, same_value = key is query, value is key
            query = query.transpose(0, 1)
            key = query if same_key else key.transpose(0, 1)
            value = key if same_value else value.transpose(0, 1)
        out, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=self.in_proj_weight is None,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return out.transpose(0, 1) if swap else out, weights

    def _torch_may_fuse(self) -> bool:
        """Whether torch's own `forward` can run on these parameters, and so reach its kernels for evaluation.

        Used where attention weights are asked for; without them the functional form is the faster one.
        """
        packed = self._parameters.get("in_proj_weight") is not None
        return packed and not self.training and not torch.compiler.is_compiling()

    def _lsh_attention(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, causal: bool
    ) -> Tensor:
        batched = query.dim() == 3
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]
        shared = self.shared_qk and query is key
        q, k, v = self._project(query, key, value, shared)
        config = self._configs[causal]
        extra_keys = self.bias_k is not None or self.add_zero_attn
        dropout_p = self.dropout if self.training else 0.0
        seed = resolve_seed(None, q.device) if self.training else self.seed
        hashed = (q,) if k is None else (q, k)
        common: dict[str, Any] = {"seed": seed, "key_padding_mask": key_padding_mask, "backend": self.backend}
        attend: Any = functional.lsh_attention if k is None else functional.lsh_cross_attention
        if is_remembering():
            make_layout: Any = functional.lsh_layout if k is None else functional.lsh_cross_layout
            detached = (x.detach() for x in hashed)
            common["layout"] = remember(functools.partial(make_layout, *detached, config, **common))
        out = attend(*hashed, v, config, dropout_p=dropout_p, return_lse=extra_keys, **common)
        if extra_keys:
            out, lse = out
            k, v = self._extra_keys(q)
            scale = config.logit_scale(self.head_dim, shared_qk=False)
            out = merge_extra_keys(out, lse, q, k, v, scale, dropout_p)
        merged = (
            out.transpose(1, 2).flatten(2)
            if self.batch_first or not batched
            else out.permute(2, 0, 1, 3).flatten(2)
        )
        return F.linear(merged if batched else merged[0], self.out_proj.weight, self.out_proj.bias)

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, shared: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Queries, keys (None if the queries serve as keys) and values, as views (N, H, length, D)."""
        k: Tensor | None = None
        if self.in_proj_weight is not None and query is key and key is value and not shared:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            if self.in_proj_weight is not None:
                weights = self.in_proj_weight.chunk(3)
            else:
                weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q, v = F.linear(query, weights[0], biases[0]), F.linear(value, weights[2], biases[2])
            if not shared:
                k = F.linear(key, weights[1], biases[1])
        return self._split_heads(q), None if k is None else self._split_heads(k), self._split_heads(v)

    def _split_heads(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _extra_keys(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The keys of add_bias_kv and add_zero_attn and their values, (H, 1 or 2, D)."""
        shape = (self.num_heads, 1, self.head_dim)
        keys, values = [], []
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.view(shape))
            values.append(self.bias_v.view(shape))
        if self.add_zero_attn:
            keys.append(q.new_zeros(shape))
            values.append(q.new_zeros(shape))
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masks: tuple[Tensor | None, Tensor | None],
        need_weights: bool,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        check_nested(query, key, value, masks, self.batch_first)
        lengths = [row.shape[0] for row in query.unbind()]
        x = torch.nested.to_padded_tensor(query, 0.0)
        positions = torch.arange(x.shape[1], device=x.device)
        padding = positions >= torch.tensor(lengths, device=x.device)[:, None]
        out, weights = self.forward(
            x, x, x, padding, need_weights, None, average_attn_weights, is_causal=is_causal
        )
        rows = [row[:length] for row, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(rows), weights

    def extra_repr(self) -> str:
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}"]
        if self.batch_first:
            parts.append("batch_first=True")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        parts += [f"{name}={getattr(self, name)!r}" for name in OPTION_NAMES]
        return ", ".join(parts)
