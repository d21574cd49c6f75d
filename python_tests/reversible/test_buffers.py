"""Buffers that a forward pass changes: recomputation sees their old values, and leaves the new ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from python_tests.reversible.cases import D, assert_same, feed_forward, streams, weigh
from reformer_kernels.reversible.blocks import ReversibleSequence


class Counted(nn.Module):
    """Scales by the number of its calls, which it counts in place or in a new tensor."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.linear = nn.Linear(D, D, dtype=torch.float64)
        self.register_buffer("calls", torch.ones((), dtype=torch.float64))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.calls.add_(1)
        else:
            self.calls = self.calls + 1
        return self.linear(x).sin() / self.calls.clone()


def spectral(module: nn.Module) -> nn.Module:
    return nn.Sequential(module, parametrizations.spectral_norm(nn.Linear(D, D, dtype=torch.float64)))


def older_spectral(module: nn.Module) -> nn.Module:
    return nn.Sequential(module, nn.utils.spectral_norm(nn.Linear(D, D, dtype=torch.float64)))


CHANGING: dict[str, Callable[[], nn.Module]] = {
    "spectral norm": lambda: spectral(feed_forward()),
    "spectral norm, older form": lambda: older_spectral(feed_forward()),
    "counted in place": lambda: Counted(True),
    "counted in new tensors": lambda: Counted(False),
    "batch norm": lambda: nn.BatchNorm1d(5, momentum=None, dtype=torch.float64),
}


@pytest.mark.parametrize("residual", ["float", "exact"])
@pytest.mark.parametrize("name", CHANGING)
def test_gradients_and_buffers_are_those_of_the_ordinary_graph(name: str, residual: str) -> None:
    make = CHANGING[name]
    layers = ReversibleSequence([(make(), make()) for _ in range(3)], residual=residual)
    plain = copy.deepcopy(layers)
    x = streams()
    for _ in range(2):  # from one step to the next the buffers go on
        loss, expected = weigh(layers(x)), weigh(plain.plain(x))
        ours = torch.autograd.grad(loss, [x, *layers.parameters()])
        theirs = torch.autograd.grad(expected, [x, *plain.parameters()])
        tolerance = 1e-5 if residual == "exact" else 1e-9  # exact residuals are rounded to a fixed point
        assert_same((loss.detach(), list(ours)), (expected.detach(), list(theirs)), tolerance)
        for (key, buffer), other in zip(layers.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(buffer, other, rtol=tolerance, atol=tolerance, msg=key)


def test_two_forward_passes_before_their_backward() -> None:
    layers = ReversibleSequence([(Counted(True), feed_forward()) for _ in range(2)])
    plain = copy.deepcopy(layers)
    x = streams()
    results = []
    for call in (layers, plain.plain):
        loss = weigh(call(x)) + weigh(call(2 * x))
        parameters = (layers if call is layers else plain).parameters()
        results.append((loss.detach(), list(torch.autograd.grad(loss, [x, *parameters]))))
    assert_same(*results)


def test_a_shared_part_sees_its_buffers_as_they_were_in_each_call() -> None:
    shared = Counted(True)
    layers = ReversibleSequence([(shared, shared), (feed_forward(), shared)])
    plain = copy.deepcopy(layers)
    x = streams()
    ours, theirs = weigh(layers(x)), weigh(plain.plain(x))
    assert_same(
        (ours.detach(), list(torch.autograd.grad(ours, [x, *layers.parameters()]))),
        (theirs.detach(), list(torch.autograd.grad(theirs, [x, *plain.parameters()]))),
    )
    assert torch.equal(shared.calls, plain.blocks[0].f.calls)


def test_a_buffer_changed_from_outside_raises() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gain", torch.ones((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x.sin() * self.gain

    layers = ReversibleSequence([(Scaled(), feed_forward())])
    loss = weigh(layers(streams()))
    layers.blocks[0].f.gain.mul_(2)
    with pytest.raises(RuntimeError, match=r"buffer 'gain' of Scaled in block 0 was changed in place"):
        loss.backward()
