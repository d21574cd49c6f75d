"""Time and memory of the reversible layers, the chunked feed-forward and the chunked loss, beside plain
PyTorch.

Each `bench_*` function returns the rows of `steps.compare`. Memory is what torch allocates beyond parameters,
their gradients, inputs, outputs and their gradients.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reformer_kernels.benchmarks.allocations import peak_allocated
from reformer_kernels.benchmarks.steps import Row, Step, compare
from reformer_kernels.config import LSHConfig
from reformer_kernels.functional import linear_cross_entropy
from reformer_kernels.modules import LSHSelfAttention
from reformer_kernels.modules.feed_forward import ChunkedFeedForward
from reformer_kernels.reversible.blocks import ReversibleSequence


class PreNorm(nn.Module):
    """inner(LayerNorm(x))."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(self.norm(x))
        return result


def plain_feed_forward(width: int, d_ff: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, d_ff), nn.GELU(), nn.Linear(d_ff, width))


def reversible_blocks(depth: int, width: int, d_ff: int, heads: int, attention: str) -> list[Any]:
    """Pairs of (attention, feed-forward), normalised; attention: "lsh" or "none" (a feed-forward in its
    place)."""
    config = LSHConfig(causal=True)
    pairs = []
    for _ in range(depth):
        f = LSHSelfAttention(width, heads, config) if attention == "lsh" else plain_feed_forward(width, d_ff)
        pairs.append((PreNorm(f, width), PreNorm(plain_feed_forward(width, d_ff), width)))
    return pairs


