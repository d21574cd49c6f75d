"""Whole models under torch.compile with its default settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from reformer_kernels import ReformerConfig, ReformerLM

KINDS = ("lsh", "local", "full")
LENGTHS = (64, 100, 33, 150)


def language_model(layers: Any, residual: Any) -> ReformerLM:
    torch.manual_seed(0)
    return ReformerLM(
        ReformerConfig(
            vocab_size=40,
            d_model=32,
            num_heads=2,
            layers=layers,
            causal=True,
            max_length=256,
            residual=residual,
            init_std=0.2,
        )
    )


def loss_and_gradients(model: ReformerLM, call: Any, tokens: Tensor) -> list[Tensor | None]:
    """The loss and the gradients of `call`, with the same random numbers in each."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = call(tokens, labels=tokens)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", ["float", "exact"])
def test_trains_and_evaluates_as_eager(kind: str, residual: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = language_model((kind,) * 2, residual)
    compiled = torch.compile(model)
    for step, length in enumerate(LENGTHS):
        tokens = torch.randint(40, (2, length))
        for training in (True, False):
            model.train(training)
            expected = loss_and_gradients(model, model, tokens)
            torch.testing.assert_close(loss_and_gradients(model, compiled, tokens), expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens), model(tokens))
        if step == 1:
            after_two_lengths = graphs()
    assert graphs() == after_two_lengths, "a further length compiles anew"


# Inductor's own random numbers would give other rotations in training.
@torch._inductor.config.patch(fallback_random=True)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_residuals_compile_whole(kind: str) -> None:
    torch._dynamo.reset()
    model = language_model((kind,), "plain")
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for length in LENGTHS[:2]:
        tokens = torch.randint(40, (2, length))
        expected = loss_and_gradients(model, model, tokens)
        torch.testing.assert_close(loss_and_gradients(model, compiled, tokens), expected)


@pytest.mark.parametrize("residual", ["float", "exact", "plain"])
@pytest.mark.parametrize(("kind", "shortest"), [("lsh", 2), ("local", 65)])
def test_exports_with_a_dynamic_length(kind: str, shortest: int, residual: str) -> None:
    model = language_model((kind,), residual).eval()
    length = torch.export.Dim("length", min=shortest, max=256)
    example = torch.randint(40, (2, 100))
    program = torch.export.export(model, (example,), dynamic_shapes=({1: length},))
    for n in (shortest, 77, 150):
        tokens = torch.randint(40, (2, n))
        torch.testing.assert_close(program.module()(tokens), model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_jit_trace_is_refused(kind: str) -> None:
    model = language_model((kind,), "plain").eval()
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot trace a Reformer model"):
        torch.jit.trace(model, torch.randint(40, (2, 100)))
