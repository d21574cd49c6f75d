"""ReversibleSequence against the same blocks run ordinarily."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reformer_kernels.cli.allocations import peak_allocated
from reformer_kernels.modules._replay import remember
from reformer_kernels.modules.reversible import ReversibleBlock, ReversibleSequence

D = 6
TOLERANCE = 1e-10


def feed_forward(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * D, D)
    ).to(dtype)


class Attention(nn.Module):
    """One head of ordinary attention, with an additive bias that may need a gradient."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.project = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.dropout = dropout
        self.double()

    def forward(
        self, x: Tensor, bias: Tensor | None = None, *, options: dict[str, Tensor] | None = None
    ) -> Tensor:
        q, k, v = self.project(self.norm(x)).chunk(3, dim=-1)
        if options is not None:
            v = v * options["gain"]
        dropout = self.dropout if self.training else 0.0
        return self.out(
            nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        )


def sequence(depth: int = 3, dropout: float = 0.0, **settings: Any) -> ReversibleSequence:
    return ReversibleSequence([(Attention(dropout), feed_forward(dropout)) for _ in range(depth)], **settings)


def streams(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 5, 2 * D, dtype=dtype, requires_grad=True)


def gradients(
    loss: Callable[[], Tensor], inputs: list[Tensor], seed: int = 1
) -> tuple[Tensor, list[Tensor | None]]:
    torch.manual_seed(seed)
    value = loss()
    return value.detach(), list(torch.autograd.grad(value, inputs, allow_unused=True))


def assert_same(
    ours: tuple[Tensor, list[Tensor | None]],
    theirs: tuple[Tensor, list[Tensor | None]],
    tolerance: float = TOLERANCE,
) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    for number, (a, b) in enumerate(zip(ours[1], theirs[1], strict=True)):
        assert (a is None) == (b is None), f"gradient {number}: {a} against {b}"
        if a is not None:
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=number: f"{n}: {m}"
            )


def weigh(result: Tensor) -> Tensor:
    """A loss that gives each element its own gradient."""
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return (result.sin() * weights).sum()


# Numbers


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_equal_ordinary(depth: int, dropout: float, training: bool) -> None:
    layers = sequence(depth, dropout).train(training)
    x = streams()
    inputs = [x, *layers.parameters()]
    ours = gradients(lambda: weigh(layers(x)), inputs)
    assert_same(ours, gradients(lambda: weigh(layers.ordinary(x)), inputs))
    torch.manual_seed(1)
    weigh(layers(x)).backward()
    for tensor, grad in zip(inputs, ours[1], strict=True):
        assert torch.equal(tensor.grad, grad)


def test_pair_of_streams_and_shared_start() -> None:
    layers = sequence()
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)

    def loss(call: Any) -> Tensor:
        y1, y2 = call((x, x))
        return weigh(y1) + 2 * weigh(y2)

    inputs = [x, *layers.parameters()]
    assert_same(gradients(lambda: loss(layers), inputs), gradients(lambda: loss(layers.ordinary), inputs))


@pytest.mark.parametrize("used", [0, 1])
def test_part_of_the_outputs(used: int) -> None:
    layers = sequence()
    x = streams()
    inputs = [x, *layers.parameters()]
    assert_same(
        gradients(lambda: weigh(layers(x.chunk(2, -1))[used]), inputs),
        gradients(lambda: weigh(layers.ordinary(x.chunk(2, -1))[used]), inputs),
    )


def test_part_of_the_inputs_of_grad() -> None:
    layers = sequence(4)
    x = streams()
    last = list(layers.blocks[3].parameters())
    assert_same(gradients(lambda: weigh(layers(x)), last), gradients(lambda: weigh(layers.ordinary(x)), last))


def test_extra_arguments_with_gradients() -> None:
    layers = ReversibleSequence([(Attention(), Attention()) for _ in range(3)], route="both")
    x = streams()
    bias = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(D, dtype=torch.float64, requires_grad=True)
    inputs = [x, bias, gain, *layers.parameters()]

    def loss(call: Any) -> Tensor:
        return weigh(call(x, bias.exp(), options={"gain": gain * 2}))

    ours = gradients(lambda: loss(layers), inputs)
    assert ours[1][1] is not None
    assert ours[1][1].abs().max() > 0
    assert_same(ours, gradients(lambda: loss(layers.ordinary), inputs))


def test_route_sends_arguments_to_one_part() -> None:
    bias = torch.randn(5, 5, dtype=torch.float64)
    for route in ("f", "g"):
        parts = (Attention(), feed_forward())
        layers = ReversibleSequence([parts if route == "f" else parts[::-1]], route=route)
        x = streams()
        assert not torch.equal(layers(x, bias), layers(x))
        torch.testing.assert_close(layers(x, bias), layers.ordinary(x, bias), rtol=0, atol=0)


