"""Whole models under torch.compile with its default settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor

from reformer_kernels import LSHConfig, ReformerConfig, ReformerLM

KINDS = ("lsh", "local", "full")
LENGTHS = (64, 100, 33, 150)


def language_model(layers: Any, residual: Any, lsh: LSHConfig | None = None) -> ReformerLM:
    torch.manual_seed(0)
    return ReformerLM(
        ReformerConfig(
            vocab_size=40,
            d_model=32,
            num_heads=2,
            layers=layers,
            lsh=lsh,
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
def test_plain_residuals_compile_whole_and_once(kind: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = language_model((kind,), "plain")
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for length in LENGTHS:
        tokens = torch.randint(40, (2, length))
        expected = loss_and_gradients(model, model, tokens)
        torch.testing.assert_close(loss_and_gradients(model, compiled, tokens), expected)
    assert graphs() == 1


def exported(model: ReformerLM, shortest: int) -> Any:
    length = torch.export.Dim("length", min=shortest, max=256)
    example = torch.randint(40, (2, 100))
    return torch.export.export(model, (example,), dynamic_shapes=({1: length},)).module()


@pytest.mark.parametrize(
    ("kind", "residual"),
    [("lsh", "float"), ("lsh", "exact"), ("lsh", "plain"), ("local", "exact"), ("full", "float")],
)
def test_exports_with_a_dynamic_length(kind: str, residual: str) -> None:
    model = language_model((kind,), residual).eval()
    program = exported(model, 2)
    for n in (2, 64, 65, 77, 256):  # on both sides of a chunk's length
        tokens = torch.randint(40, (2, n))
        torch.testing.assert_close(program(tokens), model(tokens), rtol=1e-4, atol=1e-4)


def test_a_program_of_chunked_lsh_layers_serves_the_lengths_that_its_error_names() -> None:
    """Sequences of one chunk are not hashed, which is another program."""
    model = language_model(("lsh",), "float", LSHConfig(n_hashes=2, chunk_length=32)).eval()
    with pytest.raises(torch._dynamo.exc.UserError, match=r"length = Dim\('length', min=33, max=256\)"):
        exported(model, 2)
    program = exported(model, 33)
    for n in (33, 77, 256):
        tokens = torch.randint(40, (2, n))
        torch.testing.assert_close(program(tokens), model(tokens), rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError, match="33"):
        program(torch.randint(40, (2, 32)))


@pytest.mark.parametrize("kind", KINDS)
def test_jit_trace_is_refused(kind: str) -> None:
    model = language_model((kind,), "plain").eval()
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot trace a Reformer model"):
        torch.jit.trace(model, torch.randint(40, (2, 100)))
