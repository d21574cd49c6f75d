"""transformers' Reformer before and after `hf.accelerate`: its attention layers, and whole models.

Rows are those of `steps.compare`. Both sides are one model and its copy, on the same input; the
layers include their projections, the models everything from tokens to the loss. Memory is what torch
allocates beyond parameters, their gradients and the result. `output_error` of layers: |ours - theirs| over
|theirs| of the median token, on the same buckets. transformers is imported where it is needed.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reformer_kernels import hf
from reformer_kernels.benchmarks.steps import Row, Step, compare

ORIGINAL, ACCELERATED = "transformers", "accelerated"

MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    # Two of google/reformer-enwik8's twelve layers.
    "wide": {
        "attn_layers": ["local", "lsh"],
        "hidden_size": 1024,
        "feed_forward_size": 4096,
        "num_attention_heads": 8,
        "attention_head_size": 128,
        "local_attn_chunk_length": 128,
        "lsh_attn_chunk_length": 256,
        "num_hashes": 4,
        "axial_pos_embds_dim": [256, 768],
    },
}
"""Options of transformers' `ReformerConfig`: its defaults (6 layers, 256 wide, 12 heads of 64, 1 hash), and
wide layers."""

NO_DROPOUT = {"local_attention_probs_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0}


def bench_attention(
    lengths: Sequence[int] = (256, 1024, 4096, 16384),
    kinds: Sequence[tuple[str, int]] = (("local", 1), ("lsh", 1), ("lsh", 4)),
    *,
    sizes: dict[str, Any] | None = None,
    budget: float = 20.0,
    repeats: int = 7,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """The attention layers alone, at transformers' default sizes, causal, without dropout.

    kinds: (layer, hashes).
    """
    from transformers.models.reformer import modeling_reformer as peer

    place, rows = torch.device(device), []
    layers: dict[str, Any] = {"local": peer.LocalSelfAttention, "lsh": peer.LSHSelfAttention}
    for (kind, n_hashes), length in ((kind, length) for kind in kinds for length in lengths):
        torch.manual_seed(0)
        config = _config(length, num_hashes=n_hashes, **NO_DROPOUT, **sizes or {})
        original = layers[kind](config).to(place, dtype)
        x = torch.randn(1, length, config.hidden_size, device=place, dtype=dtype, requires_grad=True)
        grad = torch.randn(1, length, original.all_head_size, device=place, dtype=dtype)

        def forward(layer: nn.Module, x: Tensor = x) -> Sequence[Tensor]:
            with torch.no_grad():
                return [layer(x).hidden_states]

        def train(layer: nn.Module, x: Tensor = x, grad: Tensor = grad) -> Sequence[Tensor]:
            y = layer(x).hidden_states
            y.backward(grad)
            assert x.grad is not None
            found, x.grad = x.grad, None
            return [y, found]

        steps = {"forward": forward, "forward+backward": train}
        about: Row = {"layer": kind, "hashes": n_hashes, "length": length}
        accelerated = _accelerated(original)
        about["output_error"] = _difference(original, accelerated, x)
        rows += _both(original, accelerated, steps, budget, repeats, place, about)
    return rows


def bench_models(
    cases: Sequence[tuple[str, int]] = (("default", 4096), ("default", 16384), ("wide", 4096)),
    *,
    budget: float = 20.0,
    repeats: int = 3,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """Causal language models: the forward pass without gradients, and a training step, dropout included.

    cases: (name in `MODELS`, length).
    """
    from transformers import ReformerModelWithLMHead

    place, rows = torch.device(device), []
    for name, length in cases:
        torch.manual_seed(0)
        original: Any = ReformerModelWithLMHead(_config(length, **MODELS[name])).train()
        original.to(place, dtype)
        ids = torch.randint(original.config.vocab_size, (1, length), device=place)

        def forward(model: nn.Module, ids: Tensor = ids) -> Sequence[Tensor]:
            with torch.no_grad():
                return [model.eval()(ids, use_cache=False).logits]

        def train(model: nn.Module, ids: Tensor = ids) -> Sequence[Tensor]:
            model.train()(ids, labels=ids, use_cache=False).loss.backward()
            return []

        steps = {"forward": forward, "training step": train}
        about: Row = {"model": name, "hashes": original.config.num_hashes, "length": length}
        rows += _both(original, _accelerated(original), steps, budget, repeats, place, about)
    return rows


def _accelerated(original: nn.Module) -> nn.Module:
    copied = copy.deepcopy(original)
    hf.accelerate(copied)
    return copied


def _difference(original: nn.Module, accelerated: nn.Module, x: Tensor) -> float:
    """Of a layer's outputs, on the same buckets: two hashes of a row differ where directions nearly tie.

    Of the median token: those that see only themselves are up to 0.4% off in transformers' own float32.
    """
    with torch.no_grad():
        theirs = original(x)
        ours = accelerated(x, buckets=getattr(theirs, "buckets", None))
        error = (ours.hidden_states - theirs.hidden_states).norm(dim=-1)
        return float((error / theirs.hidden_states.norm(dim=-1)).median())


def _both(
    original: nn.Module,
    accelerated: nn.Module,
    steps: Mapping[str, Callable[[nn.Module], Sequence[Tensor]]],
    budget: float,
    repeats: int,
    device: torch.device,
    about: Row,
) -> list[Row]:
    rows = []
    for phase, step in steps.items():
        both: dict[str, Step] = {ORIGINAL: partial(step, original), ACCELERATED: partial(step, accelerated)}
        timed = compare(both, ORIGINAL, budget=budget, repeats=repeats, device=device, **about)
        rows += [{**row, "phase": phase} for row in timed]
    return rows


def _config(length: int, **options: Any) -> Any:
    from transformers import ReformerConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)
    side = 2 ** math.ceil(math.log2(length) / 2)
    return ReformerConfig(
        is_decoder=True,
        axial_pos_shape=(length // side, side),
        max_position_embeddings=length,
        **options,
    )
