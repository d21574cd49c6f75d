"""A ReversibleSequence within functions that torch.compile compiles with its default back end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from python_tests.reversible.cases import D, assert_same, feed_forward, gradients, streams, weigh
from reformer_kernels.reversible.blocks import ReversibleBlock, ReversibleSequence


def model(residual: Any) -> nn.Module:
    """Linear layers around two blocks whose input is normalised in the residual step."""
    torch.manual_seed(0)
    layers = ReversibleSequence(
        [
            ReversibleBlock(feed_forward(), feed_forward(), norm_f=nn.LayerNorm(D), norm_g=nn.LayerNorm(D))
            for _ in range(2)
        ],
        residual=residual,
    )
    return nn.Sequential(nn.Linear(2 * D, 2 * D), layers, nn.Linear(2 * D, 1)).float()


@pytest.mark.parametrize("residual", ["float", "exact"])
def test_results_and_gradients_are_those_of_eager(residual: Any) -> None:
    torch._dynamo.reset()
    net = model(residual)
    x = streams().detach().float().requires_grad_()
    inputs = [x, *net.parameters()]
    expected = gradients(lambda: weigh(net(x)), inputs)
    compiled = torch.compile(net)
    assert_same(gradients(lambda: weigh(compiled(x)), inputs), expected, 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("residual", ["float", "exact"])
def test_backward_within_the_compiled_function(residual: Any) -> None:
    torch._dynamo.reset()
    net = model(residual)
    x = streams().detach().float()
    weigh(net(x)).backward()
    expected = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()

    @torch.compile
    def step(x: Tensor) -> None:
        weigh(net(x)).backward()

    step(x)
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_compiled_parts_within_a_compiled_model() -> None:
    torch._dynamo.reset()
    net: Any = model("float")
    x = streams().detach().float().requires_grad_()
    inputs = [x, *net.parameters()]
    expected = gradients(lambda: weigh(net(x)), inputs)
    for block in net[1].blocks:
        block.g.compile(backend="aot_eager")
    compiled = torch.compile(net, backend="aot_eager")
    assert_same(gradients(lambda: weigh(compiled(x)), inputs), expected, 1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert_same(gradients(lambda: weigh(compiled(x)), inputs), expected, 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(
    "transform", [torch.func.grad, torch.func.vmap, lambda f: lambda x: torch.func.vjp(f, x)]
)
def test_transforms_of_torch_func_are_refused(transform: Any) -> None:
    net = model("float")
    with pytest.raises(NotImplementedError, match=r"cannot pass through a ReversibleSequence"):
        transform(lambda x: weigh(net(x)))(streams().detach().float())
