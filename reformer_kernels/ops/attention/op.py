"""The operators of attention over sorted orders: arguments, schema, fake kernels, gradient, back ends.

`torch.ops.reformer_kernels.native_attention` and `triton_attention` take `Arguments` and return out
(B, H, L, D_v) in q's dtype and the log-sum-exp (B, H, L) in float32, both differentiable. `Arguments` is the
one place that lists what they take: the schema, the checks, the fake kernels and the calls derive from it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from reformer_kernels._checks import refuse_transforms
from reformer_kernels._limits import MAX_HEAD_DIM
from reformer_kernels.call import AttentionCall, is_padding
from reformer_kernels.config import KEY_NORMS, MAX_CHUNK_LENGTH, MAX_NEIGHBOURS, MAX_SCALE
from reformer_kernels.layout import Layout
from reformer_kernels.ops.attention import native, reference
from reformer_kernels.rule import AttentionRule

LARGEST_KEY_BIAS = 2.0**120
"""Finite biases of keys are cut to this, far beyond any logit, so that none overflows in other units."""


_MAX_WINDOW = 4 * MAX_CHUNK_LENGTH * MAX_NEIGHBOURS
_BOUNDS = {
    "chunk_length": (1, MAX_CHUNK_LENGTH),
    "chunks_before": (0, MAX_NEIGHBOURS),
    "chunks_after": (0, MAX_NEIGHBOURS),
    "window_before": (0, _MAX_WINDOW),
    "window_after": (0, _MAX_WINDOW),
    "key_norm": (0, len(KEY_NORMS) - 1),
}
"""What a rule may hold, far inside 64-bit integers when the kernels multiply."""


class Arguments(NamedTuple):
    """Attention of queries over sorted orders, as the operators take it.

    Attributes:
        q: (B, H, L, D). v: (B, H, L_k, D_v).
        k: (B, H, L_k, D), or None for shared query-keys, whose keys are q normalised by rule.key_norm.
        order, bucket_starts: (B, H, R, L) and (B, H, R, S) int32, the queries' `Layout`.
        key_bias: (B, L_k) float32 (float64 in the reference) that is added to the logits, -inf for padding.
        seed: an int64 tensor of one element, read where dropout_p is not 0.
        rule, scale, dropout_p: see `AttentionRule` and `AttentionCall`.
        key_order, key_bucket_starts: (B, H, R, L_k) and (B, H, R, S) int32, the keys' `Layout` where keys are
            sorted apart from the queries. Otherwise None, and L_k = L.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor
    order: Tensor
    bucket_starts: Tensor
    key_bias: Tensor | None
    seed: Tensor | None
    rule: AttentionRule
    scale: float
    dropout_p: float
    key_order: Tensor | None = None
    key_bucket_starts: Tensor | None = None

    @classmethod
    def of(cls, *flat: Any) -> Arguments:
        """The arguments that an operator received, checked, as kernels read them.

        The rule arrives as a list of integers. Raises ValueError or TypeError, see `check`.
        """
        place = cls._fields.index("rule")
        rule = flat[place]
        if len(rule) != len(AttentionRule._fields):
            raise ValueError(
                f"rule must be an AttentionRule, {len(AttentionRule._fields)} integers, got {rule}"
            )
        values: list[Any] = list(flat)
        values[place] = AttentionRule(*rule)
        arguments = cls(*values)
        arguments.check()
        return arguments.with_contiguous_rows()

    @property
    def separate(self) -> bool:
        """Whether keys are sorted apart from the queries."""
        return self.key_order is not None

    def with_contiguous_rows(self) -> Arguments:
        """The same values as kernels read them: contiguous rows, the rest contiguous throughout."""
        return Arguments(
            contiguous_rows(self.q),
            None if self.k is None else contiguous_rows(self.k),
            contiguous_rows(self.v),
            self.order.contiguous(),
            self.bucket_starts.contiguous(),
            None if self.key_bias is None else self.key_bias.contiguous(),
            self.seed,
            self.rule,
            self.scale,
            self.dropout_p,
            None if self.key_order is None else self.key_order.contiguous(),
            None if self.key_bucket_starts is None else self.key_bucket_starts.contiguous(),
        )

    def check(self) -> None:
        """Raises ValueError or TypeError unless all that decides which addresses a kernel uses holds.

        The public functions check the same for people; this is for whoever calls an operator directly.
        """
        for name in ("q", "v", "order", "bucket_starts"):
            x = getattr(self, name)
            if x.dim() != 4:
                raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(x.shape)}")
        for name in ("q", "v"):
            width = getattr(self, name).size(-1)
            if not 1 <= width <= MAX_HEAD_DIM:
                raise ValueError(f"{name}'s last dimension must be in 1..{MAX_HEAD_DIM}, got {width}")
        if self.q.size(2) < 1 or self.v.size(2) < 1:
            raise ValueError(
                f"q and v must have at least one token, got shapes {tuple(self.q.shape)} and "
                f"{tuple(self.v.shape)}"
            )
        if self.order.size(2) < 1 or self.bucket_starts.size(3) < 2:
            raise ValueError(
                "order must have at least one round, and bucket_starts at least two entries, got shapes "
                f"{tuple(self.order.shape)} and {tuple(self.bucket_starts.shape)}"
            )
        if self.separate != (self.key_bucket_starts is not None) or (self.separate and self.k is None):
            raise ValueError("key_order, key_bucket_starts and k come together where keys are sorted apart")
        for name, (low, high) in _BOUNDS.items():
            if not low <= getattr(self.rule, name) <= high:
                raise ValueError(f"rule.{name} must be in {low}..{high}, got {getattr(self.rule, name)}")
        if self.separate and (not self.rule.rank_window or self.rule.ring or self.rule.exclude_self):
            raise ValueError(
                "a rule for keys sorted apart must have rank_window, no ring and no exclude_self, "
                f"got {self.rule}"
            )
        if not abs(self.scale) <= MAX_SCALE or not 0 <= self.dropout_p < 1:
            raise ValueError(
                f"scale must be finite, within +-2**127, and dropout_p in [0, 1), got scale {self.scale} and "
                f"dropout_p {self.dropout_p}"
            )
        if self.dropout_p > 0 and (
            self.seed is None or self.seed.dtype != torch.int64 or self.seed.numel() != 1
        ):
            raise ValueError("dropout needs a seed, an int64 tensor of one element")

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and dtype that each tensor must have, given q's, for arguments that passed `check`."""
        batch, heads, length, dim = self.q.shape
        keys = self.v.size(2) if self.separate else length
        rounds, starts = self.order.size(2), self.bucket_starts.size(3)
        return {
            "q": ((batch, heads, length, dim), self.q.dtype),
            "k": ((batch, heads, keys, dim), self.q.dtype),
            "v": ((batch, heads, keys, self.v.size(3)), self.q.dtype),
            "order": ((batch, heads, rounds, length), torch.int32),
            "bucket_starts": ((batch, heads, rounds, starts), torch.int32),
            "key_bias": ((batch, keys), torch.float32),
            "key_order": ((batch, heads, rounds, keys), torch.int32),
            "key_bucket_starts": ((batch, heads, rounds, starts), torch.int32),
        }

    def empty_out(self) -> Tensor:
        """Uninitialised memory for the result (B, H, L, D_v), laid out as v is, its rows contiguous."""
        if not self.separate:
            return empty_rows_like(self.v)
        batch, heads, length = self.q.shape[:3]
        if self.v.stride(1) < self.v.stride(2):  # heads lie inside rows
            return self.v.new_empty((batch, length, heads, self.v.size(3))).transpose(1, 2)
        return self.v.new_empty((batch, heads, length, self.v.size(3)))

    def empty_lse(self) -> Tensor:
        """Uninitialised memory for the log-sum-exp (B, H, L), float32."""
        return torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device)

    def empty_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Uninitialised memory for the gradients of q, k and v; k's is empty for shared query-keys."""
        grad_k = self.q.new_empty(0) if self.k is None else empty_rows_like(self.k)
        return empty_rows_like(self.q), grad_k, empty_rows_like(self.v)


