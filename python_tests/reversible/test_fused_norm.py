"""Norms of a reversible block, computed by the residual steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from python_tests.reversible.cases import D, assert_same, feed_forward, gradients, streams, weigh
from python_tests.reversible.test_exact import inputs_seen
from reformer_kernels.ops.residual import op
from reformer_kernels.reversible.blocks import ReversibleBlock, ReversibleSequence


def normed_sequence(depth: int, norm: Any, dtype: torch.dtype, **settings: Any) -> ReversibleSequence:
    def made() -> nn.Module:
        module = norm()
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        return module

    def part() -> nn.Module:
        return nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Dropout(0.2), nn.Linear(D, D))

    blocks = [ReversibleBlock(part(), part(), norm_f=made(), norm_g=made()) for _ in range(depth)]
    return ReversibleSequence(blocks, **settings).to(dtype)


NORMS = {
    "layer": lambda: nn.LayerNorm(D),
    "layer without bias": lambda: nn.LayerNorm(D, eps=1e-3, bias=False),
    "layer without weight": lambda: nn.LayerNorm(D, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(D),
    "rms without weight": lambda: nn.RMSNorm(D, eps=1e-3, elementwise_affine=False),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("residual", ["float", "exact"])
def test_fused_norms_equal_ordinary(norm: str, residual: Any) -> None:
    layers = normed_sequence(4, NORMS[norm], torch.float32, residual=residual)
    x = streams(torch.float32)
    inputs = [x, *layers.parameters()]
    assert_same(
        gradients(lambda: weigh(layers(x)), inputs),
        gradients(lambda: weigh(layers.plain(x)), inputs),
        1e-4,
    )


@pytest.mark.parametrize("norm", NORMS)
def test_reference_equals_ordinary(norm: str) -> None:
    layers = normed_sequence(4, NORMS[norm], torch.float64)
    x = streams()
    inputs = [x, *layers.parameters()]
    assert_same(
        gradients(lambda: weigh(layers(x)), inputs), gradients(lambda: weigh(layers.plain(x)), inputs)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_exact_mode_rebuilds_normed_inputs_to_the_last_bit(
    dtype: torch.dtype, backend: str, norm: str
) -> None:
    layers = normed_sequence(24, NORMS[norm], dtype, residual="exact", backend=backend)
    first, again = inputs_seen(layers, streams(dtype))
    assert len(first) == 48
    assert all(map(torch.equal, first, again))


def test_bfloat16_gradients_are_as_accurate_as_the_modules() -> None:
    for norm in ("layer", "rms"):
        layers = normed_sequence(2, NORMS[norm], torch.bfloat16, residual="exact").eval()
        x = streams(torch.bfloat16)
        inputs = [x, *layers.parameters()]
        ours = gradients(lambda: weigh(layers(x)), inputs)[1]  # noqa: B023
        plain = gradients(lambda: weigh(layers.plain(x)), inputs)[1]  # noqa: B023
        doubled = ReversibleSequence(layers.blocks).double()
        y = x.detach().double().requires_grad_()
        truth = gradients(lambda: weigh(doubled.plain(y)), [y, *doubled.parameters()])[1]  # noqa: B023
        errors = [
            torch.stack([(a - c).norm() for a, c in zip(found, truth, strict=True)]).norm()
            for found in (ours, plain)
        ]
        assert errors[0] <= 1.5 * errors[1], errors


def test_each_step_within_a_block_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, str]] = []
    layers = normed_sequence(1, NORMS["layer"], torch.float32)
    original = torch.ops.reformer_kernels.native_residual_step

    def counted(
        stream: Any, delta: Any, sign: int, scale: Any, flag: Any, dtype: Any, kind: str, *rest: Any
    ) -> Any:
        calls.append((delta is not None, kind))
        return original(stream, delta, sign, scale, flag, dtype, kind, *rest)

    monkeypatch.setattr(torch.ops.reformer_kernels, "native_residual_step", counted)
    y = layers(streams(torch.float32))
    # f's input; then y1 and its norm together. g's own addition needs no norm within the block.
    assert calls == [(False, "layer"), (True, "layer")]
    calls.clear()
    weigh(y).backward()
    assert calls == [(False, "layer"), (True, "layer")]
    assert op.NORMALIZATIONS


def test_frozen_norms_and_autocast() -> None:
    layers = normed_sequence(3, NORMS["layer"], torch.float32, residual="exact").eval()
    layers.blocks[1].norm_g.requires_grad_(False)
    x = streams(torch.float32)
    inputs = [x, *(p for p in layers.parameters() if p.requires_grad)]
    with torch.autocast("cpu", torch.bfloat16):
        y, z = layers(x), layers.plain(x)
    for a, b in zip(
        torch.autograd.grad(weigh(y), inputs), torch.autograd.grad(weigh(z), inputs), strict=True
    ):
        assert (a - b).norm() <= 2e-2 * b.norm()


def test_bad_norms() -> None:
    part = feed_forward()
    with pytest.raises(
        TypeError, match=r"norm_f must be an nn\.LayerNorm or an nn\.RMSNorm, got BatchNorm1d"
    ):
        ReversibleBlock(part, part, norm_f=nn.BatchNorm1d(D))
    with pytest.raises(ValueError, match="norm_g must normalise the last dimension alone"):
        ReversibleBlock(part, part, norm_g=nn.LayerNorm((5, D)))
