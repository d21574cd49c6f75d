"""The chunked feed-forward: operators `chunked_feed_forward` and `chunked_feed_forward_backward`.

For each chunk of rows: a = x w1' + b1, h = activation(a), dropout, y = h w2' + b2. Nothing of size rows *
d_ff outlives its chunk: backward computes a and h again, then

    dw2 += dy' h    db2 += sum dy    dh = dy w2    da = activation'(a) dh    dw1 += da' x    db1 += sum da
    dx = da w1

The products are torch's. Weight gradients add up in float32 for 16-bit weights, chunk after chunk in order,
so results do not depend on the number of threads beyond what torch's products do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from reformer_kernels.ops.feed_forward.activations import ACTIVATIONS

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


def dropout_keep(seed: int, start: int, shape: Sequence[int], p: float, like: Tensor) -> Tensor:
    """The dropout factors, 0 or 1 / (1 - p), of the chunk whose first row is `start`.

    They depend on the seed and on where chunks begin, so forward and backward must use one chunk size.
    """
    generator = torch.Generator(like.device)
    # An odd multiplier spreads neighbouring chunks over all seeds; a generator mixes them further.
    generator.manual_seed((seed + start * 0x9E3779B97F4A7C15) % 2**63)
    keep = torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    return keep.bernoulli_(1 - p, generator=generator).mul_(1 / (1 - p))


def _chunks(rows: int, chunk_size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, chunk_size):
        yield start, min(chunk_size, rows - start)


def _product_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """a b (+ bias on each row), into `out`."""
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    chunk_size: int,
) -> Tensor:
    rows, d_ff = x.size(0), w2.size(1)
    kind = ACTIVATIONS[activation]
    y = x.new_empty((rows, w2.size(0)))
    room = x.new_empty((min(chunk_size, rows), w1.size(0)))
    gated_room = x.new_empty((room.size(0), d_ff)) if kind.gated else room
    number = int(seed.item()) if seed is not None else 0
    for start, size in _chunks(rows, chunk_size):
        a = _product_into(room[:size], x[start : start + size], w1.t(), b1)
        h = kind.value(a, gated_room[:size])
        if dropout_p > 0:
            h.mul_(dropout_keep(number, start, h.shape, dropout_p, h))
        _product_into(y[start : start + size], h, w2.t(), b2)
    return y


def _backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    seed: Tensor | None,
    activation: str,
    dropout_p: float,
    chunk_size: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    needs_x, needs_w1, needs_b1, needs_w2, needs_b2 = needs
    rows, d_ff = x.size(0), w2.size(1)
    kind = ACTIVATIONS[activation]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else x.new_empty(0)
    wide = torch.float32 if x.dtype.itemsize < 4 else x.dtype

    def total(shape: Sequence[int], needed: bool) -> Tensor | None:
        return torch.zeros(tuple(shape), dtype=wide, device=x.device) if needed else None

    dw1, dw2 = total(w1.shape, needs_w1), total(w2.shape, needs_w2)
    db1, db2 = total(w1.shape[:1], needs_b1), total(w2.shape[:1], needs_b2)
    room = min(chunk_size, rows)
    a_room = x.new_empty((room, w1.size(0)))
    h_room, dh_room = x.new_empty((2, room, d_ff)).unbind()
    da_room = x.new_empty((room, w1.size(0))) if kind.gated else dh_room
    inner = needs_x or needs_w1 or needs_b1
    number = int(seed.item()) if seed is not None else 0
    for start, size in _chunks(rows, chunk_size):
        part = slice(start, start + size)
        a = _product_into(a_room[:size], x[part], w1.t(), b1)
        h = kind.value(a, h_room[:size])
        keep = dropout_keep(number, start, h.shape, dropout_p, h) if dropout_p > 0 else None
        if keep is not None:
            h.mul_(keep)
        dy = grad[part]
        _add_product(dw2, dy, h)
        _add_rows(db2, dy)
        if not inner:
            continue
        dh = torch.mm(dy, w2, out=dh_room[:size])
        if keep is not None:
            dh.mul_(keep)
        da = kind.gradient(dh, a, da_room[:size])
        _add_product(dw1, da, x[part])
        _add_rows(db1, da)
        if needs_x:
            torch.mm(da, w1, out=dx[part])
    totals = (dw1, db1, dw2, db2)
    return dx, *(x.new_empty(0) if total is None else total.to(x.dtype) for total in totals)


def _add_product(total: Tensor | None, rows: Tensor, columns: Tensor) -> None:
    """total += rows' columns."""
    if total is None:
        return
    if total.dtype == rows.dtype:
        total.addmm_(rows.t(), columns)
    else:
        total.add_(torch.mm(rows.t(), columns))


def _add_rows(total: Tensor | None, rows: Tensor) -> None:
    if total is not None:
        total.add_(rows.sum(0, dtype=total.dtype))


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
    given = (result if needed else None for result, needed in zip(results, needs, strict=True))
    return *given, None, None, None, None


def _no_second_order(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "chunked_feed_forward supports first derivatives only: use an ordinary two-layer feed-forward where "
        "you need create_graph=True"
    )


_library.impl("chunked_feed_forward", _forward, "CompositeExplicitAutograd")
_library.impl("chunked_feed_forward_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("reformer_kernels::chunked_feed_forward", _fake_forward, lib=_library)
torch.library.register_fake("reformer_kernels::chunked_feed_forward_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "reformer_kernels::chunked_feed_forward", _autograd, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd(
    "reformer_kernels::chunked_feed_forward_backward", _no_second_order, lib=_library
)
