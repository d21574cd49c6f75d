"""ReversibleSequence against the same blocks on an ordinary graph: numbers, random state, buffers."""

from __future__ import annotations

import contextlib
import copy
import io
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from python_tests.reversible.cases import (
    Attention,
    D,
    Returns,
    assert_same,
    feed_forward,
    gradients,
    sequence,
    streams,
    weigh,
)
from reformer_kernels.benchmarks.memory import peak_allocated
from reformer_kernels.reversible import remember
from reformer_kernels.reversible.blocks import ReversibleBlock, ReversibleSequence
from reformer_kernels.reversible.recomputation import RandomStateStore

# Numbers


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_equal_ordinary(depth: int, dropout: float, training: bool) -> None:
    layers = sequence(depth, dropout).train(training)
    x = streams()
    inputs = [x, *layers.parameters()]
    ours = gradients(lambda: weigh(layers(x)), inputs)
    assert_same(ours, gradients(lambda: weigh(layers.plain(x)), inputs))
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
    assert_same(gradients(lambda: loss(layers), inputs), gradients(lambda: loss(layers.plain), inputs))


@pytest.mark.parametrize("used", [0, 1])
def test_part_of_the_outputs(used: int) -> None:
    layers = sequence()
    x = streams()
    inputs = [x, *layers.parameters()]
    assert_same(
        gradients(lambda: weigh(layers(x.chunk(2, -1))[used]), inputs),
        gradients(lambda: weigh(layers.plain(x.chunk(2, -1))[used]), inputs),
    )


def test_part_of_the_inputs_of_grad() -> None:
    layers = sequence(4)
    x = streams()
    last = list(layers.blocks[3].parameters())
    assert_same(gradients(lambda: weigh(layers(x)), last), gradients(lambda: weigh(layers.plain(x)), last))


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
    assert_same(ours, gradients(lambda: loss(layers.plain), inputs))


def test_route_sends_arguments_to_one_part() -> None:
    bias = torch.randn(5, 5, dtype=torch.float64)
    for route in ("f", "g"):
        parts = (Attention(), feed_forward())
        layers = ReversibleSequence([parts if route == "f" else parts[::-1]], route=route)
        x = streams()
        assert not torch.equal(layers(x, bias), layers(x))
        torch.testing.assert_close(layers(x, bias), layers.plain(x, bias), rtol=0, atol=0)


def test_frozen_parameters() -> None:
    layers = sequence(4)
    layers.blocks[0].requires_grad_(False)
    layers.blocks[2].f.requires_grad_(False)
    for needs_input_grad in (True, False):
        x = streams().detach().requires_grad_(needs_input_grad)
        inputs = [t for t in [x, *layers.parameters()] if t.requires_grad]
        assert_same(
            gradients(lambda x=x: weigh(layers(x)), inputs),
            gradients(lambda x=x: weigh(layers.plain(x)), inputs),
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
        gradients(lambda: weigh(layers.plain(layers.plain(x))), inputs),
    )


def test_sequence_in_a_sequence() -> None:
    inner = ReversibleSequence([(nn.Linear(D // 2, D // 2), nn.Linear(D // 2, D // 2)) for _ in range(2)])
    inner.double()
    layers = ReversibleSequence([(inner, feed_forward(0.2)), (feed_forward(0.2), inner)])
    x = streams()
    inputs = [x, *layers.parameters()]
    assert_same(
        gradients(lambda: weigh(layers(x)), inputs), gradients(lambda: weigh(layers.plain(x)), inputs)
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
            gradients(lambda u=use_streams, w=which: loss(layers.plain, u, w), inputs),
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
            _, expected = layers.plain(x)
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
    theirs = gradients(lambda: loss(layers.plain), inputs)
    # Rebuilding in float32 changes some bfloat16 roundings.
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()


def test_autocast_off_in_forward_stays_off() -> None:
    layers = ReversibleSequence([(feed_forward(0.0, torch.float32), feed_forward(0.0, torch.float32))])
    x = streams(torch.float32)
    y, plain = weigh(layers(x)), weigh(layers.plain(x))
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
    theirs = torch.autograd.grad(weigh(layers.plain(x)), inputs)
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

    assert all(map(torch.equal, after(layers), after(layers.plain)))


def test_the_states_of_a_run_lie_in_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one they would lie between activations, and keep the heap from giving their memory back."""
    kept: list[Tensor] = []
    keep = RandomStateStore.keep
    monkeypatch.setattr(RandomStateStore, "keep", lambda store: kept.append(keep(store)) or kept[-1])
    sequence(5, 0.3)(streams())
    assert len(kept) == 10 and len({state.untyped_storage().data_ptr() for state in kept}) == 1
    store = RandomStateStore(2)  # a block that a hook calls again needs more than was foreseen
    states = []
    for seed in range(5):
        torch.manual_seed(seed)
        states.append(store.keep())
    for seed, state in enumerate(states):
        torch.manual_seed(seed)
        assert torch.equal(state, torch.get_rng_state())


def test_without_random_state_dropout_differs() -> None:
    layers = sequence(3, 0.5, preserve_random_state=False)
    x = streams()
    ours = gradients(lambda: weigh(layers(x)), [x])
    theirs = gradients(lambda: weigh(layers.plain(x)), [x])
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
        weigh(other.plain(x)).backward()
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
        gradients(lambda: weigh(layers(x)), inputs), gradients(lambda: weigh(layers.plain(x)), inputs)
    )


def test_functional_call() -> None:
    layers = sequence(2)
    values = {name: (p.detach() + 0.1).requires_grad_() for name, p in layers.named_parameters()}
    x = streams()

    def loss(call: Any) -> Tensor:
        # Not leaves, like the parameters that a hypernetwork computes.
        return weigh(call({name: 2 * value for name, value in values.items()}))

    inputs = [x, *values.values()]
    ours = gradients(lambda: loss(lambda v: torch.func.functional_call(layers, v, (x,))), inputs)
    ordinary = copy.deepcopy(layers)
    ordinary.forward = ordinary.plain
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
    for call, module in ((layers, layers), (other.plain, other)):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        torch.manual_seed(5)
        for _ in range(3):
            for _ in range(2):  # gradient accumulation
                weigh(call(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(layers.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)


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
        gradients(lambda: weigh(layers(x)), inputs), gradients(lambda: weigh(layers.plain(x)), inputs)
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
        assert_same(ours, gradients(lambda layers=layers: weigh(layers.plain(x)), [x]))


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
    # What grows is two states of the random number generator, 5 KB each, for each block.
    assert peaks[1] - 9 * 2 * 5200 <= 1.1 * peaks[0], peaks
    peaks.append(peak_allocated(lambda: weigh(layers.plain(x)).backward()))
    assert peaks[2] > 2 * peaks[1], peaks
