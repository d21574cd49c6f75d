"""Attention layers under torch.jit.trace, which is refused, and torch.export, which keeps the length open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from reformer_kernels import LocalSelfAttention, LSHSelfAttention, MultiheadAttention
from reformer_kernels.modules.full_attention import FullSelfAttention


@pytest.mark.parametrize("kind", [LSHSelfAttention, LocalSelfAttention, FullSelfAttention])
def test_jit_trace_of_a_layer_is_refused(kind: type[nn.Module]) -> None:
    layer = kind(32, 2).eval()
    with pytest.raises(RuntimeError, match=rf"torch\.jit\.trace cannot trace {kind.__name__}: "):
        torch.jit.trace(layer, torch.randn(1, 70, 32))


@pytest.mark.parametrize("threshold", [8, 2000])
def test_jit_trace_of_multihead_attention_is_refused(threshold: int) -> None:
    layer = MultiheadAttention(32, 2, full_attention_threshold=threshold).eval()
    x = torch.randn(70, 1, 32)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot trace .*MultiheadAttention"):
        torch.jit.trace(layer, (x, x, x))


# What a program chooses holds for its whole range of lengths: full attention, LSH attention whose window
# covers all keys (2 * 64 by default), so that it does not hash, or LSH attention.
@pytest.mark.parametrize(
    ("threshold", "shortest", "longest"), [(16, 17, 128), (16, 129, 400), (2000, 16, 1000)]
)
def test_multihead_attention_exports_with_a_dynamic_length(
    threshold: int, shortest: int, longest: int
) -> None:
    layer = MultiheadAttention(32, 2, batch_first=True, full_attention_threshold=threshold).eval()
    program = exported(layer, shortest, longest)
    for n in (shortest, shortest + 50, longest):
        y = torch.randn(2, n, 32)
        ours = layer(y, y, y, need_weights=False)[0]
        torch.testing.assert_close(program(y, y, y, need_weights=False)[0], ours)


def test_a_program_across_the_threshold_is_refused_with_the_range_that_it_could_serve() -> None:
    layer = MultiheadAttention(32, 2, batch_first=True, full_attention_threshold=80).eval()
    with pytest.raises(torch._dynamo.exc.UserError, match=r"length = Dim\('length', min=81, max=128\)"):
        exported(layer, 16, 200)


def exported(layer: nn.Module, shortest: int, longest: int) -> Any:
    length = torch.export.Dim("length", min=shortest, max=longest)
    x = torch.randn(2, (shortest + longest) // 2, 32)
    shapes = {"query": {1: length}, "key": {1: length}, "value": {1: length}, "need_weights": None}
    return torch.export.export(layer, (x, x, x), {"need_weights": False}, dynamic_shapes=shapes).module()
