"""Queries and keys of trained language models, for `reformer-kernels recall`.

    python bench/recall_activations.py activations.safetensors
    reformer-kernels recall --masks causal --activations activations.safetensors

Two byte-level models of 4 layers learn the source of Python's standard library with full attention, one with
separate queries and keys, one with shared query-keys. FILE gets q and k of the first and qk of the second,
(layers, heads, length, head size), for one window of held-out text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from reformer_kernels import LSHConfig, ReformerConfig, ReformerLM
from reformer_kernels.models.config import LayerKind
from reformer_kernels.training.byte_model import CONTEXT, VOCABULARY
from reformer_kernels.training.text import load_text
from reformer_kernels.training.trainer import Recipe, Trainer

LAYERS, WIDTH, HEADS, LENGTH = 4, 256, 4, 2048


def make_model(kind: LayerKind) -> ReformerLM:
    """A model with separate queries and keys ("full"), or shared ones in one chunk of all tokens ("lsh")."""
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
    """The outputs of the layers' projections of this name: (layers, heads, length, head size)."""
    outputs: list[Tensor] = []
    for path, module in model.named_modules():
        if path.endswith(f".{name}"):
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(tokens)
    return torch.cat(outputs).unflatten(-1, (HEADS, -1)).transpose(1, 2).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=150, help="training steps of 2048 bytes")
    arguments = parser.parse_args()
    recipe = Recipe(seq_len=LENGTH, steps=arguments.steps)
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
        for _ in track(range(arguments.steps), name):
            trainer.train_step()
        bits = trainer.evaluate(windows=8)
        print(f"{name}: {bits:.3f} bits per byte on held-out text after {arguments.steps} steps")
        for projection, short in projections.items():
            tensors[short] = activations(trainer.model, text.held_out[None, :LENGTH].long(), projection)
    save_file(tensors, arguments.file)
    print(f"{arguments.file}: " + ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items()))


if __name__ == "__main__":
    main()
