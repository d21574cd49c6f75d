"""Threads that share a reversible sequence: right gradients, or an error."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from python_tests.reversible.cases import assert_same, sequence, streams, weigh

THREADS = 4


@pytest.fixture(autouse=True)
def _frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], object], threads: int = THREADS) -> list[object]:
    """What `work(0)`, `work(1)`, ... return or raise in threads that start together."""
    results: list[object] = [None] * threads
    barrier = threading.Barrier(threads)

    def run(number: int) -> None:
        barrier.wait()
        try:
            results[number] = work(number)
        except Exception as error:
            results[number] = error

    workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert not worker.is_alive(), "the threads wait for one another"
    return results


@pytest.mark.parametrize("residual", ["float", "exact"])
def test_threads_that_share_a_sequence_get_their_own_gradients(residual: str) -> None:
    layers = sequence(2, residual=residual)
    parameters = list(layers.parameters())
    inputs = [streams() for _ in range(THREADS)]

    def step(number: int) -> list[Tensor]:
        call = layers.plain if residual == "float" and number == THREADS - 1 else layers
        return list(torch.autograd.grad(weigh(call(inputs[number])), [inputs[number], *parameters]))

    expected = [step(number) for number in range(THREADS)]
    for _ in range(40):
        for result, alone in zip(in_threads(step), expected, strict=True):
            if isinstance(result, Exception):
                raise result
            assert_same((inputs[0], result), (inputs[0], alone))
    assert list(map(id, layers.parameters())) == list(map(id, parameters))


def test_threads_that_share_a_sequence_with_dropout() -> None:
    """The masks of a recomputation are those of the same thread's forward pass."""
    layers = sequence(2, dropout=0.5)
    masks = threading.local()

    for block in layers.blocks:
        block.g[3].register_forward_hook(lambda m, a, out: masks.seen.append((out == 0).clone()))

    def step(number: int) -> bool:
        x = streams_of(number)
        masks.seen = []
        loss = weigh(layers(x))
        torch.autograd.grad(loss, [x])
        first, second, again_second, again_first = masks.seen
        return torch.equal(first, again_first) and torch.equal(second, again_second)

    for _ in range(40):
        for result in in_threads(step):
            if isinstance(result, Exception):
                raise result
            assert result


def streams_of(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(2, 5, 12, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("call", [1, 2], ids=["forward", "backward"])
def test_random_numbers_of_another_thread_raise(call: int) -> None:
    layers = sequence(2, dropout=0.5)
    x = streams()
    calls = []

    def draw(*_: object) -> None:
        calls.append(None)
        if len(calls) == call:
            other = threading.Thread(target=lambda: torch.rand(3))
            other.start()
            other.join()

    layers.blocks[1].g[1].register_forward_hook(draw)
    loss = weigh(layers(x))
    with pytest.raises(RuntimeError, match=r"g of block 1 drew other random numbers .* Another thread"):
        loss.backward()
    weigh(layers(x)).backward()  # nothing stays damaged
