"""The calls of the benchmark `generate`: one more token of a causal language model of LSH layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from reformer_kernels.benchmarks.calls import Call, seeded
from reformer_kernels.benchmarks.checks import Agreement, Calls
from reformer_kernels.benchmarks.sizes import Sizes
from reformer_kernels.models import ReformerLM
from reformer_kernels.models.config import LayerKind, ReformerConfig
from reformer_kernels.models.generation import Decoder
from reformer_kernels.testing import TOLERANCE, relative_error

VOCABULARY = 256
"""Byte-level language models."""

CACHED, WHOLE = "cached", "whole sequence"

RULES = {"chunks": "trax", "bucket": "bucket"}
"""The windows of the LSH layers, each with the preset of `Sizes.config` that has it."""

ROOM = 2048
"""Tokens that a cache takes beside the prompt. A full one begins again from the prompt, within one sample."""


def build_step(name: str, sizes: Sizes) -> Call:
    """One more token of each row after `sizes.length` tokens: a step of the cached decoder, or, for what it
    saves, the model's own call on the whole sequence."""
    model, tokens = _model_and_tokens(sizes)
    if name == CACHED:
        return Call(name, sizes, _cached_step(model, tokens), inputs=[tokens])
    if name != WHOLE:
        raise KeyError(name)

    def whole() -> Sequence[Tensor]:
        with torch.inference_mode():
            hidden = model.reformer(tokens)
            return [model.head(hidden[:, -1])]

    return Call(name, sizes, whole, inputs=[tokens])


def check_step(sizes: Sizes, calls: Calls) -> Iterator[Agreement]:
    """Whether cached logits are the model's own, at the rule whose windows do not move with the length."""
    if sizes.variant != "bucket":
        return
    model, tokens = _model_and_tokens(sizes)
    length = min(sizes.length, 256)
    decoder = Decoder(model, length, bucket_length=length)
    decoder.prompt(tokens[:, : length - 1])
    with torch.no_grad():
        own = model(tokens[:, :length], bucket_length=length)[:, -1]
    error = relative_error(decoder.step(tokens[:, length - 1]), own)
    name = f"the model's own call, {length} tokens"
    yield Agreement(name, "largest logit difference", error, 10 * TOLERANCE[sizes.torch_dtype])


def _cached_step(model: ReformerLM, tokens: Tensor) -> Callable[[], Sequence[Tensor]]:
    decoder = Decoder(model, tokens.shape[1] + ROOM)
    chosen = decoder.prompt(tokens).argmax(-1)

    def step() -> Sequence[Tensor]:
        nonlocal chosen
        if int(decoder.lengths.max()) == decoder.max_length:
            decoder.prompt(tokens)
        logits = decoder.step(chosen)
        chosen = logits.argmax(-1)
        return [logits]

    return step


def _model_and_tokens(sizes: Sizes) -> tuple[ReformerLM, Tensor]:
    kind: LayerKind = "lsh"
    config = ReformerConfig(
        vocab_size=VOCABULARY,
        d_model=sizes.width,
        layers=(kind,) * sizes.layers,
        num_heads=sizes.heads,
        d_ff=4 * sizes.width,
        causal=True,
        lsh=sizes.config(RULES[sizes.variant]),
        max_length=sizes.length + ROOM,
    )
    with seeded():
        model = ReformerLM(config).to(sizes.device, sizes.torch_dtype).eval()
        tokens = torch.randint(VOCABULARY, (sizes.batch, sizes.length)).to(sizes.device)
    return model, tokens
