"""ReversibleSequence with fixed-point streams: bit-identical rebuilding, range, and agreement with float."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from python_tests.reversible.cases import D, feed_forward, streams, weigh
from reformer_kernels import Layout, LSHConfig
from reformer_kernels.functional import attention, hashing
from reformer_kernels.modules import LSHSelfAttention
from reformer_kernels.modules.feed_forward import ChunkedFeedForward
from reformer_kernels.reversible.blocks import ReversibleSequence

BACKENDS = ("native", "reference")


class PreNorm(nn.Module):
    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x))


def reformer(depth: int, width: int = 16, dropout: float = 0.1, **settings: Any) -> ReversibleSequence:
    """Blocks of LSH attention (new hashes in each call) and a chunked feed-forward, with dropout in both."""
    config = LSHConfig(n_hashes=2, chunk_length=8, causal=True)
    return ReversibleSequence(
        [
            (
                PreNorm(LSHSelfAttention(width, 2, config=config, dropout=dropout), width),
                PreNorm(ChunkedFeedForward(width, 2 * width, dropout=dropout, chunk_size=32), width),
            )
            for _ in range(depth)
        ],
        **settings,
    )


def inputs_seen(layers: ReversibleSequence, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs of each f and g in forward and in the recomputation, both in forward's order."""
    seen: list[Tensor] = []
    handles = [
        part.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
        for block in layers.blocks
        for part in (block.f, block.g)
    ]
    y = layers(x)
    first = list(seen)
    seen.clear()
    weigh(y.float()).backward()
    for handle in handles:
        handle.remove()
    return first, seen[::-1]


