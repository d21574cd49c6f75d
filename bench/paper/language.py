"""Language modelling of bytes: bits per byte against steps and time, for the paper's Figures 3 and 4.

Every experiment here trains models that differ in one thing, with the same sizes, steps, text and seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.paper.records import Record, Records
from bench.paper.training import Schedule, train
from reformer_kernels import LSHConfig, ReformerConfig, ReformerLM, functional
from reformer_kernels.models.layers import AttentionPart, FeedForwardPart, TokenEmbedding, make_norm
from reformer_kernels.training.byte_model import CONTEXT, VOCABULARY
from reformer_kernels.training.text import Text


@dataclass(frozen=True)
class Settings:
    """Sizes of the models, the training and the evaluation.

    Attributes:
        length, batch, steps, learning_rate, seeds: of the training.
        layers, width, heads, chunk_length: of the models.
        windows: windows of the held-out text that are evaluated.
        text: the digest of the text.
    """

    length: int
    layers: int
    width: int
    heads: int
    chunk_length: int
    batch: int
    steps: int
    learning_rate: float = 1e-2
    seeds: tuple[int, ...] = (0, 1, 2)
    windows: int = 16
    text: str = ""


PRESETS = {
    "smoke": Settings(128, 1, 16, 2, 16, batch=1, steps=6, seeds=(0,), windows=1),
    "cpu": Settings(2048, 3, 128, 4, 64, batch=1, steps=1000),
    "paper": Settings(65_536, 3, 1024, 8, 64, batch=8, steps=40_000, learning_rate=2e-3),
}

Variant = Callable[[Settings], ReformerConfig]


def model_config(settings: Settings, **options: Any) -> ReformerConfig:
    """The configuration that all variants share, with what this one changes."""
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": settings.width,
        "layers": ("lsh",) * settings.layers,
        "num_heads": settings.heads,
        "causal": True,
        "lsh": rule(settings, 4),
        "positions": "none",
        "bucket_length": settings.length,
        "token_context": CONTEXT,
        "init_std": (3 * settings.width) ** -0.5,
        "streams": "mean",
    }
    return ReformerConfig(**(shared | options))


def rule(settings: Settings, rounds: int, **options: Any) -> LSHConfig:
    return LSHConfig(n_hashes=rounds, **({"chunk_length": settings.chunk_length} | options))


def every_pair(settings: Settings) -> LSHConfig:
    """Full attention with shared query-keys: one chunk of all tokens."""
    return LSHConfig(n_hashes=1, chunk_length=settings.length, attend_across_buckets=True)


def hashed(rounds: int, **options: Any) -> Variant:
    return lambda settings: model_config(settings, lsh=rule(settings, rounds, **options))


def preset(make: Callable[..., LSHConfig], rounds: int) -> Variant:
    return lambda settings: model_config(
        settings, lsh=make(n_hashes=rounds, chunk_length=settings.chunk_length)
    )


def full(settings: Settings) -> ReformerConfig:
    return model_config(settings, lsh=every_pair(settings))


def separate(settings: Settings) -> ReformerConfig:
    return model_config(settings, layers=("full",) * settings.layers)


EXPERIMENTS: dict[str, dict[str, Variant]] = {
    "sharing": {"separate query and key": separate, "shared query-key": full},
    "reversible": {"reversible": full, "one residual stream": full},
    "hashes": {"full": full, **{f"{rounds} hashes": hashed(rounds) for rounds in (1, 2, 4, 8, 16)}},
    "rules": {
        "paper": hashed(4),
        "paper, duplicates counted": hashed(4, correct_duplicates=False),
        "paper, other buckets seen": hashed(4, attend_across_buckets=True),
        "trax": preset(LSHConfig.trax, 4),
        "lucidrains": preset(LSHConfig.lucidrains, 4),
        "bucket window": hashed(4, window="bucket"),
        "bucket window, half as wide": hashed(4, window="bucket", bucket_window=64),
        "bucket window, twice as wide": hashed(4, window="bucket", bucket_window=256),
    },
}
"""The variants of each experiment: the first is what the others are compared with."""

PLAIN = "one residual stream"


class PlainLM(nn.Module):
    """The language model without reversible layers: one stream x, to which each half of a layer is added."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(config)
        self.layers = nn.ModuleList()
        for layer in range(len(config.layers)):
            parts = (AttentionPart(config, layer, None), FeedForwardPart(config))
            for part in parts:
                self.layers.append(nn.ModuleList([make_norm(config, config.d_model), part]))
        self.norm = make_norm(config, config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.init_std)
        self.config = config

    def forward(self, tokens: Tensor, *, labels: Tensor, shift_labels: bool) -> Tensor:
        assert not shift_labels
        x = self.embedding(tokens)
        for norm, part in self.layers:
            options = {"bucket_length": self.config.bucket_length} if isinstance(part, AttentionPart) else {}
            x = x + part(norm(x), **options)
        return functional.linear_cross_entropy(self.norm(x), self.head.weight, labels, self.head.bias)


