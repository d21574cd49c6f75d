"""Training modes that change between the forward pass of a reversible sequence and its backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from python_tests.reversible.cases import assert_same, feed_forward, sequence, streams, weigh
from reformer_kernels.reversible.blocks import ReversibleSequence


def changed(layers: ReversibleSequence) -> list[bool]:
    """Changes modes as callers do, and returns those of all modules."""
    layers.train(not layers.training)
    layers.blocks[1].g.train(not layers.training)
    return [module.training for module in layers.modules()]


@pytest.mark.parametrize("residual", ["float", "exact"])
@pytest.mark.parametrize("starts_in_training", [True, False])
def test_recomputation_is_in_the_modes_of_the_first_run(residual: str, starts_in_training: bool) -> None:
    layers = sequence(3, dropout=0.4, residual=residual).train(starts_in_training)
    layers.blocks[2].f.eval()
    x = streams()
    inputs = [x, *layers.parameters()]
    modes = [module.training for module in layers.modules()]
    results = []
    for changes in (False, True):
        for module, mode in zip(layers.modules(), modes, strict=True):
            module.training = mode
        torch.manual_seed(1)
        loss = weigh(layers(x))
        expected_modes = changed(layers) if changes else modes
        results.append((loss.detach(), list(torch.autograd.grad(loss, inputs))))
        assert [module.training for module in layers.modules()] == expected_modes
    assert_same(results[1], results[0], tolerance=0)


def test_evaluation_before_backward_leaves_batch_norm_as_it_was() -> None:
    norm = nn.BatchNorm1d(5, momentum=0.5, dtype=torch.float64)
    layers = ReversibleSequence([(norm, feed_forward()), (feed_forward(), feed_forward())])
    x = streams()
    inputs = [x, *layers.parameters()]
    expected = list(torch.autograd.grad(weigh(layers.plain(x)), inputs))
    loss = weigh(layers(x))
    mean = norm.running_mean.clone()
    layers.eval()
    assert_same((loss, list(torch.autograd.grad(loss, inputs))), (loss, expected))
    assert torch.equal(norm.running_mean, mean)
    assert not norm.training
