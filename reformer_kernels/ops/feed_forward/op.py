"""The operators `chunked_feed_forward` and `chunked_feed_forward_backward`, registered with torch.

`chunked` computes them. Here are their schemas, their fake kernels and their autograd formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reformer_kernels._checks import on_one_device
from reformer_kernels.ops.feed_forward import chunked

_library = torch.library.Library("reformer_kernels", "FRAGMENT")
_library.define(
    "chunked_feed_forward(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? seed, str "
    "activation, float dropout_p, int chunk_size) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "chunked_feed_forward_backward(Tensor grad, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? seed, "
    "str activation, float dropout_p, int chunk_size, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, "
    "Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fake_forward(x: Tensor, w1: Tensor, b1: Any, w2: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.size(0), w2.size(0)))


def _fake_backward(
    grad: Tensor, x: Tensor, w1: Tensor, b1: Any, w2: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    needs = rest[-1]
    return tuple(x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w1, b1, w2, _b2, seed, *ctx.constants = inputs
    ctx.save_for_backward(x, w1, b1, w2, seed)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w1, b1, w2, seed = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    results = torch.ops.reformer_kernels.chunked_feed_forward_backward(
        grad, x, w1, b1, w2, seed, *ctx.constants, needs
    )
    gradients = (result if needed else None for result, needed in zip(results, needs, strict=True))
    return *gradients, None, None, None, None


def _refuse_second_derivative(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "chunked_feed_forward supports first derivatives only: use an ordinary two-layer feed-forward where "
        "you need create_graph=True"
    )


for _name, _kernel, _fake in (
    ("chunked_feed_forward", chunked.forward, _fake_forward),
    ("chunked_feed_forward_backward", chunked.backward, _fake_backward),
):
    _library.impl(_name, on_one_device(_name, _kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"reformer_kernels::{_name}", on_one_device(_name, _fake), lib=_library)
torch.library.register_autograd(
    "reformer_kernels::chunked_feed_forward", _autograd, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    "reformer_kernels::chunked_feed_forward_backward", _refuse_second_derivative, lib=_library
)
