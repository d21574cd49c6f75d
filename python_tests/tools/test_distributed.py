"""ReversibleSequence under DistributedDataParallel and FSDP2, in two gloo processes on the CPU."""

from __future__ import annotations

import copy
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reformer_kernels.reversible.blocks import ReversibleSequence

WORLD = 2
D = 8
SCENARIOS: dict[str, Callable[[int], None]] = {}

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this build of torch has no gloo",
)


def scenario(function: Callable[[int], None]) -> Callable[[int], None]:
    SCENARIOS[function.__name__] = function
    return function


class Part(nn.Module):
    """A feed-forward that also returns a loss, whose mean over processes is that of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.net(x if shift is None else x + shift.to(x.dtype))
        return y, y.square().mean()


class Model(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 2 * D)
        self.shift = nn.Parameter(torch.randn(D))
        self.layers = ReversibleSequence([(Part(), Part()) for _ in range(3)], **settings)
        self.head = nn.Linear(2 * D, 3)
        self.is_ordinary = False

    def forward(self, x: Tensor) -> Tensor:
        call = self.layers.plain if self.is_ordinary else self.layers
        y, auxiliary = call(self.embed(x), self.shift)
        return self.head(y).square().mean() + sum(loss for losses in auxiliary for loss in losses)


def batches(steps: int = 2) -> Tensor:
    return torch.randn(steps, 2 * WORLD, 5, 4, generator=torch.Generator().manual_seed(7))


def model(**settings: Any) -> Model:
    torch.manual_seed(0)
    return Model(**settings)


def trained_alone(start: Model, data: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and last gradients after one step on each whole batch, with the ordinary graph."""
    reference = copy.deepcopy(start)
    reference.is_ordinary = True
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for batch in data:
        optimizer.zero_grad()
        reference(batch).backward()
        optimizer.step()
    named = list(reference.named_parameters())
    return {n: p.detach() for n, p in named}, {n: p.grad for n, p in named if p.grad is not None}


def share(batch: Tensor, rank: int) -> Tensor:
    return batch.chunk(WORLD)[rank]


def assert_trained_like_alone(
    start: Model, trained: nn.Module, data: Tensor, tolerance: float = 1e-5
) -> None:
    parameters, gradients = trained_alone(start, data)
    found = dict(trained.named_parameters())
    assert set(found) == set(parameters)
    for name, parameter in found.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (parameter, parameter.grad)]
        for ours, theirs in zip(whole, (parameters[name], gradients[name]), strict=True):
            torch.testing.assert_close(
                ours.detach().float(),
                theirs.float(),
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def train(wrapped: nn.Module, parameters: Any, data: Tensor, rank: int) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for batch in data:
        optimizer.zero_grad()
        wrapped(share(batch, rank)).backward()
        optimizer.step()


@scenario
def ddp(rank: int) -> None:
    for residual in ("float", "exact"):
        for settings in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
            start = model(residual=residual)
            inner = copy.deepcopy(start)
            wrapped = nn.parallel.DistributedDataParallel(inner, **settings)
            train(wrapped, inner.parameters(), batches(), rank)
            assert_trained_like_alone(start, inner, batches())


@scenario
def ddp_reduces_each_block_as_it_finishes(rank: int) -> None:
    inner = model()
    wrapped = nn.parallel.DistributedDataParallel(inner, bucket_cap_mb=0.0005, gradient_as_bucket_view=True)
    events: list[str] = []

    def reduce(state, bucket):  # type: ignore[no-untyped-def]  # torch reads the annotations
        events.append("reduce")
        future = torch.distributed.all_reduce(bucket.buffer().div_(WORLD), async_op=True).get_future()
        return future.then(lambda f: f.value()[0])

    wrapped.register_comm_hook(None, reduce)
    inner.layers.blocks[0].f.register_forward_pre_hook(lambda m, a: events.append("block 0"))
    for batch in batches(3):  # buckets are rebuilt after the first step
        events.clear()
        wrapped(share(batch, rank)).backward()
    # The recomputation of block 0 comes after the first gradients of the blocks above have been sent.
    assert events[0] == "block 0"
    assert events.index("reduce") < events.index("block 0", 1), events


def sharded(start: Model, **settings: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    inner = copy.deepcopy(start)
    for block in inner.layers.blocks:
        fully_shard(block, **settings)
    return fully_shard(inner)


@scenario
def fsdp_by_block(rank: int) -> None:
    for residual in ("float", "exact"):
        for settings in ({}, {"reshard_after_forward": False}):
            start = model(residual=residual)
            wrapped = sharded(start, **settings)
            train(wrapped, wrapped.parameters(), batches(), rank)
            assert_trained_like_alone(start, wrapped, batches())


@scenario
def fsdp_mixed_precision(rank: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    start = model()
    for block in start.layers.blocks:
        block.compute_dtype = torch.bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    wrapped = copy.deepcopy(start)
    for block in wrapped.layers.blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(wrapped)
    wrapped(share(batches()[0], rank)).backward()
    for block in start.layers.blocks:
        block.compute_dtype = None
    _, gradients = trained_alone(start, batches()[:1])
    for name, parameter in wrapped.named_parameters():
        ours, theirs = parameter.grad.full_tensor(), gradients[name]
        assert (ours - theirs).norm() <= 0.05 * theirs.norm() + 1e-3, name


@scenario
def fsdp_that_casts_inputs_raises(rank: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    wrapped = sharded(model(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="cast_forward_inputs=False"):
        wrapped(share(batches()[0], rank))


@scenario
def fsdp_of_a_part_raises(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for choose in (lambda block: block.f, lambda block: block.g.net[1]):
        inner = model()
        fully_shard(choose(inner.layers.blocks[1]))
        with pytest.raises(RuntimeError, match="within block 1: its gradients would be lost"):
            inner(share(batches()[0], rank))


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
    results = {}
    for name, function in SCENARIOS.items():
        try:
            function(rank)
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
            # The processes may now be out of step; what follows would only wait.
            break
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=WORLD, join=False)
    try:
        deadline = time.monotonic() + 120
        while not context.join(timeout=5):  # True once all have ended
            if time.monotonic() > deadline:
                raise TimeoutError("the processes did not end within 120 s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(WORLD)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes(results: list[dict[str, str | None]], name: str) -> None:
    for rank, result in enumerate(results):
        assert name in result, f"process {rank} stopped before this scenario"
        assert result[name] is None, f"process {rank}: {result[name]}"
