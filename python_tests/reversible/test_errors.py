"""What ReversibleSequence refuses, and that nothing is damaged when a part fails."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from python_tests.reversible.cases import (
    D,
    Returns,
    assert_same,
    feed_forward,
    gradients,
    sequence,
    streams,
    weigh,
)
from reformer_kernels.reversible.blocks import ReversibleSequence


class Captures(nn.Module):
    def __init__(self, captured: Tensor) -> None:
        super().__init__()
        self.inner = feed_forward()
        self.captured = [captured]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.captured[0]


def test_captured_tensor_raises_in_forward() -> None:
    leaf = torch.ones(D, dtype=torch.float64, requires_grad=True)
    x = streams()
    for captured in (leaf, leaf * 2, x[..., :D]):
        for parts in ((Captures(captured), feed_forward()), (feed_forward(), Captures(captured))):
            layers = ReversibleSequence([(feed_forward(), feed_forward()), parts])
            with pytest.raises(
                RuntimeError, match=r"of block 1 uses a tensor of shape .* its gradient\s+would be lost"
            ):
                layers(x)
            with torch.no_grad():
                layers(x)
    layers = ReversibleSequence([(Captures(leaf.detach()), feed_forward())])
    weigh(layers(x)).backward()


def test_input_changed_in_place_raises() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x.mul_(2)
            return x

    for parts in ((InPlace(), feed_forward()), (feed_forward(), InPlace())):
        layers = ReversibleSequence([parts])
        for context in (contextlib.nullcontext(), torch.no_grad()):
            with context, pytest.raises(RuntimeError, match="in place"):
                layers(streams())
    with pytest.raises(RuntimeError, match=r"in.?place"):
        ReversibleSequence([(nn.ReLU(inplace=True), feed_forward())])(streams())


class Fails(nn.Module):
    """Raises in one chosen call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.countdown = -1

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        self.countdown -= 1
        if self.countdown == 0:
            raise ValueError("chosen to fail")
        return y


@pytest.mark.parametrize("call", [1, 2], ids=["forward", "backward"])
@pytest.mark.parametrize("part", ["f", "g"])
def test_exception_leaves_nothing_damaged(call: int, part: str) -> None:
    layers = ReversibleSequence(
        [(Fails(feed_forward(0.2)), Fails(feed_forward(0.2))) for _ in range(3)], residual="float"
    )
    x = streams()
    inputs = [x, *layers.parameters()]
    expected = gradients(lambda: weigh(layers(x)), inputs)
    identities = [id(p) for p in layers.parameters()]
    getattr(layers.blocks[1], part).countdown = call
    results = []

    def step() -> None:
        torch.manual_seed(1)
        results.append(layers(x))
        torch.autograd.grad(weigh(results[0]), inputs, retain_graph=True)

    with pytest.raises(ValueError, match="chosen to fail"):
        step()
    assert [id(p) for p in layers.parameters()] == identities
    assert_same(gradients(lambda: weigh(layers(x)), inputs), expected)
    if call == 2:  # the graph whose backward failed is intact too
        (y,) = results
        assert y.grad_fn.next_functions[0][0].run._rebuilt is None
        again = torch.autograd.grad(weigh(y), inputs)
        assert_same((expected[0], list(again)), expected)


def test_failed_hook_between_blocks_leaves_nothing_damaged() -> None:
    layers = sequence(3)
    x = streams()
    inputs = list(layers.parameters())
    y = layers(x)
    fail = [True]

    def hook(parameter: Tensor) -> None:
        if fail[0]:
            raise ValueError("chosen to fail")

    handle = layers.blocks[1].f.out.weight.register_post_accumulate_grad_hook(hook)
    with pytest.raises(ValueError, match="chosen to fail"):
        weigh(y).backward(retain_graph=True)
    handle.remove()
    again = torch.autograd.grad(weigh(y), inputs)
    assert_same((y, list(again)), (y, list(torch.autograd.grad(weigh(layers.plain(x)), inputs))))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 5, 7), ValueError, r"must be even.*\(2, 5, 7\)"),
        (torch.tensor(1.0), ValueError, "must be even"),
        (torch.zeros(2, 4, dtype=torch.int64), TypeError, "floating point, got torch.int64"),
        ([1, 2], TypeError, "tensor .* or a pair of tensors, got list"),
        (None, TypeError, "got NoneType"),
        ((torch.zeros(2), torch.zeros(3)), ValueError, r"one shape, got \(2,\) and \(3,\)"),
        ((torch.zeros(2), torch.zeros(2).double()), ValueError, "agree in dtype"),
        ((torch.zeros(2),) * 3, TypeError, "pair of tensors, got tuple"),
    ],
)
def test_bad_input(x: Any, error: type[Exception], message: str) -> None:
    layers = ReversibleSequence([(nn.Identity(), nn.Identity())])
    for call in (layers, layers.plain):
        with pytest.raises(error, match=message):
            call(x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: x[..., 1:], ValueError, r"g of block 1 must keep the shape .*\(2, 5, 6\).*\(2, 5, 5\)"),
        (lambda x: x[:1], ValueError, "keep the shape"),
        (lambda x: x.float(), TypeError, r"keep the dtype of its input, torch.float64.*torch.float32"),
        (lambda x: None, TypeError, "must return a tensor.*NoneType"),
        (lambda x: (), TypeError, "must return a tensor.*tuple"),
        (lambda x: x.to("meta"), ValueError, "moved its input from cpu to meta"),
    ],
)
def test_blocks_that_return_the_wrong_thing(make: Any, error: type[Exception], message: str) -> None:
    layers = ReversibleSequence([(nn.Identity(), nn.Identity()), (nn.Identity(), Returns(make))])
    for context in (contextlib.nullcontext(), torch.no_grad()):
        with context, pytest.raises(error, match=message):
            layers(streams())


def test_bad_construction() -> None:
    pair = (nn.Identity(), nn.Identity())
    with pytest.raises(TypeError, match=r"block 1 must be a pair .* got Linear"):
        ReversibleSequence([pair, nn.Linear(2, 2)])
    with pytest.raises(TypeError, match=r"got tuple of length 3"):
        ReversibleSequence([(nn.Identity(),) * 3])
    with pytest.raises(TypeError, match=r"g must be an nn\.Module, got function"):
        ReversibleSequence([(nn.Identity(), lambda x: x)])
    with pytest.raises(ValueError, match="residual must be one of"):
        ReversibleSequence([pair], residual="double")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="route must be one of"):
        ReversibleSequence([pair], route="h")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale belongs to"):
        ReversibleSequence([pair], scale=4.0)
    with pytest.raises(ValueError, match="power of two"):
        ReversibleSequence([pair], residual="exact", scale=3.0)
    with pytest.raises(ValueError, match="keep_layouts is for"):
        ReversibleSequence([pair], residual="exact", keep_layouts=True)
    with pytest.raises(ValueError, match="has no shape yet"):
        ReversibleSequence([(nn.LazyLinear(D), nn.Identity())])(streams())
