"""Queries and keys of trained language models, for `reformer-kernels recall`.

    python bench/recall_activations.py activations.pt
    reformer-kernels recall --clusters none --masks causal --tensors activations.pt

Two byte-level models of 4 layers learn the source of Python's standard library with full attention, one with
separate queries and keys, one with shared query-keys. FILE gets q and k of the first and qk of the second,
(layers, heads, length, head size), for one window of held-out text.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

from reformer_kernels import LSHConfig, ReformerConfig, ReformerLM
from reformer_kernels.cli.language_model import CONTEXT, VOCABULARY
from reformer_kernels.cli.muon import Muon
from reformer_kernels.cli.text import Text, load_text
from reformer_kernels.modules.reformer_config import LayerKind

LAYERS, WIDTH, HEADS, LENGTH = 4, 256, 4, 2048
LEARNING_RATE = 1e-2
WARM_UP_STEPS = 20


def make_model(kind: LayerKind) -> ReformerLM:
    """ "full": separate queries and keys; "lsh": shared ones, with one chunk that holds all tokens."""
    one_chunk = LSHConfig.paper(n_hashes=1, chunk_length=LENGTH, attend_across_buckets=True)
    return ReformerLM(
        ReformerConfig(
            vocab_size=VOCABULARY,
            d_model=WIDTH,
            layers=(kind,) * LAYERS,
            n_heads=HEADS,
            causal=True,
            lsh=one_chunk,
            positions="sinusoidal",
            max_length=LENGTH,
            token_context=CONTEXT,
            init_std=(3 * WIDTH) ** -0.5,
        )
    )


def window(data: Tensor, start: int) -> Tensor:
    return data[None, start : start + LENGTH].long()


def train(model: ReformerLM, text: Text, steps: int, name: str) -> float:
    """Bits per byte on held-out text, after the training."""
    matrices = [parameter for parameter in model.reformer.layers.parameters() if parameter.dim() == 2]
    held = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in held]
    optimizers = (torch.optim.AdamW(others), Muon(matrices, lr=LEARNING_RATE))
    for step in track(range(steps), name):
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - 0.9 * step / steps)
        tokens = window(text.train, int(torch.randint(text.train.numel() - LENGTH, ())))
        model.zero_grad()
        model(tokens, labels=tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
    model.eval()
    with torch.no_grad():
        losses = [
            float(model(tokens, labels=tokens))
            for tokens in (window(text.held_out, start) for start in range(0, 8 * LENGTH, LENGTH))
        ]
    return sum(losses) / len(losses) / math.log(2)


def activations(model: ReformerLM, tokens: Tensor, names: Iterable[str]) -> list[Tensor]:
    """What the layers' projections of these names give, each (layers, heads, length, head size)."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[name].append(output.unflatten(-1, (HEADS, -1)).transpose(1, 2))

        for path, module in model.named_modules():
            if path.endswith(f".{name}"):
                module.register_forward_hook(hook)

    for name in found:
        keep(name)
    with torch.no_grad():
        model(tokens)
    return [torch.cat(found[name]).contiguous() for name in found]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--steps", type=int, default=150, help="training steps of 2048 bytes")
    given = parser.parse_args()
    text = load_text(None, 8 * LENGTH)
    tensors: dict[str, Tensor] = {}
    trained: tuple[tuple[LayerKind, tuple[str, ...]], ...] = (
        ("full", ("query", "key")),
        ("lsh", ("query_key",)),
    )
    for kind, projections in trained:
        torch.manual_seed(0)
        model = make_model(kind)
        name = "separate queries and keys" if kind == "full" else "shared query-keys"
        bits = train(model, text, given.steps, name)
        print(f"{name}: {bits:.3f} bits per byte on held-out text after {given.steps} steps")
        short = {"query": "q", "key": "k", "query_key": "qk"}
        found = activations(model, window(text.held_out, 0), projections)
        tensors |= {short[projection]: x for projection, x in zip(projections, found, strict=True)}
    torch.save(tensors, given.file)
    print(f"{given.file}: " + ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items()))


if __name__ == "__main__":
    main()