def test_frozen_parameters() -> None:
    layers = sequence(4)
    layers.blocks[0].requires_grad_(False)
    layers.blocks[2].f.requires_grad_(False)
    for needs_input_grad in (True, False):
        x = streams().detach().requires_grad_(needs_input_grad)
        inputs = [t for t in [x, *layers.parameters()] if t.requires_grad]
        assert_same(
            gradients(lambda x=x: weigh(layers(x)), inputs),
            gradients(lambda x=x: weigh(layers.ordinary(x)), inputs),
        )
    layers.requires_grad_(False)
    assert not layers(streams().detach()).requires_grad


def test_shared_parameters_and_a_block_used_twice() -> None:
    block = ReversibleBlock(Attention(), feed_forward())
    other = ReversibleBlock(Attention(), feed_forward())
    other.f.project = block.f.project  # between blocks
    other.g[4].bias = other.f.out.bias  # between f and g
    other.g[0].bias = other.g[0].weight  # within g
    layers = ReversibleSequence([block, other, block])
    x = streams()
    inputs = [x, *layers.parameters()]
    assert_same(
        gradients(lambda: weigh(layers(layers(x))), inputs),
        gradients(lambda: weigh(layers.ordinary(layers.ordinary(x))), inputs),
    )


def test_sequence_in_a_sequence() -> None:
    inner = ReversibleSequence([(nn.Linear(D // 2, D // 2), nn.Linear(D // 2, D // 2)) for _ in range(2)])
    inner.double()
    layers = ReversibleSequence([(inner, feed_forward(0.2)), (feed_forward(0.2), inner)])
    x = streams()
    inputs = [x, *layers.parameters()]
    assert_same(
        gradients(lambda: weigh(layers(x)), inputs), gradients(lambda: weigh(layers.ordinary(x)), inputs)
    )


class WithLoss(nn.Module):
    """Returns the residual, a loss, a count and a note."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = feed_forward(0.2)
        self.head = nn.Linear(D, 2).double()

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor, str]:
        return self.inner(x), {"loss": self.head(x).square().mean(), "x": x}, torch.tensor(x.shape[1]), "note"


def test_auxiliary_losses() -> None:
    layers = ReversibleSequence(
        [(WithLoss(), feed_forward()), (feed_forward(), feed_forward()), (WithLoss(), WithLoss())]
    )
    x = streams()
    inputs = [x, *layers.parameters()]

    def loss(call: Any, use_streams: bool, which: list[tuple[int, int]]) -> Tensor:
        y, auxiliary = call(x)
        assert [len(items) for items in auxiliary] == [3, 0, 6]
        assert auxiliary[0][2] == "note"
        assert int(auxiliary[2][4]) == 5
        assert not auxiliary[2][4].requires_grad
        total = weigh(y) if use_streams else y.new_zeros(())
        for block, item in which:
            total = total + 3 * auxiliary[block][item]["loss"] + weigh(auxiliary[block][item]["x"])
        return total

    everything = [(0, 0), (2, 0), (2, 3)]
    for use_streams, which in ((True, everything), (False, everything), (False, [(0, 0)]), (False, [(2, 0)])):
        assert_same(
            gradients(lambda u=use_streams, w=which: loss(layers, u, w), inputs),
            gradients(lambda u=use_streams, w=which: loss(layers.ordinary, u, w), inputs),
        )


def test_auxiliary_results_do_not_change_with_the_streams() -> None:
    class Gives(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return torch.ones_like(x), x, x[..., 1:]

    layers = ReversibleSequence([(Gives(), Gives()) for _ in range(2)])
    x = streams()
    for context in (contextlib.nullcontext(), torch.no_grad()):
        with context:
            _, auxiliary = layers(x)
            _, expected = layers.ordinary(x)
        for ours, theirs in zip(auxiliary, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    layers = ReversibleSequence(
        [(feed_forward(0.2, torch.float32), feed_forward(0.2, torch.float32)) for _ in range(3)]
    )
    x = streams(dtype)
    seen = []
    layers.blocks[1].f[4].register_forward_hook(
        lambda m, a, out: seen.append((out.dtype, out.detach().clone()))
    )

    def loss(call: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = call(x)
        assert y.dtype == torch.float32
        return weigh(y)

    inputs = [x, *layers.parameters()]
    ours = gradients(lambda: loss(layers), inputs)
    # The backward pass runs outside autocast, and must recompute as within.
    assert [d for d, _ in seen] == [torch.bfloat16] * 2
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=0, atol=2e-2)
    theirs = gradients(lambda: loss(layers.ordinary), inputs)
    # Rebuilding in float32 changes some bfloat16 roundings.
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()


def test_autocast_off_in_forward_stays_off() -> None:
    layers = ReversibleSequence([(feed_forward(0.0, torch.float32), feed_forward(0.0, torch.float32))])
    x = streams(torch.float32)
    y, plain = weigh(layers(x)), weigh(layers.ordinary(x))
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(y, [x])
        # Its own arithmetic is under autocast here, in the ordinary graph too; the recomputation is not.
        theirs = torch.autograd.grad(plain, [x])
    torch.testing.assert_close(ours, theirs)


def test_autocast_keeps_no_copies_of_weights() -> None:
    layers = ReversibleSequence([(feed_forward(0.0, torch.float32), feed_forward(0.0, torch.float32))])
    found = []
    layers.blocks[0].f[1].register_forward_hook(lambda m, a, out: found.append(weakref.ref(m.weight)))
    with torch.autocast("cpu", torch.bfloat16):
        y = layers(streams(torch.float32))
        assert len(found) == 1
        assert found[0]() is None
    weigh(y).backward()


def test_compute_dtype() -> None:
    layers = ReversibleSequence(
        [(feed_forward(), feed_forward()) for _ in range(3)], compute_dtype=torch.bfloat16
    )
    layers.bfloat16()
    x = streams(torch.float32)
    y = layers(x)
    assert y.dtype == torch.float32
    inputs = [x, *layers.parameters()]
    theirs = torch.autograd.grad(weigh(layers.ordinary(x)), inputs)
    for a, b in zip(torch.autograd.grad(weigh(y), inputs), theirs, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).float().norm() <= 2e-2 * b.float().norm()


# Random numbers, buffers, parameters


def test_random_state_goes_on_as_if_nothing_had_been_recomputed() -> None:
    layers = sequence(2, 0.3)
    x = streams()

    def after(call: Any) -> list[Tensor]:
        torch.manual_seed(3)
        y = call(x)
        states = [torch.get_rng_state()]
        weigh(y).backward()
        return [*states, torch.get_rng_state()]

    assert all(map(torch.equal, after(layers), after(layers.ordinary)))


def test_without_random_state_dropout_differs() -> None:
    layers = sequence(3, 0.5, preserve_random_state=False)
    x = streams()
    ours = gradients(lambda: weigh(layers(x)), [x])
    theirs = gradients(lambda: weigh(layers.ordinary(x)), [x])
    torch.testing.assert_close(ours[0], theirs[0])
    assert (ours[1][0] - theirs[1][0]).abs().max() > 1e-3


def test_batch_norm_counts_each_step_once() -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(D).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)

    layers = ReversibleSequence([(Norm(), Norm())])
    other = copy.deepcopy(layers)
    x = streams()
    for _ in range(2):
        weigh(layers(x)).backward()
        weigh(other.ordinary(x)).backward()
    for (name, ours), theirs in zip(layers.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    assert int(layers.blocks[0].f.norm.num_batches_tracked) == 2


def test_recurrent_modules_that_list_their_parameters() -> None:
    class Recurrent(nn.GRU):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)[0]

    layers = ReversibleSequence(
        [(Recurrent(D, D, batch_first=True).double(), feed_forward()) for _ in range(2)]
    )
    x = streams()
    inputs = [x, *layers.parameters()]
    assert_same(
        gradients(lambda: weigh(layers(x)), inputs), gradients(lambda: weigh(layers.ordinary(x)), inputs)
    )


def test_functional_call() -> None:
    layers = sequence(2)
    values = {name: (p.detach() + 0.1).requires_grad_() for name, p in layers.named_parameters()}
    x = streams()

    def loss(call: Any) -> Tensor:
        # Not leaves: as a hypernetwork gives them.
        return weigh(call({name: 2 * value for name, value in values.items()}))

    inputs = [x, *values.values()]
    ours = gradients(lambda: loss(lambda v: torch.func.functional_call(layers, v, (x,))), inputs)
    ordinary = copy.deepcopy(layers)
    ordinary.forward = ordinary.ordinary
    theirs = gradients(lambda: loss(lambda v: torch.func.functional_call(ordinary, v, (x,))), inputs)
    assert_same(ours, theirs)


def test_parameter_changed_before_backward_raises() -> None:
    layers = sequence()
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    loss = weigh(layers(streams()))
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="changed in place between the forward pass and its backward"):
        loss.backward()


def test_argument_changed_before_backward_raises() -> None:
    layers = sequence()
    bias = torch.zeros(5, 5, dtype=torch.float64)
    loss = weigh(layers(streams(), bias))
    bias.add_(1)
    with pytest.raises(RuntimeError, match="an argument of shape"):
        loss.backward()


def test_training_steps_equal_ordinary() -> None:
    layers = sequence(3, 0.2)
    other = copy.deepcopy(layers)
    x = streams().detach()
    for call, module in ((layers, layers), (other.ordinary, other)):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        torch.manual_seed(5)
        for _ in range(3):
            for _ in range(2):  # gradient accumulation
                weigh(call(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(layers.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


# The graph


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
    # One output after the other, then both at once once more.
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
    torch.testing.assert_close(grad, torch.autograd.grad(weigh(layers.ordinary(x)), [x])[0])
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
    plain, inputs = torch.autograd.grad(weigh(layers.ordinary(x)), [weight, x])
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
            assert run()._slot is None
            assert run()._hold is None
        del y1, y2, loss, node
        assert run() is None
    finally:
        gc.enable()


def test_slot_is_freed_when_lower_blocks_are_frozen() -> None:
    layers = sequence(4)
    layers.blocks[:2].requires_grad_(False)
    y = layers(streams().detach())
    run = y.grad_fn.next_functions[0][0].run
    weigh(y).backward(retain_graph=True)
    assert run._slot is None


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
    theirs = gradients(lambda: weigh(layers.ordinary(x)), inputs)
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
        gradients(lambda: weigh(layers(x)), inputs), gradients(lambda: weigh(layers.ordinary(x)), inputs)
    )


def test_saved_tensor_hooks_see_the_last_streams_only() -> None:
    layers = sequence(5)
    x = streams()
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = layers(x)
    assert [t.shape for t in packed] == [y.shape]
    torch.testing.assert_close(
        torch.autograd.grad(weigh(y), [x]), torch.autograd.grad(weigh(layers.ordinary(x)), [x])
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
    expected = gradients(lambda: weigh(layers.ordinary(x)), [x := streams(), *layers.parameters()])
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


# What must raise


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
        assert y.grad_fn.next_functions[0][0].run._slot is None
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
    assert_same((y, list(again)), (y, list(torch.autograd.grad(weigh(layers.ordinary(x)), inputs))))


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
    for call in (layers, layers.ordinary):
        with pytest.raises(error, match=message):
            call(x)


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


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


# The rest


def test_identity_and_constant_parts() -> None:
    constant = torch.randn(2, 5, D, dtype=torch.float64)
    layers = ReversibleSequence(
        [
            (nn.Identity(), nn.Identity()),
            (Returns(lambda x: constant), feed_forward()),
            (nn.Identity(), nn.Identity()),
        ]
    )
    x = streams()
    inputs = [x, *layers.parameters()]
    assert_same(
        gradients(lambda: weigh(layers(x)), inputs), gradients(lambda: weigh(layers.ordinary(x)), inputs)
    )
    assert torch.equal(constant, constant.clone())


def test_no_blocks_and_no_elements() -> None:
    x = streams()
    empty = ReversibleSequence([])
    assert torch.equal(empty(x), x)
    y = sequence(2)(torch.zeros(0, 5, 2 * D, dtype=torch.float64, requires_grad=True))
    y.sum().backward()


def test_copies_and_state() -> None:
    layers = sequence(2)
    assert sorted(layers.state_dict())[0] == "blocks.0.f.norm.bias"
    other = copy.deepcopy(layers)
    buffer = io.BytesIO()
    torch.save(layers, buffer)
    buffer.seek(0)
    third = torch.load(buffer, weights_only=False)
    x = streams()
    assert torch.equal(layers(x), other(x))
    assert torch.equal(layers(x), third(x))
    assert "float" in repr(layers)


def test_remembered_choices_are_replayed_where_asked() -> None:
    made: list[Tensor] = []

    class Chooses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            def make() -> Tensor:
                made.append(x.detach().argmax(-1))
                return made[-1]

            return x * remember(make).unsqueeze(-1) * 0.1

    x = streams()
    for keep, expected in ((True, 4), (False, 8)):
        made.clear()
        layers = ReversibleSequence([(Chooses(), Chooses()) for _ in range(2)], keep_layouts=keep)
        ours = gradients(lambda layers=layers: weigh(layers(x)), [x])
        assert len(made) == expected
        assert_same(ours, gradients(lambda layers=layers: weigh(layers.ordinary(x)), [x]))


@pytest.mark.parametrize("residual", ["float", "exact"])
def test_memory_does_not_grow_with_depth(residual: Any) -> None:
    peaks: list[int] = []
    x = torch.randn(4, 512, 2 * D, requires_grad=True)
    for depth in (3, 12):
        layers = ReversibleSequence(
            [(feed_forward(0.1, torch.float32), feed_forward(0.1, torch.float32)) for _ in range(depth)],
            residual=residual,
        )
        weigh(layers(x)).backward()  # allocates the parameters' gradients
        peaks.append(peak_allocated(lambda layers=layers: weigh(layers(x)).backward()))
    # What grows: two random-number states of 5 KB a block.
    assert peaks[1] - 9 * 2 * 5200 <= 1.1 * peaks[0], peaks
    peaks.append(peak_allocated(lambda: weigh(layers.ordinary(x)).backward()))
    assert peaks[2] > 2 * peaks[1], peaks
