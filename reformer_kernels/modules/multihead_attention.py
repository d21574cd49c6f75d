"""`MultiheadAttention`: `nn.MultiheadAttention` whose long sequences take LSH attention."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NoReturn, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels import _autocast, functional
from reformer_kernels._backend import Backend
from reformer_kernels._limits import MAX_HEAD_DIM
from reformer_kernels.config import LSHConfig, check_choice, check_flag, check_integer
from reformer_kernels.modules.attention import fresh_seed
from reformer_kernels.modules.attention_inputs import causal_mask, check_inputs, is_causal_mask
from reformer_kernels.reversible.recomputation import is_keeping, remember

Fallback = Literal["exact", "raise"]

FULL_ATTENTION_THRESHOLD = 512
"""Default `full_attention_threshold` of separate queries and keys: where LSH attention becomes the faster one
on a CPU, as `reformer-kernels bench mha` measures it."""

MAX_THRESHOLD = 2**31 - 1


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` for long sequences: full attention up to a threshold, LSH attention beyond.

    Constructor, `forward`, parameters, initialisation and state dict are those of `nn.MultiheadAttention`;
    the keyword arguments from `config` on are added.

    With L_q * L_k at most full_attention_threshold², it computes what `nn.MultiheadAttention` computes.
    Beyond, it computes LSH attention in O(L log L), with the same projections:

    - `shared_qk=False`: queries and keys are hashed and sorted apart (`functional.lsh_cross_attention`), with
      the scale of ordinary attention, so that weights trained with full attention serve. Self- and
      cross-attention alike. A module whose window covers all keys computes full attention.
    - `shared_qk=True`: self-attention (`query is key`) as in the paper, where the queries' projection serves
      as keys (`functional.lsh_attention`). The keys' rows of the projection are then not used, so this is
      another function than full attention with these weights: a threshold of 0 and fallback "raise" are
      its defaults, so that one module computes one function at all lengths. Cross-attention has no shared
      form; it takes separate queries and keys.

    Beyond the threshold, LSH attention cannot give: attention weights (`need_weights=True`, the default of
    `nn.MultiheadAttention`; torch's Transformer layers pass False), an `attn_mask` other than the causal one,
    a `key_padding_mask` that requires grad, heads of more than 256. Such a call computes full attention with
    `fallback="exact"` and raises with `fallback="raise"`; nothing is ignored. The causal mask (True or -inf
    exactly where key j comes after query i) is recognised by reading it, whatever `is_causal` says.
    `is_causal=True` without a mask is accepted at every length and means that mask, so that long sequences
    need no L × L tensor. `key_padding_mask` may be bool or any float bias of keys. The extra keys of
    `add_bias_kv` and `add_zero_attn` are seen by every query.

    In training each call draws new rotations (and dropout) from torch's global CPU generator, so that
    `torch.manual_seed` reproduces a run; in evaluation the rotations follow from `seed` alone.

    torch's `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` run this module in evaluation too, and
    never read its weights past it. Nested tensors (padded inside; strided layout) work wherever
    `nn.MultiheadAttention` takes them, and in training. TorchScript cannot compile it; torch.compile can, but
    an attn_mask beyond the threshold breaks the graph there: pass `is_causal=True` alone.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
            dtype: as in `nn.MultiheadAttention`.
        config: how to hash and attend. Its `causal` must be False: each call says whether it is causal.
            Separate queries and keys do not read all of it, see `functional.lsh_cross_attention`.
        full_attention_threshold: up to which length full attention is computed; None: 512, or 0 if
            shared_qk.
        shared_qk: see above.
        seed: of the rotations in evaluation mode.
        backend: of LSH attention: "auto", "reference", "native" or "triton".
        fallback: "exact", "raise", or None: "raise" if shared_qk, else "exact".

    Raises:
        ValueError: options out of range; shared_qk with add_bias_kv or add_zero_attn.
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
    def adopt(cls, module: nn.MultiheadAttention, options: dict[str, Any]) -> None:
        """Turns `module` into one of this class: the same object, parameters, hooks and mode.

        `options` as from `checked_options`. Raises ValueError, and changes nothing, for `why_not_adopted`.
        """
        reason = why_not_adopted(module, options)
        if reason is not None:
            raise ValueError(f"this nn.MultiheadAttention cannot be replaced: {reason}")
        module.__class__ = cls
        assert isinstance(module, cls)
        module._configure(options)

    def _configure(self, options: dict[str, Any]) -> None:
        reason = _why_unsuited(self, options)
        if reason is not None:
            raise ValueError(reason)
        for name, value in options.items():
            setattr(self, name, value)
        # torch's encoder layers, in evaluation, hand the weights of an attention module for which this is
        # True to a fused kernel and never call the module. Its meaning, that the three inputs are of one
        # size and their projections packed, is read from `in_proj_weight` here.
        self._qkv_same_embed_dim = False

    @property
    def config(self) -> LSHConfig:
        return self._configs[0]

    @config.setter
    def config(self, config: LSHConfig) -> None:
        _check_config(config)
        # Both made here: torch.compile of older versions cannot make them in a call.
        self._configs = config, dataclasses.replace(config, causal=True)

    def merge_masks(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: torch's encoder layers call it only to run a fused kernel of theirs, not this module."""
        raise RuntimeError(
            "torch was about to compute full attention past reformer_kernels.MultiheadAttention; "
            "call torch.backends.mha.set_fastpath_enabled(False)"
        )

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            "reformer_kernels.MultiheadAttention cannot be compiled by TorchScript; use torch.compile, "
            "or nn.MultiheadAttention, which loads the same state dict"
        )

    def _reset_parameters(self) -> None:
        held = self._qkv_same_embed_dim
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = held

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
            key: the same with its own length S and `kdim`.
            value: the same with key's length and `vdim`.
            key_padding_mask: (N, S), or (S) if unbatched: bool, True = padding, or float, added to logits.
            need_weights: whether to return the attention weights, which takes full attention.
            attn_mask: (L, S) or (N * num_heads, L, S): bool, True = not seen, or float, added to the logits.
            average_attn_weights: whether weights are averaged over the heads.
            is_causal: a hint that attn_mask is the causal mask; without attn_mask, the mask itself.

        Returns:
            The output in query's form, and the weights: None where they are not asked for.

        Raises:
            ValueError, TypeError: wrong shapes and dtypes (up to the threshold, torch's own errors).
            RuntimeError: full attention would be needed beyond the threshold, with `fallback="raise"`.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            masks = key_padding_mask, attn_mask
            return self._forward_nested(
                query, key, value, masks, need_weights, average_attn_weights, is_causal
            )
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
        if self.fallback == "raise":
            raise RuntimeError(
                f"this call needs full attention: {reason}. Query {tuple(query.shape)} and key "
                f"{tuple(key.shape)} are above full_attention_threshold {self.full_attention_threshold}, "
                "where fallback='raise' forbids it; fallback='exact' allows it"
            )
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
        """What `nn.MultiheadAttention` computes."""
        swap = self.batch_first and query.dim() == 3
        if is_causal and attn_mask is None:
            axis = 1 if swap else 0
            attn_mask = causal_mask(query.shape[axis], key.shape[axis], query.device)
            # With the hint, torch would hide the extra keys from the first queries.
            is_causal = self.bias_k is None and not self.add_zero_attn
        if need_weights and self._torch_may_fuse():
            view = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
            view.__dict__.update(self.__dict__, _qkv_same_embed_dim=True)
            return nn.MultiheadAttention.forward(
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
            # What was one tensor stays one: then torch projects it once.
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
        """Whether torch's own forward can run on these parameters, for its fused kernels in evaluation.

        Without weights the functional form is the faster one.
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
        seed = fresh_seed() if self.training else self.seed
        hashed = (q,) if k is None else (q, k)
        common: dict[str, Any] = {"seed": seed, "key_padding_mask": key_padding_mask, "backend": self.backend}
        attend: Any = functional.lsh_attention if k is None else functional.lsh_cross_attention
        if is_keeping():
            choose: Any = functional.lsh_layout if k is None else functional.lsh_cross_layout
            layout = remember(functools.partial(choose, *(x.detach() for x in hashed), config, **common))
            common["layout"] = layout
        out = attend(*hashed, v, config, dropout_p=dropout_p, return_lse=extra_keys, **common)
        if extra_keys:
            out = self._with_extra_keys(q, *out)
        merged = (
            out.transpose(1, 2).flatten(2)
            if self.batch_first or not batched
            else out.permute(2, 0, 1, 3).flatten(2)
        )
        return F.linear(merged if batched else merged[0], self.out_proj.weight, self.out_proj.bias)

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, shared: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Queries, keys (None if queries serve as keys) and values as (N, H, length, D) views."""
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

    def _with_extra_keys(self, q: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """LSH attention's `out` and `lse` merged with the keys of add_bias_kv and add_zero_attn, exactly.

        out' = exp(lse - z) out + sum_x exp(s_x - z) v_x, s_x = q . k_x / sqrt(D), z = logsumexp(lse, s).
        """
        shape = (self.num_heads, 1, self.head_dim)
        keys, values = [], []
        if self.bias_k is not None and self.bias_v is not None:
            keys.append(self.bias_k.view(shape))
            values.append(self.bias_v.view(shape))
        if self.add_zero_attn:
            keys.append(q.new_zeros(shape))
            values.append(q.new_zeros(shape))
        with _autocast.suspended(q.device.type):
            k, v = (torch.cat([part.to(lse.dtype) for part in parts], dim=1) for parts in (keys, values))
            logits = q.to(lse.dtype) @ k.transpose(1, 2) * self.head_dim**-0.5  # [N, H, L, X]
            total = torch.logaddexp(lse, logits.logsumexp(-1))[..., None]
            p = F.dropout((logits - total).exp(), self.dropout, self.training)
            merged = (lse[..., None] - total).exp() * out.to(lse.dtype) + p @ v
        return merged.to(out.dtype)

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
        if query is not key or key is not value or masks != (None, None) or not self.batch_first:
            raise ValueError(
                "nested tensors are taken for self-attention (query, key and value one tensor), with "
                "batch_first=True and without masks; else pad them and pass key_padding_mask"
            )
        if query.layout != torch.strided:
            raise ValueError(
                f"nested tensors must have the strided layout, got {query.layout}; pad them with "
                "torch.nested.to_padded_tensor and pass key_padding_mask"
            )
        lengths = [row.shape[0] for row in query.unbind()]
        x = torch.nested.to_padded_tensor(query, 0.0)
        places = torch.arange(x.shape[1], device=x.device)
        padding = places >= torch.tensor(lengths, device=x.device)[:, None]
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


OPTION_NAMES = ("full_attention_threshold", "shared_qk", "seed", "backend", "fallback", "config")


def _check_config(config: LSHConfig) -> None:
    if not isinstance(config, LSHConfig):
        raise TypeError(f"config must be an LSHConfig, got {type(config).__name__}")
    if config.causal:
        raise ValueError(
            "config.causal must be False: as in nn.MultiheadAttention, each call says whether it is causal, "
            "by is_causal=True or attn_mask"
        )


def checked_options(
    config: LSHConfig,
    full_attention_threshold: int | None,
    shared_qk: bool,
    seed: int,
    backend: str,
    fallback: Fallback | None,
) -> dict[str, Any]:
    """The options of `MultiheadAttention`, checked and complete, by attribute name."""
    _check_config(config)
    check_flag("shared_qk", shared_qk)
    if full_attention_threshold is None:
        full_attention_threshold = 0 if shared_qk else FULL_ATTENTION_THRESHOLD
    check_integer("full_attention_threshold", full_attention_threshold, 0, MAX_THRESHOLD)
    check_integer("seed", seed, -(2**63), 2**64 - 1)
    check_choice("backend", backend, get_args(Backend))
    if fallback is None:
        fallback = "raise" if shared_qk else "exact"
    check_choice("fallback", fallback, get_args(Fallback))
    values = (full_attention_threshold, shared_qk, seed, backend, fallback, config)
    return dict(zip(OPTION_NAMES, values, strict=True))


def _why_unsuited(module: nn.MultiheadAttention, options: dict[str, Any]) -> str | None:
    if options["shared_qk"] and (module.bias_k is not None or module.add_zero_attn):
        return "shared_qk has no form of add_bias_kv and add_zero_attn; use shared_qk=False"
    return None


def why_not_adopted(module: nn.MultiheadAttention, options: dict[str, Any]) -> str | None:
    """Why `MultiheadAttention.adopt` would not take `module`; None if it would."""
    if isinstance(module, MultiheadAttention):
        return "already a reformer_kernels.MultiheadAttention"
    if type(module) is not nn.MultiheadAttention:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"a subclass, {kind}, which may compute something else"
    if "forward" in vars(module):
        return "its forward was replaced on the object"
    if module.head_dim > MAX_HEAD_DIM:
        return f"LSH attention takes heads of at most {MAX_HEAD_DIM}, not {module.head_dim}"
    return _why_unsuited(module, options)
