"""The duplication task (section 5.1 of the paper, Table 2): sequences 0w0w, whose second half must be copied.

A model of one layer is trained with full attention or with a number of hash rounds, and then evaluated with
each of them. Full attention here is LSH attention in one chunk: all earlier tokens, shared query-keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.paper.records import Record, Records
from bench.paper.training import Schedule, train
from reformer_kernels import LSHConfig, ReformerConfig, ReformerLM

FULL = 0
"""Stands for full attention among numbers of hash rounds."""

TEST_SEED = 12345


@dataclass(frozen=True)
class Settings:
    """Sizes of the task, the model and the training.

    Attributes:
        symbols: the length of w.
        vocabulary: symbols are 1 to this less one; 0 separates.
        width, heads, chunk_length: of the one layer, whose feed-forward layer is as wide.
        batch, steps, learning_rate, seeds: of the training.
        trained, evaluated: numbers of hash rounds, 0 for full attention.
        test_sequences: sequences that are evaluated, the same for all.
    """

    symbols: int
    vocabulary: int
    width: int
    heads: int
    chunk_length: int
    batch: int
    steps: int
    learning_rate: float
    seeds: tuple[int, ...] = (0,)
    trained: tuple[int, ...] = (FULL, 1, 2, 4)
    evaluated: tuple[int, ...] = (FULL, 8, 4, 2, 1)
    test_sequences: int = 64

    @property
    def length(self) -> int:
        return 2 * (self.symbols + 1)


PRESETS = {
    # Too few steps to learn anything: whether it runs.
    "smoke": Settings(15, 8, 16, 2, 4, batch=4, steps=20, learning_rate=2e-3, test_sequences=4),
    "cpu": Settings(63, 32, 64, 4, 8, batch=16, steps=4000, learning_rate=2e-3, seeds=(0, 1, 2)),
    "paper": Settings(511, 128, 256, 4, 64, batch=16, steps=150_000, learning_rate=1e-3),
}


def attention(settings: Settings, rounds: int) -> LSHConfig:
    if rounds == FULL:
        return LSHConfig.paper(
            n_hashes=1, chunk_length=settings.length, attend_across_buckets=True, causal=True
        )
    return LSHConfig.paper(n_hashes=rounds, chunk_length=settings.chunk_length, causal=True)


def sequences(settings: Settings, count: int, seed: int) -> Tensor:
    """(count, length) int64 sequences 0w0w, w uniform."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(1, settings.vocabulary, (count, settings.symbols), generator=generator)
    zero = torch.zeros(count, 1, dtype=torch.int64)
    return torch.cat([zero, w, zero, w], dim=1)


def make_model(settings: Settings, rounds: int) -> ReformerLM:
    config = ReformerConfig(
        vocab_size=settings.vocabulary,
        d_model=settings.width,
        d_ff=settings.width,
        num_heads=settings.heads,
        layers=("lsh",),
        causal=True,
        lsh=attention(settings, rounds),
        positions="learned",
        max_length=settings.length,
        streams="mean",
    )
    return ReformerLM(config)


def accuracy(model: ReformerLM, settings: Settings, rounds: int) -> float:
    """The share of the second w that the model predicts, attending with this number of hash rounds."""
    blocks: Any = model.reformer.layers.blocks
    layer = blocks[0].f.attention
    trained = layer.config
    layer.config = attention(settings, rounds)
    try:
        tokens = sequences(settings, settings.test_sequences, TEST_SEED)
        guessed = model(tokens[:, :-1]).argmax(-1)
    finally:
        layer.config = trained
    half = settings.symbols + 1
    return float((guessed[:, half:] == tokens[:, half + 1 :]).double().mean())


def run(settings: Settings, records: Records, report: Callable[[str], None]) -> None:
    """Train and evaluate every model, or go on with what is missing."""
    for seed in settings.seeds:
        for rounds in settings.trained:
            name = f"{rounds or 'full'} seed {seed}"
            records.run(name, lambda: _run(settings, rounds, seed, records, report, name))  # noqa: B023


def _run(
    settings: Settings,
    rounds: int,
    seed: int,
    records: Records,
    report: Callable[[str], None],
    name: str,
) -> Record:
    torch.manual_seed(seed)
    model = make_model(settings, rounds)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98))
    schedule = Schedule(
        settings.steps,
        evaluate_every=max(1, settings.steps // 16),
        warm_up=200,
        constant_share=0.6,
        final_share=0.02,
    )

    def loss_of(step: int) -> Tensor:
        tokens = sequences(settings, settings.batch, seed * 1_000_003 + step)
        logits = model(tokens[:, :-1])
        # The first half is random, and nothing can be learned from it.
        half = settings.symbols + 1
        return F.cross_entropy(logits[:, half:].flatten(0, 1), tokens[:, half + 1 :].flatten())

    points = train(
        model,
        [optimizer],
        schedule,
        loss_of,
        lambda: {"accuracy": accuracy(model, settings, rounds)},
        records.checkpoint,
        lambda line: report(f"{name}, {line}"),
    )
    model.eval()
    with torch.no_grad():
        evaluated = {str(r or "full"): accuracy(model, settings, r) for r in settings.evaluated}
    report(f"{name}: {evaluated}")
    return {"points": points, "accuracy": evaluated}
