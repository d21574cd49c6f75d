"""chunked_feed_forward and ChunkedFeedForward against the plain two-layer feed-forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from reformer_kernels.benchmarks.memory import peak_allocated
from reformer_kernels.functional import chunked_feed_forward
from reformer_kernels.modules.feed_forward import ChunkedFeedForward
from reformer_kernels.ops.feed_forward.activations import ACTIVATIONS
from reformer_kernels.ops.feed_forward.chunked import dropout_factors
from reformer_kernels.ops.feed_forward.reference import feed_forward

D_IN, D_FF, D_OUT = 5, 7, 3


def arguments(
    activation: str, rows: int = 23, bias: bool = True, dtype: torch.dtype = torch.float64, **like: Any
) -> list[Tensor | None]:
    width = ACTIVATIONS[activation].inner_width(D_FF)
    shapes = [(rows, D_IN), (width, D_IN), (width,), (D_OUT, D_FF), (D_OUT,)]
    tensors: list[Tensor | None] = [torch.randn(s, dtype=dtype, requires_grad=True, **like) for s in shapes]
    if not bias:
        tensors[2] = tensors[4] = None
    return tensors


def gradients(y: Tensor, tensors: list[Tensor | None]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return list(torch.autograd.grad((y * weights).sum(), [t for t in tensors if t is not None]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 8, 23, 100])
def test_equals_reference(activation: str, bias: bool, chunk_size: int) -> None:
    tensors = arguments(activation, bias=bias)
    y = chunked_feed_forward(*tensors, activation=activation, chunk_size=chunk_size)
    expected = feed_forward(*tensors, activation)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(y, tensors), gradients(expected, tensors), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_dropout_equals_reference_with_the_same_mask(activation: str) -> None:
    tensors = arguments(activation)
    y = chunked_feed_forward(*tensors, activation=activation, dropout_p=0.4, seed=11, chunk_size=10)
    masks = [
        dropout_factors(11, start, (size, D_FF), 0.4, tensors[0])
        for start, size in ((0, 10), (10, 10), (20, 3))
    ]
    keep = torch.cat(masks)
    assert not torch.equal(masks[0], masks[1])
    expected = feed_forward(*tensors, activation, keep)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(y, tensors), gradients(expected, tensors), rtol=1e-11, atol=1e-11)


def test_dropout_rate_and_seeds() -> None:
    layer = ChunkedFeedForward(4, 64, activation="relu", dropout=0.25, chunk_size=100)
    nn.init.ones_(layer.inner.bias)
    nn.init.zeros_(layer.inner.weight)
    nn.init.constant_(layer.outer.weight, 1 / 64)
    nn.init.zeros_(layer.outer.bias)
    x = torch.zeros(2000, 4)
    y = layer(x)[:, 0]  # the mean of 64 dropout factors, in each row
    assert abs(y.mean() - 1) < 0.01
    # Variance of one factor: p / (1 - p).
    assert abs(y.var() - 0.25 / 0.75 / 64) < 0.1 * 0.25 / 0.75 / 64
    assert not torch.equal(layer(x)[:, 0], y)
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer.eval()(x), torch.ones(2000, 4))
    weights = layer.inner.weight + 1, None, layer.outer.weight, None
    by_seed = [chunked_feed_forward(x + 1, *weights, dropout_p=0.5, seed=s) for s in (4, torch.tensor([4]))]
    assert torch.equal(*by_seed)


@pytest.mark.parametrize("needs", range(5))
def test_each_gradient_alone(needs: int) -> None:
    tensors = [t.detach() for t in arguments("geglu")]
    tensors[needs].requires_grad_()
    y = chunked_feed_forward(*tensors, activation="geglu", chunk_size=6)
    expected = feed_forward(*tensors, "geglu")
    torch.testing.assert_close(
        gradients(y, [tensors[needs]]), gradients(expected, [tensors[needs]]), rtol=1e-11, atol=1e-11
    )


def test_gradcheck() -> None:
    tensors = arguments("gelu_tanh", rows=5)
    assert torch.autograd.gradcheck(
        lambda *t: chunked_feed_forward(*t, activation="gelu_tanh", chunk_size=2, dropout_p=0.3, seed=1),
        tensors,
    )


def test_operators_pass_opcheck() -> None:
    tensors = arguments("swiglu", rows=7)
    operators = torch.ops.reformer_kernels
    torch.library.opcheck(operators.chunked_feed_forward, (*tensors, torch.tensor(3), "swiglu", 0.2, 3))
    grad = torch.randn(7, D_OUT, dtype=torch.float64)
    x, w1, b1, w2, _ = (t.detach() for t in tensors)
    torch.library.opcheck(
        operators.chunked_feed_forward_backward,
        (grad, x, w1, b1, w2, torch.tensor(3), "swiglu", 0.2, 3, [True, False, True, True, False]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_accurate_as_the_plain_module(dtype: torch.dtype) -> None:
    # Sums over many chunks: weight gradients that added up in 16 bits would be off by far more.
    layer = ChunkedFeedForward(32, 64, chunk_size=16).to(dtype)
    x = torch.randn(1024, 32).to(dtype).requires_grad_()
    tensors = [x, *layer.parameters()]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = gradients(feed_forward(*exact, "gelu"), exact)
    ours = gradients(layer(x), tensors)
    plain = gradients(feed_forward(*tensors, "gelu"), tensors)
    for a, b, c in zip(ours, plain, truth, strict=True):
        assert a.dtype == dtype
        error, allowed = (a - c).norm() / c.norm(), (b - c).norm() / c.norm()
        assert error <= 2 * allowed + torch.finfo(dtype).eps


def test_shapes_views_and_no_rows() -> None:
    layer = ChunkedFeedForward(6, 8, chunk_size=4)
    x = torch.randn(3, 5, 12)[..., ::2].transpose(0, 1).requires_grad_()
    y = layer(x)
    assert y.shape == (5, 3, 6)
    expected = feed_forward(x, *(p for p in layer.parameters()), "gelu")
    torch.testing.assert_close(y, expected)
    # A gradient of stride zero, as sum() gives.
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(layer(x[0, 0]), y[0, 0])
    empty = layer(torch.zeros(0, 6, requires_grad=True))
    assert empty.shape == (0, 6)
    empty.sum().backward()
    assert torch.equal(layer.inner.weight.grad, torch.zeros(8, 6))


def test_autocast() -> None:
    layer = ChunkedFeedForward(16, 32, chunk_size=8)
    x = torch.randn(20, 16, requires_grad=True)
    tensors = [x, *layer.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = layer(x), feed_forward(*tensors, "gelu")
    assert y.dtype == plain.dtype == torch.bfloat16
    for a, b in zip(gradients(y, tensors), gradients(plain, tensors), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 1e-2 * b.norm()


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    layer = ChunkedFeedForward(6, 8, dropout=0.2, chunk_size=4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 6, requires_grad=True)
    for call in (layer, compiled):
        torch.manual_seed(0)
        y = call(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        if call is layer:
            first = y, grad
    torch.testing.assert_close(first, (y, grad))


def test_second_derivative_raises() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(ChunkedFeedForward(6, 8)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


def test_memory_does_not_grow_with_d_ff_or_rows() -> None:
    layer = ChunkedFeedForward(16, 512, memory_budget=2**20)
    x = torch.randn(8192, 16, requires_grad=True)
    layer(x).sum().backward()
    peak = peak_allocated(lambda: layer(x).sum().backward())
    # One [rows, d_ff] tensor has 16 MiB; ours: the budget, y, and x's gradient twice (new, and to be added).
    assert peak < 2**20 + 4 * x.numel() * 4, peak


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "tanh"}, ValueError, "activation must be one of relu, .*got 'tanh'"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be a number in \[0, 1\), got 1.0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be a positive number of rows, got 0"),
        ({"chunk_size": 2.5}, ValueError, "chunk_size must be a positive number of rows"),
        ({"memory_budget": -1}, ValueError, "memory_budget must be"),
        ({"chunk_size": 2, "memory_budget": 100}, ValueError, "not both"),
        ({"seed": 1.5, "dropout_p": 0.1}, TypeError, "seed must be an int"),
        ({"seed": torch.zeros(2), "dropout_p": 0.1}, TypeError, "int64 tensor of one element"),
        ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
        ({"x": torch.zeros(2, D_IN).long()}, TypeError, "x must be one of float32"),
        (
            {"x": torch.zeros(2, D_IN)},
            TypeError,
            "x and w1 must have one dtype, got torch.float32 and torch.float64",
        ),
        ({"x": torch.zeros(2, 9).double()}, ValueError, r"w1 must be \(7, 9\) .* got \(7, 5\)"),
        (
            {"x": torch.zeros(2, 0).double(), "w1": torch.zeros(7, 0).double()},
            ValueError,
            r"d_in, d_ff and d_out must be at least 1, got w1 \(7, 0\)",
        ),
        ({"w2": torch.zeros(0, 7).double()}, ValueError, r"at least 1, got w2 \(0, 7\)"),
        ({"activation": "glu"}, ValueError, r"w1 must be \(14, 5\)"),
        ({"b1": torch.zeros(3).double()}, ValueError, r"b1 must be \(7,\), got \(3,\)"),
        ({"w2": torch.zeros(3).double()}, ValueError, "x, w1 and w2 must be"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    names = ("x", "w1", "b1", "w2", "b2")
    settings: dict[str, Any] = {**dict(zip(names, arguments("relu"), strict=True)), "activation": "relu"}
    with pytest.raises(error, match=message):
        chunked_feed_forward(**(settings | change))


def test_bad_module() -> None:
    with pytest.raises(ValueError, match="activation must be one of"):
        ChunkedFeedForward(4, 8, activation="mish")
    with pytest.raises(ValueError, match="dropout must be a number in"):
        ChunkedFeedForward(4, 8, dropout=1.5)
    with pytest.raises(ValueError, match="d_ff must be a positive integer"):
        ChunkedFeedForward(4, 0)


@pytest.mark.parametrize("which", range(5))
def test_forward_mode_is_refused(which: int) -> None:
    tensors = [t.detach() for t in arguments("gelu") if t is not None]

    def layer(tensor: Tensor) -> Tensor:
        return chunked_feed_forward(*(tensor if i == which else t for i, t in enumerate(tensors)))

    message = "chunked_feed_forward has no forward-mode derivative; use torch.nn.functional"
    tangent = torch.ones_like(tensors[which])
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(layer, (tensors[which],), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        layer(forward_ad.make_dual(tensors[which], tangent))


@pytest.mark.parametrize("which", range(6))
def test_tensors_on_several_devices_are_refused(which: int) -> None:
    tensors = [*(t.detach() for t in arguments("gelu") if t is not None), torch.tensor(3)]
    tensors[which] = tensors[which].to("meta")
    with pytest.raises(ValueError, match="chunked_feed_forward must be on one device, got"):
        torch.ops.reformer_kernels.chunked_feed_forward(*tensors, "gelu", 0.1, 4)
    refusal = (
        "must be on one device, got" if which < 5 else "seed must hold a number, got a tensor on the meta"
    )
    with pytest.raises(ValueError, match=refusal):
        chunked_feed_forward(*tensors[:5], dropout_p=0.1, seed=tensors[5])


def test_the_meta_device_works_under_autocast_too() -> None:
    layer = ChunkedFeedForward(6, 8, dropout=0.1, device="meta")
    x = torch.empty(2, 3, 6, device="meta", requires_grad=True)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = layer(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert y.is_meta and grad.is_meta and y.shape == grad.shape == x.shape