def make_model(name: str, config: ReformerConfig) -> nn.Module:
    model = PlainLM(config) if name == PLAIN else ReformerLM(config)
    nn.init.zeros_(model.head.weight)
    embedding = model.embedding if isinstance(model, PlainLM) else model.reformer.embedding
    nn.init.normal_(embedding.tokens.weight, std=0.02)
    return model


def make_optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, where torch has it, and AdamW for the rest."""
    layers: Any = model.layers if isinstance(model, PlainLM) else model.reformer.layers
    matrices = [p for p in layers.parameters() if p.dim() == 2] if hasattr(torch.optim, "Muon") else []
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95))]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=2 * learning_rate, weight_decay=0.0))
    return optimizers


def bits_per_byte(model: nn.Module, text: Text, settings: Settings) -> float:
    """On windows spread over the held-out text."""
    length, held_out = settings.length, text.held_out
    count = min(settings.windows, held_out.numel() // (length + 1))
    spacing = (held_out.numel() - length - 1) // max(1, count - 1)
    total = 0.0
    for index in range(count):
        window = held_out[None, index * spacing : index * spacing + length + 1].long()
        total += model(window[:, :-1], labels=window[:, 1:], shift_labels=False).item()
    return total / count / math.log(2)


def run(
    experiment: str,
    settings: Settings,
    text: Text,
    records: Records,
    report: Callable[[str], None],
    only: Mapping[str, Variant] | None = None,
) -> None:
    """Train every variant with every seed, or go on with what is missing."""
    variants = EXPERIMENTS[experiment] if only is None else only
    # Seeds outermost, so that a run that is cut short has compared all variants.
    for seed in settings.seeds:
        for name, variant in variants.items():
            key = f"{name} seed {seed}"
            records.run(key, lambda: _run(name, variant, settings, text, seed, records, report))  # noqa: B023


def _run(
    name: str,
    variant: Variant,
    settings: Settings,
    text: Text,
    seed: int,
    records: Records,
    report: Callable[[str], None],
) -> Record:
    torch.manual_seed(seed)
    model = make_model(name, variant(settings))

    def loss_of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        last = text.train.numel() - settings.length
        starts = torch.randint(last, (settings.batch,), generator=generator).tolist()
        rows = torch.stack([text.train[start : start + settings.length + 1] for start in starts]).long()
        loss: Tensor = model(rows[:, :-1], labels=rows[:, 1:], shift_labels=False)
        return loss

    points = train(
        model,
        make_optimizers(model, settings.learning_rate),
        Schedule(settings.steps, evaluate_every=max(1, settings.steps // 10)),
        loss_of,
        lambda: {"bits": bits_per_byte(model, text, settings)},
        records.checkpoint,
        lambda line: report(f"{name} seed {seed}, {line}"),
    )
    return {"points": points, "parameters": sum(p.numel() for p in model.parameters())}


def with_text(settings: Settings, text: Text) -> Settings:
    return dataclasses.replace(settings, text=text.sha256)
