"""Queries and keys of trained language models, for `reformer-kernels recall`.

    python bench/recall_activations.py activations.pt
    reformer-kernels recall --clusters none --masks causal --tensors activations.pt

Two byte-level models of 4 layers learn the source of Python's standard library with full attention, one with
separate queries and keys, one with shared query-keys. FILE gets q and k of the first and qk of the second,
(layers, heads, length, head size), for one window of held-out text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from reformer_kernels import LSHConfig, ReformerConfig, ReformerLM
from reformer_kernels.models.config import LayerKind
from reformer_kernels.training.byte_model import CONTEXT, VOCABULARY
from reformer_kernels.training.text import load_text
from reformer_kernels.training.trainer import Recipe, Trainer

LAYERS, WIDTH, HEADS, LENGTH = 4, 256, 4, 2048


def make_model(kind: LayerKind) -> ReformerLM:
    """ "full": separate queries and keys; "lsh": shared ones, with one chunk that holds all tokens."""
    one_chunk = LSHConfig.paper(n_hashes=1, chunk_length=LENGTH, attend_across_buckets=True)
    return ReformerLM(
        ReformerConfig(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            layers=(kind,) * LAYERS,
            num_heads=HEADS,
            causal=True,
            lsh=one_chunk,
            positions="sinusoidal",
            max_length=LENGTH,
            token_context=CONTEXT,
            init_std=(3 * WIDTH) ** -0.5,
        )
    )


def activations(model: ReformerLM, tokens: Tensor, name: str) -> Tensor:
    """What the layers' projections of this name give: (layers, heads, length, head size)."""
    found: list[Tensor] = []
    for path, module in model.named_modules():
        if path.endswith(f".{name}"):
            module.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        model(tokens)
    return torch.cat(found).unflatten(-1, (HEADS, -1)).transpose(1, 2).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=150, help="training steps of 2048 bytes")
    given = parser.parse_args()
    recipe = Recipe(seq_len=LENGTH, steps=given.steps)
    text = load_text(None, LENGTH)
    tensors: dict[str, Tensor] = {}
    trained: tuple[tuple[LayerKind, dict[str, str]], ...] = (
        ("full", {"query": "q", "key": "k"}),
        ("lsh", {"query_key": "qk"}),
    )
    for kind, projections in trained:
        torch.manual_seed(recipe.seed)
        trainer = Trainer(recipe, text, model=make_model(kind))
        name = "shared query-keys" if kind == "lsh" else "separate queries and keys"
        for _ in track(range(given.steps), name):
            trainer.train_step()
        bits = trainer.evaluate(windows=8)
        print(f"{name}: {bits:.3f} bits per byte on held-out text after {given.steps} steps")
        for projection, short in projections.items():
            tensors[short] = activations(trainer.model, text.held_out[None, :LENGTH].long(), projection)
    torch.save(tensors, given.file)
    print(f"{given.file}: " + ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items()))


if __name__ == "__main__":
    main()