_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", AttentionRule: "int[]", float: "float"}

SCHEMA = ", ".join(
    f"{_SCHEMA_TYPES[kind]} {name}" + ("=None" if name in Arguments._field_defaults else "")
    for name, kind in get_type_hints(Arguments).items()
)
"""The arguments in the language of torch's operator schemas."""


def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    layout: Layout,
    call: AttentionCall,
    key_layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention on the call's back end: out (B, H, L, D_v) in q's dtype and lse (B, H, L).

    `key_layout` is the keys' layout where they are sorted apart from the queries.
    """
    arguments = Arguments(
        q,
        k,
        v,
        layout.order,
        layout.bucket_starts,
        None if call.mask is None else _key_bias(call.mask, q.dtype),
        call.seed if call.dropout_p > 0 else None,
        call.rule,
        call.scale,
        call.dropout_p,
        None if key_layout is None else key_layout.order,
        None if key_layout is None else key_layout.bucket_starts,
    )
    if call.backend == "reference":
        return reference.attention(arguments)
    refuse_transforms(f"attention's {call.backend} kernels have", "backend='reference'", q, k, v)
    operators = torch.ops.reformer_kernels
    operator = operators.native_attention if call.backend == "native" else operators.triton_attention
    return operator(*arguments)


def _key_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the logits of queries of `dtype`: (B, L_k), -inf for padding."""
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    if mask.dtype == torch.bool:
        bias = torch.zeros(mask.shape, dtype=precision, device=mask.device)
    else:
        bias = mask.detach().to(torch.promote_types(mask.dtype, torch.float32))
        bias = bias.clamp(-LARGEST_KEY_BIAS, LARGEST_KEY_BIAS).to(precision)
    return bias.masked_fill(is_padding(mask), float("-inf"))


