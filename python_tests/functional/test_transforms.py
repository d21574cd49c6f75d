"""The public functions under torch.func's transforms: each works, or says what to use instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reformer_kernels import LSHConfig
from reformer_kernels import functional as F

CONFIG = LSHConfig(n_hashes=2, chunk_length=8)
CAUSAL = LSHConfig(n_hashes=2, chunk_length=4, causal=True)


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, K, V = (rows(seed, 1, 2, 40, 8) for seed in range(3))
FLAT, W1, W2, HEAD = rows(3, 2, 10, 16), rows(4, 32, 16), rows(5, 16, 32), rows(6, 20, 16)
LABELS = torch.arange(20).view(2, 10)
ATTENTION: dict[str, Callable[[Tensor, str], Tensor]] = {
    "lsh_attention": lambda x, backend: F.lsh_attention(x, V, CONFIG, seed=0, backend=backend),
    "attend": lambda x, backend: F.attend(x, V, F.lsh_layout(X, CONFIG, seed=0), CONFIG, backend=backend),
    "lsh_cross_attention": lambda x, backend: F.lsh_cross_attention(x, K, V, CAUSAL, seed=0, backend=backend),
    "local_attention": lambda x, backend: F.local_attention(x, K, V, chunk_length=8, backend=backend),
    "sliding_window_attention": lambda x, backend: F.sliding_window_attention(x, K, V, 8, backend=backend),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "chunked_feed_forward": lambda x: F.chunked_feed_forward(x, W1, None, W2, None),
    "linear_cross_entropy": lambda x: F.linear_cross_entropy(x, HEAD, LABELS),
}
LAYOUTS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "lsh_hash": lambda x, backend: F.lsh_hash(
        x, F.sample_rotations(CONFIG, 2, 8, 0), CONFIG.factors(40), backend=backend
    ),
    "lsh_layout": lambda x, backend: F.lsh_layout(x, CONFIG, seed=0, backend=backend).order,
}
BACKENDS = pytest.mark.parametrize("backend", ["native", "reference"])


def loss_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x).square().sum()


def assert_refused(function: Callable[[Tensor], Tensor], x: Tensor, instead: str) -> None:
    loss = loss_of(function)
    no_gradient = rf"no gradient by torch\.func\.grad, vjp and jacrev; .*, or {instead}"
    for transform in (torch.func.grad, torch.func.jacrev, lambda f: lambda x: torch.func.vjp(f, x)):
        with pytest.raises(NotImplementedError, match=no_gradient):
            transform(loss)(x)
    with pytest.raises(NotImplementedError, match=no_gradient):
        torch.func.vmap(torch.func.grad(loss))(x[None])
    with pytest.raises(NotImplementedError, match=rf"no forward-mode derivative; use {instead}"):
        torch.func.jvp(loss, (x,), (torch.ones_like(x),))


def assert_maps(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    batch = torch.stack([x, x.flip(-1), 2 * x], dim=1).requires_grad_()
    expected = torch.stack([function(one) for one in batch.unbind(1)])
    found = torch.func.vmap(function, in_dims=1)(batch)
    torch.testing.assert_close(found, expected)
    if expected.requires_grad:
        gradients = [torch.autograd.grad(y.square().sum(), batch)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients)


@BACKENDS
@pytest.mark.parametrize("name", ATTENTION)
def test_vmap_of_attention(name: str, backend: str) -> None:
    assert_maps(lambda x: ATTENTION[name](x, backend), X)


@BACKENDS
@pytest.mark.parametrize("name", LAYOUTS)
def test_vmap_of_layouts(name: str, backend: str) -> None:
    assert_maps(lambda x: LAYOUTS[name](x, backend), X)


@pytest.mark.parametrize("name", OTHERS)
def test_vmap_of_the_others(name: str) -> None:
    assert_maps(OTHERS[name], FLAT)


@pytest.mark.parametrize("name", ATTENTION)
def test_gradients_of_native_attention_are_refused(name: str) -> None:
    assert_refused(lambda x: ATTENTION[name](x, "native"), X, "backend='reference'")


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_of_the_others_are_refused(name: str) -> None:
    instead = "torch.nn.functional's" if name == "chunked_feed_forward" else "F.cross_entropy"
    assert_refused(OTHERS[name], FLAT, instead)


@pytest.mark.parametrize("name", ATTENTION)
def test_gradients_of_reference_attention(name: str) -> None:
    loss = loss_of(lambda x: ATTENTION[name](x, "reference"))
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(loss(x), x)[0]
    found: list[Any] = [torch.func.grad(loss)(X), torch.func.vjp(loss, X)[1](torch.tensor(1.0))[0]]
    found += torch.func.vmap(torch.func.grad(loss))(torch.stack([X, X]))
    for gradient in found:
        torch.testing.assert_close(gradient, expected)
    tangent = rows(7, *X.shape)
    derivative = torch.func.jvp(loss, (X,), (tangent,))[1]
    torch.testing.assert_close(derivative, (expected * tangent).sum(), rtol=1e-4, atol=1e-4)


def test_a_layout_that_vmap_maps_over_is_checked() -> None:
    layout = F.lsh_layout(X, CONFIG, seed=0)
    twice = torch.stack([layout.order, layout.order.clamp(max=38)])

    def attend(order: Tensor) -> Tensor:
        broken = type(layout)(order, layout.bucket_starts)
        return F.attend(X, V, broken, CONFIG, backend="reference")

    with pytest.raises(ValueError, match=r"must hold a permutation of 0\.\.39"):
        torch.func.vmap(attend)(twice)
