"""ReversibleSequence in the autograd graph: hooks, second backward, checkpoints, compilation, memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from python_tests.reversible.cases import (
    Attention,
    D,
    assert_same,
    feed_forward,
    gradients,
    sequence,
    streams,
    weigh,
)
from reformer_kernels.reversible.blocks import ReversibleSequence


def test_caller_tensors_and_results_stay_intact() -> None:
    layers = sequence()
    x = streams()
    before = x.detach().clone()
    for form in (x, tuple(x.chunk(2, -1)), x.detach()):
        result = layers(form)
        y = result if isinstance(result, Tensor) else torch.cat(result, -1)
        kept = y.detach().clone()
        weigh(y).backward()
        assert torch.equal(y, kept)
        assert torch.equal(x, before)
        held = result if isinstance(result, Tensor) else torch.cat(result, -1)
        assert torch.equal(held, kept)


def test_second_backward() -> None:
    layers = sequence(3, 0.2)
    x = streams()
    inputs = [x, *layers.parameters()]
    y = layers(x)
    first = torch.autograd.grad(weigh(y), inputs, retain_graph=True)
    again = torch.autograd.grad(weigh(y), inputs, retain_graph=True)
    assert all(map(torch.equal, first, again))
    # One output after the other, then both together.
    y1, y2 = layers(x.chunk(2, -1))
    parts = [torch.autograd.grad(weigh(y), inputs, retain_graph=True, allow_unused=True) for y in (y1, y2)]
    both = torch.autograd.grad(weigh(y1) + weigh(y2), inputs)
    for a, b, c in zip(*parts, both, strict=True):
        torch.testing.assert_close(sum(g for g in (a, b) if g is not None), c, rtol=1e-10, atol=1e-10)


def test_second_backward_without_retain_graph_raises() -> None:
    layers = sequence()
    y = layers(streams())
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_result_changed_in_place_raises() -> None:
    layers = sequence()
    y = layers(streams())
    loss = weigh(y)
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivative_raises_only_when_asked_for() -> None:
    layers = sequence()
    x = streams()
    (grad,) = torch.autograd.grad(weigh(layers(x)), [x], create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(weigh(layers.plain(x)), [x])[0])
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.square().sum().backward()


def test_hooks_run_once_with_the_whole_gradient() -> None:
    layers = sequence(2)
    x = streams()
    seen: dict[str, list[Tensor]] = {}
    weight = layers.blocks[1].g[1].weight
    handles = [
        weight.register_hook(lambda g: seen.setdefault("tensor", []).append(g) or g * 2),
        weight.register_post_accumulate_grad_hook(
            lambda p: seen.setdefault("after", []).append(p.grad.clone())
        ),
        x.register_hook(lambda g: seen.setdefault("input", []).append(g)),
        layers.blocks[0].f.register_full_backward_hook(
            lambda m, gi, go: seen.setdefault("module", []).append(go[0])
        ),
    ]
    y = layers(x)
    y.register_hook(lambda g: seen.setdefault("output", []).append(g))
    weigh(y).backward()
    for handle in handles:
        handle.remove()
    plain, inputs = torch.autograd.grad(weigh(layers.plain(x)), [weight, x])
    assert {name: len(values) for name, values in seen.items()} == dict.fromkeys(
        ("tensor", "after", "input", "module", "output"), 1
    )
    torch.testing.assert_close(seen["tensor"][0], plain)
    torch.testing.assert_close(seen["after"][0], 2 * plain)
    torch.testing.assert_close(seen["input"][0], inputs)


def test_parameters_get_gradients_block_by_block_from_the_last() -> None:
    layers = sequence(4)
    order: list[int] = []
    for number, block in enumerate(layers.blocks):
        block.f.out.weight.register_post_accumulate_grad_hook(lambda p, n=number: order.append(n))
    weigh(layers(streams())).backward()
    assert order == [3, 2, 1, 0]


@pytest.mark.parametrize("finished", [True, False])
def test_memory_is_freed_without_the_garbage_collector(finished: bool) -> None:
    gc.collect()
    gc.disable()
    try:
        layers = sequence(3, 0.1)
        y1, y2 = layers(tuple(streams().chunk(2, -1)))
        node = y1.grad_fn
        run = weakref.ref(node.next_functions[0][0].run)
        loss = weigh(y1) + weigh(y2)
        if finished:
            loss.backward()
            assert run()._rebuilt is None
            assert run()._hold is None
        del y1, y2, loss, node
        assert run() is None
    finally:
        gc.enable()


def test_rebuilt_streams_are_freed_when_lower_blocks_are_frozen() -> None:
    layers = sequence(4)
    layers.blocks[:2].requires_grad_(False)
    y = layers(streams().detach())
    run = y.grad_fn.next_functions[0][0].run
    weigh(y).backward(retain_graph=True)
    assert run._rebuilt is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around(reentrant: bool) -> None:
    layers = sequence(3, 0.2)
    x = streams()
    kept: list[Any] = []

    def loss() -> Tensor:
        y = checkpoint(layers, x, use_reentrant=reentrant)
        kept.append(y)
        return weigh(y)

    torch.manual_seed(1)
    loss().backward()
    inputs = [x, *layers.parameters()]
    theirs = gradients(lambda: weigh(layers.plain(x)), inputs)
    for tensor, grad in zip(inputs, theirs[1], strict=True):
        torch.testing.assert_close(tensor.grad, grad, rtol=1e-10, atol=1e-10)


def test_checkpoint_inside() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    layers = ReversibleSequence(
        [(Checkpointed(Attention(0.2)), Checkpointed(feed_forward(0.2))) for _ in range(3)]
    )
    x = streams()
    inputs = [x, *layers.parameters()]
    assert_same(
        gradients(lambda: weigh(layers(x)), inputs), gradients(lambda: weigh(layers.plain(x)), inputs)
    )


def test_saved_tensor_hooks_see_the_last_streams_only() -> None:
    layers = sequence(5)
    x = streams()
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = layers(x)
    assert [t.shape for t in packed] == [y.shape]
    torch.testing.assert_close(
        torch.autograd.grad(weigh(y), [x]), torch.autograd.grad(weigh(layers.plain(x)), [x])
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_same_bits(mode: Any) -> None:
    layers = sequence(3, 0.2)
    x = streams()
    torch.manual_seed(1)
    y = layers(x)
    with mode():
        torch.manual_seed(1)
        z = layers(x)
    assert torch.equal(y, z)
    assert not z.requires_grad


def test_compiled_parts() -> None:
    torch._dynamo.reset()
    layers = sequence(3)
    expected = gradients(lambda: weigh(layers.plain(x)), [x := streams(), *layers.parameters()])
    for block in layers.blocks:
        block.f.compile(backend="aot_eager")
        block.g.compile(backend="aot_eager")
    counter = torch._dynamo.utils.counters["stats"]
    inputs = [x, *layers.parameters()]
    assert_same(gradients(lambda: weigh(layers(x)), inputs), expected)
    compiled = counter["unique_graphs"]
    assert compiled > 0
    for _ in range(3):
        assert_same(gradients(lambda: weigh(layers(x)), inputs), expected)
    assert counter["unique_graphs"] == compiled, "each step compiles anew"


def test_inside_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(2 * D, 2 * D).double(), sequence(2), nn.Linear(2 * D, 1).double())
    x = streams()
    inputs = [x, *model.parameters()]
    expected = gradients(lambda: weigh(model(x)), inputs)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(gradients(lambda: weigh(compiled(x)), inputs), expected)


def test_deterministic_algorithms() -> None:
    layers = sequence(2, 0.2)
    x = streams()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first = gradients(lambda: weigh(layers(x)), [x, *layers.parameters()])
        second = gradients(lambda: weigh(layers(x)), [x, *layers.parameters()])
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(map(torch.equal, first[1], second[1]))