def bench_reversible(
    depth: int = 6,
    length: int = 1024,
    batch: int = 1,
    width: int = 256,
    d_ff: int = 1024,
    heads: int = 4,
    *,
    attention: str = "lsh",
    budget: float = 20.0,
    repeats: int = 7,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """The same blocks run ordinarily, checkpointed, reversibly (float and exact), and by
    `reformer_pytorch`."""
    torch.manual_seed(0)
    place = torch.device(device)
    layers = ReversibleSequence(reversible_blocks(depth, width, d_ff, heads, attention)).to(place, dtype)
    exact = ReversibleSequence(layers.blocks, residual="exact")
    x = torch.randn(batch, length, 2 * width, device=place, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)

    def step(call: Callable[[Tensor], Tensor]) -> Step:
        def run() -> Sequence[Tensor]:
            y = call(x)
            return [y, *_backward(y, grad, x)]

        return run

    def checkpointed(x: Tensor) -> Tensor:
        streams = x.chunk(2, dim=-1)
        for block in layers.blocks:
            streams = checkpoint(block, *streams, use_reentrant=False)
        return torch.cat(streams, dim=-1)

    steps = {
        "ordinary": step(layers.plain),
        "checkpoint": step(checkpointed),
        "reversible float": step(layers),
        "reversible exact": step(exact),
    }
    peer = _lucidrains(layers)
    if peer is not None:
        steps["reformer_pytorch"] = step(peer)
    about = {
        "depth": depth,
        "length": length,
        "batch": batch,
        "width": width,
        "d_ff": d_ff,
        "attention": attention,
    }
    rows = compare(steps, "ordinary", budget=budget, repeats=repeats, device=place, **about)
    exact.check()
    return rows


def _backward(y: Tensor, grad: Tensor, x: Tensor) -> tuple[Tensor]:
    """Through `.backward()`, the only way that the peers know; gives x's gradient and takes it from x."""
    y.backward(grad)
    assert x.grad is not None
    found, x.grad = x.grad, None
    return (found,)


def _lucidrains(layers: ReversibleSequence) -> Callable[[Tensor], Tensor] | None:
    try:
        from reformer_pytorch.reversible import ReversibleSequence as Peer
    except ImportError:
        return None
    # It stores what it is given; the parameters are shared with ours.
    peer = Peer(nn.ModuleList([nn.ModuleList(list(block.children())) for block in layers.blocks]))
    peer.train()

    def call(x: Tensor) -> Tensor:
        result: Tensor = peer(x, arg_route=(False, False))
        return result

    return call


def bench_depths(
    depths: Sequence[int] = (6, 48), *, residuals: Sequence[str] = ("float", "exact"), **settings: Any
) -> list[Row]:
    """Peak activation memory of training, by depth: `reversible_peak` over the smallest depth's is
    `ratio`."""
    rows: list[Row] = []
    for residual in residuals:
        first = None
        for depth in depths:
            peak = reversible_peak(depth, residual, **settings)
            first = first or peak
            rows.append({"case": residual, "depth": depth, "peak_bytes": peak, "ratio": peak / first})
    return rows


def reversible_peak(
    depth: int,
    residual: str,
    length: int = 1024,
    batch: int = 1,
    width: int = 256,
    d_ff: int = 1024,
    heads: int = 4,
    attention: str = "lsh",
) -> int:
    """Bytes of activations in one training step; residual "ordinary": the same blocks, ordinarily."""
    torch.manual_seed(0)
    blocks = reversible_blocks(depth, width, d_ff, heads, attention)
    is_ordinary = residual == "ordinary"
    layers = ReversibleSequence(blocks, residual="float" if is_ordinary else residual)  # type: ignore[arg-type]
    call = layers.plain if is_ordinary else layers
    x = torch.randn(batch, length, 2 * width, requires_grad=True)
    grad = torch.randn_like(x)
    _backward(call(x), grad, x)  # makes the parameters' gradients

    def step() -> None:
        # New gradients are made before they are added to the old: zeroed ones in their place would hide that.
        _backward(call(x), grad, x)

    return peak_allocated(step)


def bench_feed_forward(
    tokens: int = 16384,
    width: int = 512,
    d_ff: int = 2048,
    activations: Sequence[str] = ("gelu", "relu"),
    *,
    chunk_size: int | None = None,
    budget: float = 30.0,
    repeats: int = 7,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """`ChunkedFeedForward` beside `nn.Sequential` of the same parameters, and beside checkpointing it."""
    torch.manual_seed(0)
    place = torch.device(device)
    modules = {"gelu": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU(), "gelu_tanh": nn.GELU("tanh")}
    rows: list[Row] = []
    for activation in activations:
        chunked = ChunkedFeedForward(width, d_ff, activation=activation, chunk_size=chunk_size).to(
            place, dtype
        )
        plain = nn.Sequential(chunked.inner, modules[activation], chunked.outer)
        x = torch.randn(tokens, width, device=place, dtype=dtype, requires_grad=True)
        grad = torch.randn_like(x)

        def step(call: Callable[[Tensor], Tensor], x: Tensor = x, grad: Tensor = grad) -> Step:
            def run() -> Sequence[Tensor]:
                y = call(x)
                return [y, *_backward(y, grad, x)]

            return run

        def checkpointed(x: Tensor, plain: nn.Module = plain) -> Tensor:
            result: Tensor = checkpoint(plain, x, use_reentrant=False)
            return result

        steps = {"plain": step(plain), "chunked": step(chunked), "checkpoint": step(checkpointed)}
        about = {"tokens": tokens, "width": width, "d_ff": d_ff, "activation": activation}
        rows += compare(steps, "plain", budget=budget, repeats=repeats, device=place, **about)
    return rows


def bench_loss(
    tokens: int = 8192,
    width: int = 512,
    vocabulary: int = 32768,
    reductions: Sequence[str] = ("mean", "none"),
    *,
    chunk_size: int | None = None,
    budget: float = 60.0,
    repeats: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """`linear_cross_entropy` beside `F.linear` and `F.cross_entropy`."""
    torch.manual_seed(0)
    place = torch.device(device)
    x = torch.randn(tokens, width, device=place, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=place) / width**0.5).to(dtype).requires_grad_()
    target = torch.randint(vocabulary, (tokens,), device=place)
    rows: list[Row] = []
    for reduction in reductions:

        def step(call: Callable[[], Tensor]) -> Step:
            def run() -> Sequence[Tensor]:
                loss = call()
                loss.backward(torch.ones_like(loss))
                results = [loss, *(t.grad for t in (x, weight) if t.grad is not None)]
                x.grad = weight.grad = None
                return results

            return run

        def plain(reduction: str = reduction) -> Tensor:
            return F.cross_entropy(F.linear(x, weight), target, reduction=reduction)

        def chunked(reduction: str = reduction) -> Tensor:
            return linear_cross_entropy(x, weight, target, reduction=reduction, chunk_size=chunk_size)  # type: ignore[arg-type]

        steps = {"plain": step(plain), "chunked": step(chunked)}
        about = {"tokens": tokens, "width": width, "vocabulary": vocabulary, "reduction": reduction}
        rows += compare(steps, "plain", budget=budget, repeats=repeats, device=place, **about)
    return rows


def drift(
    depths: Sequence[int] = (1, 2, 6, 12, 24, 48, 96),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    *,
    length: int = 256,
    width: int = 64,
    heads: int = 2,
    attention: str = "lsh",
    keep_layouts: bool = False,
) -> list[Row]:
    """How far rebuilt activations and gradients are from the first ones, by depth, dtype and kind of stream.

    `input_error`: |rebuilt - given| / |given| of the streams before the first block. `gradient_error`: of all
    parameters' gradients together, against the same blocks run ordinarily in the same dtype (exact mode:
    whose streams are rounded otherwise, so this is not rebuilding's error alone). `differing`: elements of
    the first block's input that are not rebuilt to the last bit.
    """
    rows: list[Row] = []
    for depth, dtype in itertools.product(depths, dtypes):
        torch.manual_seed(0)
        base = (
            ReversibleSequence(reversible_blocks(depth, width, 2 * width, heads, attention)).to(dtype).eval()
        )
        x = torch.randn(1, length, 2 * width).to(dtype).requires_grad_()
        grad = torch.randn(x.shape).to(dtype)
        base.plain(x).backward(grad)
        truth = [p.grad for p in base.parameters()]
        for residual in ("float", "exact"):
            layers = ReversibleSequence(
                copy.deepcopy(base.blocks),
                residual=residual,
                keep_layouts=keep_layouts and residual == "float",
            ).eval()
            layers.zero_grad()
            seen: list[Tensor] = []
            # f of the first block reads x2 as given, then as rebuilt.
            (first, _) = layers.blocks[0].children()
            handle = first.register_forward_pre_hook(
                lambda module, args, seen=seen: seen.append(args[0].detach().clone())
            )
            layers(x).backward(grad)
            handle.remove()
            given, rebuilt = (t.double() for t in seen)
            rows.append(
                {
                    "depth": depth,
                    "dtype": str(dtype).removeprefix("torch."),
                    "residual": residual,
                    "attention": attention,
                    "input_error": float((rebuilt - given).norm() / given.norm()),
                    "gradient_error": _relative([p.grad for p in layers.parameters()], truth),
                    "differing": int((given != rebuilt).sum()),
                }
            )
    return rows


def _relative(found: Sequence[Tensor | None], truth: Sequence[Tensor | None]) -> float:
    pairs = [
        (a.double(), b.double()) for a, b in zip(found, truth, strict=True) if a is not None and b is not None
    ]
    error = sum(float((a - b).square().sum()) for a, b in pairs)
    return float((error / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5)


def bench_memory(
    depths: Sequence[int] = (2, 6, 12, 24),
    lengths: Sequence[int] = (512, 1024, 2048),
    d_ffs: Sequence[int] = (512, 1024, 2048, 4096),
    vocabularies: Sequence[int] = (4096, 16384, 65536),
) -> list[Row]:
    """Peak memory against depth, length, d_ff and vocabulary: `panel`, `case`, `x`, `peak_bytes`."""
    rows: list[Row] = []
    for depth in depths:
        for residual in ("ordinary", "float", "exact"):
            peak = reversible_peak(depth, residual, width=128, d_ff=512)
            rows.append({"panel": "depth", "case": residual, "x": depth, "peak_bytes": peak})
    for length in lengths:
        for residual in ("ordinary", "float", "exact"):
            peak = reversible_peak(6, residual, length=length, width=128, d_ff=512)
            rows.append({"panel": "length", "case": residual, "x": length, "peak_bytes": peak})
    for d_ff in d_ffs:
        for row in bench_feed_forward(4096, 256, d_ff, ("gelu",), repeats=1, budget=0.0):
            rows.append({"panel": "d_ff", "case": row["case"], "x": d_ff, "peak_bytes": row["peak_bytes"]})
    for vocabulary in vocabularies:
        for row in bench_loss(1024, 128, vocabulary, ("mean",), chunk_size=64, repeats=1, budget=0.0):
            rows.append(
                {"panel": "vocabulary", "case": row["case"], "x": vocabulary, "peak_bytes": row["peak_bytes"]}
            )
    return rows


def plot_memory(rows: Sequence[Row], file: Path) -> None:
    """The four panels of `bench_memory` as a picture (needs matplotlib)."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise RuntimeError("the picture needs matplotlib; install it with: pip install matplotlib") from error
    panels = list(dict.fromkeys(row["panel"] for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for case, points in _by_case(row for row in rows if row["panel"] == panel):
            axis.plot(*zip(*points, strict=True), marker="o", label=case)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel(panel)
        axis.set_ylabel("peak memory, MiB")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _by_case(rows: Iterator[Row]) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append((row["x"], row["peak_bytes"] / 2**20))
    yield from found.items()
