"""The calls of the benchmarks of layers: reversible blocks, the chunked feed-forward and the chunked loss.

Each builder makes the call of one row; rows of one table have equal parameters and inputs. "plain" is what
PyTorch does without this package.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reformer_kernels.benchmarks.calls import Call, Trained, hidden_states, module_call, seeded
from reformer_kernels.benchmarks.checks import Agreement, Calls
from reformer_kernels.benchmarks.sizes import Sizes
from reformer_kernels.benchmarks.timing import between, mark
from reformer_kernels.config import LSHConfig
from reformer_kernels.functional import linear_cross_entropy
from reformer_kernels.modules import LSHSelfAttention
from reformer_kernels.modules.feed_forward import ChunkedFeedForward
from reformer_kernels.reversible.blocks import ReversibleSequence

ACTIVATIONS = {"gelu": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU(), "gelu_tanh": nn.GELU("tanh")}
REDUCTIONS = ("mean", "sum", "none")

DRIFT_SIZES: dict[str, Any] = {"length": 256, "width": 64, "heads": 2, "d_ff": 128}
"""Sizes at which rebuilt activations are compared with the first ones."""

DRIFT_LIMIT = {"float64": 1e-10, "float32": 1e-4, "float16": 0.1, "bfloat16": 0.5}
"""The largest relative error of rebuilt inputs and of gradients. Errors grow with depth: 48 layers were seen
to reach 6e-7 in float32 and 0.2 in bfloat16."""


class PreNorm(nn.Module):
    """inner(LayerNorm(x))."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(self.norm(x))
        return result


def reversible_layers(sizes: Sizes) -> ReversibleSequence:
    """Pairs of an attention and a feed-forward, each after a LayerNorm; variant "feed-forward" has no
    attention but a second feed-forward in its place."""
    config = LSHConfig(causal=True, n_hashes=sizes.n_hashes, chunk_length=sizes.chunk_length)
    width, d_ff = sizes.width, sizes.d_ff

    def feed_forward() -> nn.Module:
        return nn.Sequential(nn.Linear(width, d_ff), nn.GELU(), nn.Linear(d_ff, width))

    with seeded():
        pairs: list[tuple[nn.Module, nn.Module]] = []
        for _ in range(sizes.layers):
            f = (
                LSHSelfAttention(width, sizes.heads, config)
                if sizes.variant == "attention"
                else feed_forward()
            )
            pairs.append((PreNorm(f, width), PreNorm(feed_forward(), width)))
        return ReversibleSequence(pairs).to(sizes.device, sizes.torch_dtype)


def build_reversible(name: str, sizes: Sizes) -> Call:
    """Blocks run plainly, with checkpointing, reversibly (float and exact), or by `reformer_pytorch`."""
    layers = reversible_layers(sizes)
    function: Callable[[Tensor], Tensor] = layers
    if name == "plain":
        function = layers.plain
    elif name == "checkpoint":
        function = partial(_checkpointed, layers)
    elif name == "reversible exact":
        function = ReversibleSequence(layers.blocks, residual="exact")
    elif name == "reformer_pytorch":
        function = _lucidrains(layers)
    elif name != "reversible float":
        raise KeyError(name)
    return module_call(name, sizes, function, hidden_states(sizes, 2 * sizes.width, sizes.torch_dtype))


def _checkpointed(layers: ReversibleSequence, x: Tensor) -> Tensor:
    streams = x.chunk(2, dim=-1)
    for block in layers.blocks:
        streams = checkpoint(block, *streams, use_reentrant=False)
    return torch.cat(streams, dim=-1)


def _lucidrains(layers: ReversibleSequence) -> Callable[[Tensor], Tensor]:
    from reformer_pytorch.reversible import ReversibleSequence as Peer

    peer = Peer(nn.ModuleList([nn.ModuleList(list(block.children())) for block in layers.blocks]))
    peer.train()

    def call(x: Tensor) -> Tensor:
        result: Tensor = peer(x, arg_route=(False, False))
        return result

    return call


