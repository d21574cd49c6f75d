"""Long sequences against float64: attention by the paper's definition, block by block of queries.

It shares no code with the kernels or with the package's reference: each query's keys are found by comparing
buckets and chunks of every round, and one softmax is taken over their union.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from reformer_kernels import Layout, LSHConfig, functional
from reformer_kernels.testing import TOLERANCE
from validation.context import Context, Row, attempts
from validation.judging import errors, inputs, judged

BLOCK = 512
"""Queries whose logits are held at once: 256 MiB a matrix at 64K tokens."""


def long_steps(context: Context) -> Iterator[Row]:
    """Outputs and gradients of the paper's rule at 16K and 64K tokens, by float64 in blocks."""
    checks = [
        (f"paper {str(dtype).removeprefix('torch.')} L={length}", partial(check, context, dtype, length))
        for length in context.pick((16384, 65536), (50,))
        for dtype in context.pick((torch.bfloat16, torch.float32), (torch.float32,))
    ]
    yield from attempts(checks)


def check(context: Context, dtype: torch.dtype, length: int) -> Row:
    """The errors of `attend` against float64, on one layout."""
    heads, size = context.pick((2, 64), (1, 16))
    config = LSHConfig.paper(n_hashes=context.pick(4, 2), chunk_length=context.pick(64, 8), causal=True)
    leaves = inputs(context, dtype, (1, heads, length, size), (1, heads, length, size))
    layout = functional.lsh_layout(leaves[0].detach(), config, seed=0, backend=context.backend)
    grad_out = torch.randn((1, heads, length, size), device=context.device).to(dtype)
    out = functional.attend(*leaves, layout, config, backend=context.backend)
    ours = [out, *torch.autograd.grad(out, leaves, grad_out)]
    expected = torch.stack(
        [
            torch.stack(
                by_definition(
                    *(x.detach()[0, head].double() for x in (*leaves, grad_out)), layout, head, config
                )
            )
            for head in range(heads)
        ],
        1,
    )
    names = ["out", "dqk", "dv"]
    return judged(errors(names, [x[0] for x in ours], list(expected)), TOLERANCE[dtype])


def by_definition(
    qk: Tensor, v: Tensor, grad_out: Tensor, layout: Layout, head: int, config: LSHConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """out, dqk and dv (L, D) float64 of one head of causal attention by the paper's rule."""
    length = len(qk)
    order = layout.order[0, head].long()
    ranks = torch.empty_like(order).scatter_(
        1, order, torch.arange(length, device=qk.device).expand_as(order)
    )
    starts = layout.bucket_starts[0, head].long()
    buckets = torch.searchsorted(starts, ranks.contiguous(), right=True)
    chunks = ranks // config.chunk_length
    queries = qk.clone().requires_grad_()
    normed = queries * torch.rsqrt(queries.square().mean(-1, keepdim=True) + 1e-6) * qk.shape[1] ** -0.5
    keys, values = normed.detach().requires_grad_(), v.clone().requires_grad_()
    positions = torch.arange(length, device=qk.device)
    outs, dq = [], torch.zeros_like(qk)
    for start in range(0, length, BLOCK):
        block = slice(start, min(start + BLOCK, length))
        met = torch.zeros((block.stop - start, length), dtype=torch.bool, device=qk.device)
        for bucket, chunk in zip(buckets, chunks, strict=True):
            behind = chunk[block, None] - chunk[None]
            near = (behind >= 0) & (behind <= config.chunks_before)
            met |= (bucket[block, None] == bucket[None]) & near
        met &= positions[None] < positions[block, None]
        alone = ~met.any(1)
        met[alone, positions[block][alone]] = True  # a query that sees nothing else attends to itself
        mine = qk[block].clone().requires_grad_()
        logits = (mine @ keys.T).masked_fill(~met, float("-inf"))
        out = logits.softmax(-1) @ values
        grads = torch.autograd.grad(out, [mine, keys, values], grad_out[block])
        outs.append(out.detach())
        dq[block] = grads[0]
        keys.grad = grads[1] if keys.grad is None else keys.grad + grads[1]
        values.grad = grads[2] if values.grad is None else values.grad + grads[2]
    assert keys.grad is not None and values.grad is not None
    (through_keys,) = torch.autograd.grad(normed, queries, keys.grad)
    return torch.cat(outs), dq + through_keys, values.grad
