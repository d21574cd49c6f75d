"""The calls that are timed and swept, prepared on random tensors of one shape."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reformer_kernels import LSHConfig, functional
from reformer_kernels.benchmarks.peers import FullAttention
from reformer_kernels.benchmarks.sizes import Sizes
from reformer_kernels.gpu.cost_model import Shape
from validation.context import Context

Call = Callable[[], Any]
FORWARD, BOTH = "forward", "forward+backward"


def capture(call: Call) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of the call, and the results that it writes.

    The call first runs on a stream of its own, which compiles its kernels.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def shape_of(context: Context, **fields: int) -> Shape:
    """The default shape with these fields; in a dry run a tiny one, whatever the fields."""
    shape = Shape(**fields)
    if not context.dry_run:
        return shape
    return dataclasses.replace(shape, heads=1, length=24, head_dim=16, chunk_length=16, n_hashes=2, bits=32)


def dtype_of(shape: Shape) -> torch.dtype:
    """bfloat16 or float32, by the shape's bits."""
    return torch.bfloat16 if shape.bits == 16 else torch.float32


def leaves_of(context: Context, shape: Shape, count: int) -> list[Tensor]:
    """So many random tensors (1, H, L, D) of the shape, whose gradients are taken."""
    size = (1, shape.heads, shape.length, shape.head_dim)
    tensors = [torch.randn(size, device=context.device).to(dtype_of(shape)) for _ in range(count)]
    return [x.requires_grad_() for x in tensors]


def differentiated(
    call: Callable[..., Tensor], leaves: list[Tensor], phase: str, like: int | None = None
) -> Call:
    """The forward pass of `call` on the leaves, or forward and backward with a random gradient of the output.

    The output has the shape of leaf `like`; of the first one's rows and the last one's columns if it is None.
    """
    size = (*leaves[0].shape[:-1], leaves[-1].shape[-1]) if like is None else leaves[like].shape
    grad_out = torch.randn(size, device=leaves[0].device).to(leaves[0].dtype)

    def forward() -> Tensor:
        with torch.no_grad():
            return call(*leaves)

    def both() -> tuple[Tensor, ...]:
        out = call(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad_out)

    return forward if phase == FORWARD else both


def _config(shape: Shape, preset: str) -> LSHConfig:
    rules: dict[str, Any] = {"n_hashes": shape.n_hashes, "chunk_length": shape.chunk_length, "causal": True}
    if preset == "trax":
        return LSHConfig.trax(**rules)
    return LSHConfig.paper(**rules, window="bucket" if preset == "bucket" else "chunks")


def _rotations(context: Context, shape: Shape, config: LSHConfig) -> Tensor:
    return functional.sample_rotations(config, shape.heads, shape.head_dim, 0).to(context.device)


def attend(context: Context, shape: Shape, phase: str, preset: str = "paper") -> Call:
    """The attention kernels alone, on a layout that is not part of the call."""
    config, leaves, backend = _config(shape, preset), leaves_of(context, shape, 2), context.backend
    rotations = _rotations(context, shape, config)
    layout = functional.lsh_layout(leaves[0], config, rotations=rotations, backend=backend)
    return differentiated(
        lambda qk, v: functional.attend(qk, v, layout, config, backend=backend), leaves, phase
    )


def lsh_attention(context: Context, shape: Shape, phase: str, preset: str = "paper") -> Call:
    """Hash, sort and attend."""
    config, leaves, backend = _config(shape, preset), leaves_of(context, shape, 2), context.backend
    rotations = _rotations(context, shape, config)
    return differentiated(
        lambda qk, v: functional.lsh_attention(qk, v, config, rotations=rotations, backend=backend),
        leaves,
        phase,
    )


def local(context: Context, shape: Shape, phase: str) -> Call:
    """Local attention over chunks."""
    return differentiated(
        lambda q, k, v: functional.local_attention(
            q, k, v, chunk_length=shape.chunk_length, causal=True, backend=context.backend
        ),
        leaves_of(context, shape, 3),
        phase,
    )


def full(context: Context, shape: Shape, phase: str, peer: str) -> Call:
    """Dense attention by a back end of torch's; raises PeerRefusesError where it cannot take the shape."""
    sizes = Sizes(
        heads=shape.heads,
        length=shape.length,
        head_dim=shape.head_dim,
        causal=True,
        dtype=str(dtype_of(shape)).removeprefix("torch."),
        device=str(context.device),
    )
    return differentiated(FullAttention(peer, sizes).attend, leaves_of(context, shape, 3), phase)


def lsh_hash(context: Context, shape: Shape) -> Call:
    """Hashing of all rounds."""
    config = _config(shape, "paper")
    factors, rotations = config.factors(shape.length), _rotations(context, shape, config)
    qk = leaves_of(context, shape, 1)[0].detach()
    return lambda: functional.lsh_hash(qk, rotations, factors, backend=context.backend)


def n_buckets_of(shape: Shape) -> int:
    """The automatic number of buckets."""
    return math.prod(_config(shape, "paper").factors(shape.length))


def sort(context: Context, shape: Shape, by: str) -> Call:
    """The sort of bucket ids: by "bucket_sort", or by torch's stable sort of "int32" or "int64" numbers."""
    n_buckets = n_buckets_of(shape)
    size = (1, shape.heads, shape.n_hashes, shape.length)
    ids = torch.randint(0, n_buckets, size, dtype=torch.int32).to(context.device)
    if by == "bucket_sort":
        return lambda: functional.bucket_sort(ids, n_buckets, backend=context.backend)
    wide = ids.to(torch.int64 if by == "int64" else torch.int32)
    return lambda: torch.sort(wide, dim=-1, stable=True)
