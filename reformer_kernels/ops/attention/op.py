"""The operators of attention over sorted orders: schema, fake kernels, gradient, and the choice of back end.

`torch.ops.reformer_kernels.native_attention` and `triton_attention` take `Arguments` and return out
(B, H, L, D_v) in q's dtype and the log-sum-exp (B, H, L) in float32, both differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from reformer_kernels._checks import refuse_forward_mode
from reformer_kernels.call import AttentionCall, is_padding
from reformer_kernels.layout import Layout
from reformer_kernels.ops.attention import native, reference
from reformer_kernels.ops.attention.arguments import SCHEMA, Arguments

LARGEST_KEY_BIAS = 2.0**120
"""Finite biases of keys are cut to this, far beyond any logit, so that none overflows in other units."""


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
    refuse_forward_mode("attention's native kernels have", "backend='reference'", q, k, v)
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
        return kernels().forward(Arguments.of(*flat))

    def run_backward(
        grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *flat: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return kernels().backward(grad_out, grad_lse, out, lse, Arguments.of(*flat))

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


_define("native_attention", ("CPU",), lambda: native)
_define("triton_attention", ("CUDA", "CPU"), _triton)  # on the CPU, Triton's interpreter runs them, for tests
