"""Faults that a right result does not show: races, host synchronisation, calls that no graph can capture."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from reformer_kernels import LSHConfig, functional
from validation.calls import capture
from validation.context import Context, Row, attempts


class FixedCall:
    """`lsh_attention` forward and backward on tensors that keep their addresses, as a graph needs them."""

    def __init__(self, context: Context, config: LSHConfig, shape: tuple[int, ...], dropout: float) -> None:
        dtype = context.pick(torch.bfloat16, torch.float32)
        qk, v, self.grad_out = (torch.randn(shape, device=context.device).to(dtype) for _ in range(3))
        self.leaves = [qk.requires_grad_(), v.requires_grad_()]
        self.rotations = functional.sample_rotations(config, shape[1], shape[3], 0).to(context.device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=context.device)
        self.config, self.dropout, self.backend = config, dropout, context.backend

    def __call__(self) -> tuple[Tensor, ...]:
        out = functional.lsh_attention(
            *self.leaves,
            self.config,
            rotations=self.rotations,
            dropout_p=self.dropout,
            seed=self.seed,
            backend=self.backend,
        )
        return out.detach(), *torch.autograd.grad(out, self.leaves, self.grad_out)


def race_steps(context: Context) -> Iterator[Row]:
    """Repeats one forward and backward pass, whose results must be bitwise equal every time."""

    def check(config: LSHConfig, dropout: float) -> Row:
        call = FixedCall(context, config, context.pick((2, 8, 4096, 64), (1, 1, 24, 16)), dropout)
        passes = context.pick(1000, 2)
        first = call()
        different = torch.zeros(len(first), dtype=torch.int64, device=context.device)
        for _ in range(passes):
            different += torch.stack([(a != b).any() for a, b in zip(call(), first, strict=True)])
        counts = dict(zip(("out", "dqk", "dv"), different.tolist(), strict=True))
        return {"ok": not any(counts.values()), "passes": passes, "different": counts}

    chunk = context.pick(64, 16)
    paper = LSHConfig.paper(n_hashes=context.pick(4, 2), chunk_length=chunk, causal=True)
    checks = [("paper, dropout", lambda: check(paper, 0.1))]
    if not context.dry_run:
        ring = LSHConfig.trax(n_hashes=4, chunk_length=chunk)
        bucket = LSHConfig.paper(n_hashes=2, chunk_length=chunk, window="bucket", causal=True)
        checks += [("trax", lambda: check(ring, 0.0)), ("bucket", lambda: check(bucket, 0.0))]
    yield from attempts(checks)


def capture_steps(context: Context) -> Iterator[Row]:
    """No call waits for the device, and a CUDA graph of a call replays on new numbers in its tensors."""
    chunk = context.pick(64, 16)
    config = LSHConfig.paper(n_hashes=2, chunk_length=chunk, causal=True)
    shape = context.pick((2, 8, 4096, 64), (1, 1, 24, 16))

    def without_synchronisation() -> Row:
        call = FixedCall(context, config, shape, 0.1)
        call()
        context.synchronize()
        if context.dry_run:
            return {"skipped": "torch reports synchronisation on CUDA devices only"}
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {}

    def captured() -> Row:
        call = FixedCall(context, config, shape, 0.1)
        if context.dry_run:
            call()
            return {"skipped": "only CUDA has graphs; the call itself ran"}
        graph, results = capture(call)
        equal = []
        for seed in (1, 2):
            with torch.no_grad():
                for tensor in (*call.leaves, call.rotations):
                    tensor.normal_()
                call.seed.fill_(seed)
            graph.replay()
            replayed = [x.clone() for x in results]
            equal += [torch.equal(a, b) for a, b in zip(call(), replayed, strict=True)]
        return {"ok": all(equal), "replays": 2, "equal": equal}

    yield from attempts([("no host synchronisation", without_synchronisation), ("graph", captured)])