@pytest.mark.parametrize("settings", [{}, {"keep_layouts": True}], ids=str)
def test_float_mode_with_lsh_attention_equals_ordinary(settings: dict[str, Any]) -> None:
    layers = reformer(3, **settings).double()
    x = torch.randn(2, 40, 32, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layers.parameters()]
    results = []
    for call in (layers, layers.plain):
        torch.manual_seed(1)
        y = call(x)
        results.append([y, *torch.autograd.grad(weigh(y), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_layouts_are_kept_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    original = hashing.make_layout

    def counted(qk: Tensor, *rest: Any) -> Layout:
        hashed.append(1)
        return original(qk, *rest)

    for module in (attention, hashing):  # which attention and `lsh_layout` call it from
        monkeypatch.setattr(module, "make_layout", counted)
    for keep, expected in ((True, 2), (False, 4)):
        hashed.clear()
        weigh(reformer(2, keep_layouts=keep)(torch.randn(2, 40, 32, requires_grad=True))).backward()
        assert len(hashed) == expected


def test_checkpoint_around_lsh_attention() -> None:
    layers = reformer(2)
    x = torch.randn(2, 40, 32, requires_grad=True)
    results = []
    for call in (lambda x: checkpoint(layers, x, use_reentrant=False), layers):
        torch.manual_seed(1)
        y = call(x)
        results.append([y, *torch.autograd.grad(weigh(y), [x, *layers.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_96_layers_are_rebuilt_to_the_last_bit(dtype: torch.dtype) -> None:
    layers = reformer(96, residual="exact").to(dtype)
    x = torch.randn(2, 40, 32).to(dtype).requires_grad_()
    first, again = inputs_seen(layers, x)
    assert len(first) == len(again) == 192
    differing = sum(int((a != b).sum()) for a, b in zip(first, again, strict=True))
    assert differing == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layers.parameters())
    layers.check()
    # The test can fail: in floating point the same layers are not rebuilt exactly.
    first, again = inputs_seen(reformer(4).to(dtype), x)
    assert sum(int((a != b).sum()) for a, b in zip(first, again, strict=True)) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_rebuilt_to_the_last_bit(backend: str) -> None:
    layers = ReversibleSequence(
        [(feed_forward(0.1, torch.float32), feed_forward(0.1, torch.float32)) for _ in range(8)],
        residual="exact",
        backend=backend,
    )
    with torch.autocast("cpu", torch.bfloat16):
        first, again = inputs_seen(layers, streams(torch.float32))
    assert all(map(torch.equal, first, again))


def test_back_ends_give_the_same_bits() -> None:
    layers = reformer(3, residual="exact")
    x = torch.randn(2, 40, 32, requires_grad=True)
    results = []
    for layers.backend in BACKENDS:
        torch.manual_seed(1)
        y = layers(x)
        results.append([y, *torch.autograd.grad(weigh(y), [x, *layers.parameters()])])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("scale", [None, 2.0**24])
def test_gradients_to_within_the_step(scale: float | None) -> None:
    layers = ReversibleSequence(
        [(feed_forward(0.2), feed_forward(0.2)) for _ in range(6)], residual="exact", scale=scale
    )
    x = streams()
    inputs = [x, *layers.parameters()]
    results = []
    for call in (layers, layers.plain):
        torch.manual_seed(1)
        y = call(x)
        results.append([y, *torch.autograd.grad(weigh(y), inputs)])
    step = 1 / (scale or 2.0**20)
    for ours, theirs in zip(*results, strict=True):
        # Each of 12 steps rounds by half a step; the blocks amplify it a little.
        assert (ours - theirs).abs().max() <= 100 * step * (1 + theirs.abs().max())
    assert not torch.equal(results[0][0], results[1][0])


def test_same_bits_with_and_without_gradients() -> None:
    layers = reformer(2, residual="exact")
    x = torch.randn(2, 40, 32)
    torch.manual_seed(1)
    y = layers(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.manual_seed(1)
            assert torch.equal(layers(x), y)


class Adds(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("value", "start"),
    [(math.nan, 0.0), (math.inf, 0.0), (100.0, 0.0), (0.0, math.nan), (0.0, 100.0), (30.0, 40.0)],
)
def test_flag_is_raised_at_the_next_step_or_by_check(backend: str, value: float, start: float) -> None:
    # Range: +-64.
    layers = ReversibleSequence(
        [(Adds(0.0), nn.Identity()), (nn.Identity(), Adds(value))],
        residual="exact",
        scale=2.0**25,
        backend=backend,
    )
    good, bad = torch.zeros(2, 4), torch.full((2, 4), start)
    layers(good) if value == 0 else None
    layers.check()
    layers(bad)
    with pytest.raises(
        FloatingPointError, match=r"left the range .*scale: 64, as scale is 3\.35544e"
    ) as error:
        layers.check()
    assert "cpu" in str(error.value)
    layers.check()  # raises once
    layers(bad)
    with pytest.raises(FloatingPointError, match="in an earlier step"):
        layers(good)
    layers.blocks[1].g.value = 0.0
    layers(good)
    layers.check()


def test_flag_is_set_without_gradients_too() -> None:
    layers = ReversibleSequence([(nn.Linear(D, D), nn.Linear(D, D))], residual="exact", scale=2.0**28)
    with torch.no_grad():
        layers(torch.full((1, 2 * D), 7.9))
    with pytest.raises(FloatingPointError, match="scale: 8, as scale is"):
        layers.check()


def test_automatic_scale_follows_the_input() -> None:
    layers = ReversibleSequence([(feed_forward(), feed_forward()) for _ in range(2)], residual="exact")
    for factor in (1e-6, 1.0, 1e6):
        x = (factor * streams().detach()).requires_grad_()
        y, z = layers(x), layers.plain(x)
        # A step is 2**-23 of the power of two above the largest input, or above 1.
        step = 2.0**-23 * 2 ** math.ceil(math.log2(max(1.0, x.detach().abs().max())))
        assert 0 < (y - z).abs().max() <= 50 * step * max(1.0, 1 / factor)
    layers.check()


def test_values_that_leave_the_automatic_range() -> None:
    layers = ReversibleSequence([(Adds(600.0), Adds(0.0))], residual="exact")
    layers(torch.ones(2, 4))
    with pytest.raises(
        FloatingPointError, match="256 times the larger of 1 and the largest input, as scale is automatic"
    ):
        layers.check()


def test_copies_do_not_share_the_flag() -> None:
    layers = ReversibleSequence([(Adds(100.0), Adds(0.0))], residual="exact", scale=2.0**25)
    layers(torch.zeros(2, 4))
    for other in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        other.check()
    with pytest.raises(FloatingPointError):
        layers.check()
    assert "exact" in repr(layers)
    assert "33554432" in repr(layers)
    assert not layers.state_dict()


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        ReversibleSequence([], residual="exact", backend="numpy")