def check_drift(sizes: Sizes, calls: Calls) -> Iterator[Agreement]:
    """Reversible blocks against the same blocks run plainly, on small tensors, as deep as the benchmark's.

    "rebuilt input": |rebuilt - first| / |first| of what the first block reads. "gradients": the same of all
    parameters' gradients together, against plain blocks in the same dtype (the exact mode rounds its streams
    differently, so there it is not the error of rebuilding alone). "elements that differ": how many elements
    of the first block's input are not rebuilt to the last bit, out of 16384.
    """
    small = dataclasses.replace(sizes, **DRIFT_SIZES, batch=1)
    base = reversible_layers(small).eval()
    x = hidden_states(small, 2 * small.width, small.torch_dtype).requires_grad_()
    with seeded():
        grad = torch.randn(x.shape).to(x.device, x.dtype)
    base.plain(x).backward(grad)
    expected = [parameter.grad for parameter in base.parameters()]
    limit = DRIFT_LIMIT[sizes.dtype]
    for name, residual in (("reversible float", "float"), ("reversible exact", "exact")):
        layers = ReversibleSequence(copy.deepcopy(base.blocks), residual=residual).eval()  # type: ignore[arg-type]
        layers.zero_grad()
        first, rebuilt = _first_input(layers, x, grad)
        gradients = [parameter.grad for parameter in layers.parameters()]
        if residual == "exact":
            layers.check()
            yield Agreement(name, "rebuilt elements that differ", int((first != rebuilt).sum()), 0)
        else:
            error = float((rebuilt - first).norm() / first.norm())
            yield Agreement(name, "rebuilt input error", error, limit)
        yield Agreement(name, "gradient error", _relative(gradients, expected), limit)


def _first_input(layers: ReversibleSequence, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """What the first block reads in the forward pass, and what the backward pass rebuilds of it."""
    seen: list[Tensor] = []
    f, _ = layers.blocks[0].children()
    hook = f.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().double().clone()))
    layers(x).backward(grad)
    hook.remove()
    first, rebuilt = seen
    return first, rebuilt


def _relative(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """|actual - expected| / |expected| of all tensors together."""
    error = size = 0.0
    for a, b in zip(actual, expected, strict=True):
        if a is not None and b is not None:
            error += float((a.double() - b.double()).square().sum())
            size += float(b.double().square().sum())
    return float((error / size) ** 0.5)


def build_feed_forward(name: str, sizes: Sizes) -> Call:
    """`ChunkedFeedForward` beside `nn.Sequential` of the same parameters, and that with checkpointing."""
    with seeded():
        chunked = ChunkedFeedForward(sizes.width, sizes.d_ff, activation=sizes.variant)
    chunked = chunked.to(sizes.device, sizes.torch_dtype)
    plain = nn.Sequential(chunked.inner, ACTIVATIONS[sizes.variant], chunked.outer)
    functions: dict[str, Callable[..., Any]] = {
        "plain": plain,
        "chunked": chunked,
        "checkpoint": partial(checkpoint, plain, use_reentrant=False),
    }
    return module_call(name, sizes, functions[name], hidden_states(sizes, sizes.width, sizes.torch_dtype))


def build_loss(name: str, sizes: Sizes) -> Call:
    """`linear_cross_entropy` beside `F.linear` and `F.cross_entropy`, on B * L tokens."""
    device, dtype, reduction = torch.device(sizes.device), sizes.torch_dtype, sizes.variant
    x = hidden_states(sizes, sizes.width, dtype).flatten(0, 1).requires_grad_()
    with seeded():
        weight = torch.randn(sizes.vocabulary, sizes.width) / sizes.width**0.5
        target = torch.randint(sizes.vocabulary, (len(x),)).to(device)
    weight = weight.to(device, dtype).requires_grad_()

    def plain() -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target, reduction=reduction)

    def chunked() -> Tensor:
        return linear_cross_entropy(x, weight, target, reduction=reduction)  # type: ignore[arg-type]

    function = {"plain": plain, "chunked": chunked}[name]

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return [function()]

    def train() -> Trained:
        loss = function()
        start = mark(device)
        gradients = torch.autograd.grad(loss, (x, weight), torch.ones_like(loss))
        return Trained([loss.detach(), *gradients], between(start, mark(device)))

    return Call(name, sizes, forward, train, inputs=[x, weight])