def _triton() -> ModuleType:
    """The Triton kernels, imported when one first runs, because importing Triton takes a while."""
    from reformer_kernels.ops.attention import triton

    return triton


def _define(name: str, devices: tuple[str, ...], kernels: Callable[[], Any]) -> None:
    """Defines the operator `name` and its gradient on `devices`. `kernels` has their forward and backward."""
    forward, backward = f"reformer_kernels::{name}", f"reformer_kernels::{name}_backward"
    torch.library.define(forward, f"({SCHEMA}) -> (Tensor out, Tensor lse)")
    torch.library.define(
        backward,
        f"(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {SCHEMA}) "
        "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    )

    def run_forward(*flat: Any) -> tuple[Tensor, Tensor]:
        arguments = Arguments.of(*flat)
        out, lse = arguments.empty_out(), arguments.empty_lse()
        kernels().forward(arguments, out, lse)
        return out, lse

    def run_backward(
        grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *flat: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = Arguments.of(*flat)
        grad_q, grad_k, grad_v = arguments.empty_gradients()
        kernels().backward(
            torch.zeros_like(out) if grad_out is None else contiguous_rows(grad_out),
            None if grad_lse is None else grad_lse.contiguous(),
            contiguous_rows(out),
            lse.contiguous(),
            arguments,
            grad_q,
            None if arguments.k is None else grad_k,
            grad_v,
        )
        return grad_q, grad_k, grad_v

    def fake_forward(*flat: Any) -> tuple[Tensor, Tensor]:
        arguments = Arguments(*flat)
        return arguments.empty_out(), arguments.empty_lse()

    def fake_backward(
        grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *flat: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return Arguments(*flat).empty_gradients()

    def differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        unused = (None,) * len(Arguments._fields)
        if grad_out is None and grad_lse is None:
            return unused
        # Read once, because torch.utils.checkpoint hands saved tensors out once.
        out, lse, *tensors = ctx.saved_tensors
        arguments = ctx.rest._replace(**dict(zip(ctx.tensor_names, tensors, strict=True)))
        gradients = getattr(torch.ops.reformer_kernels, f"{name}_backward")
        grad_q, grad_k, grad_v = gradients(grad_out, grad_lse, out, lse, *arguments)
        return grad_q, None if arguments.k is None else grad_k, grad_v, *unused[3:]

    def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"reformer_kernels: the {name.partition('_')[0]} attention kernels have no second derivative; "
            'use backend="reference" for double backward'
        )

    torch.library.register_fake(forward, fake_forward)
    torch.library.register_fake(backward, fake_backward)
    torch.library.register_autograd(forward, differentiate, setup_context=_keep_for_backward)
    torch.library.register_autograd(backward, no_second_derivative)
    for device in devices:
        torch.library.impl(forward, device, run_forward)
        torch.library.impl(backward, device, run_backward)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Tensors go through autograd's own store, which notices when they are modified in place."""
    arguments = Arguments(*inputs)
    ctx.tensor_names = [name for name, x in arguments._asdict().items() if isinstance(x, Tensor)]
    ctx.save_for_backward(*output, *(getattr(arguments, name) for name in ctx.tensor_names))
    values: dict[str, Any] = dict.fromkeys(ctx.tensor_names)
    ctx.rest = arguments._replace(**values)
    ctx.set_materialize_grads(False)


def contiguous_rows(x: Tensor) -> Tensor:
    """`x` itself where its rows are contiguous, whatever its other strides."""
    return x if x.size(-1) == 1 or x.stride(-1) == 1 else x.contiguous()


def empty_rows_like(x: Tensor) -> Tensor:
    """Uninitialised memory laid out as `x` is, its rows contiguous in any case.

    A transposed view of a projection's output so gets a result that transposes back for free.
    """
    result = torch.empty_like(x)
    if result.stride(-1) == 1 or result.size(-1) == 1:
        return result
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_define("native_attention", ("CPU",), lambda: native)
_define("triton_attention", ("CUDA", "CPU"), _triton)  # on the CPU, Triton's interpreter runs them, for tests
