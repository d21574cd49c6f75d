"""Time and memory: the paper's Figure 5, and measurements beside the complexities of its Tables 1 and 3."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.paper.records import Record, Records
from reformer_kernels.benchmarks.memory_process import Request, measure_all
from reformer_kernels.benchmarks.registry import OPERATIONS
from reformer_kernels.benchmarks.sizes import Sizes
from reformer_kernels.benchmarks.timing import clock

FULL = "torch SDPA"
LSH = "paper()"


@dataclass(frozen=True)
class Settings:
    """What is timed, and how long.

    Attributes:
        tokens: tokens of a batch in Figure 5: a length is computed for tokens / length sequences at once.
        lengths: of Figure 5 and of the memory of attention.
        rounds: numbers of hash rounds.
        heads, head_dim, chunk_length: of the attention.
        repeats: how often each call is timed; the median counts.
        depths: layers of the models whose memory is measured, at depth_length tokens.
    """

    tokens: int
    lengths: tuple[int, ...]
    rounds: tuple[int, ...] = (1, 2, 4, 8)
    heads: int = 8
    head_dim: int = 64
    chunk_length: int = 64
    repeats: int = 3
    depths: tuple[int, ...] = (1, 2, 4, 8, 16)
    depth_length: int = 2048
    width: int = 256


PRESETS = {
    "smoke": Settings(256, (128, 256), (1,), heads=2, head_dim=16, repeats=1, depths=(1, 2), depth_length=64),
    "cpu": Settings(32_768, (1024, 2048, 4096, 8192, 16_384, 32_768)),
    "paper": Settings(32_768, (1024, 2048, 4096, 8192, 16_384, 32_768), repeats=10),
}


def run_time(settings: Settings, device: str, records: Records, report: Callable[[str], None]) -> None:
    """Seconds of a forward pass of attention, by length, at a constant number of tokens."""
    for length in settings.lengths:
        key = f"{length}"
        record = records.run(key, lambda: _times(settings, length, device))  # noqa: B023
        report(f"{length}: " + ", ".join(f"{name} {s:.3f} s" for name, s in record["seconds"].items()))


def _times(settings: Settings, length: int, device: str) -> Record:
    lsh = OPERATIONS["lsh"]
    calls = {}
    for name, rounds in (("full", 1), *((f"{r} hashes", r) for r in settings.rounds)):
        sizes = _attention_sizes(settings, length, rounds, device)
        calls[name] = lsh.build(FULL if name == "full" else LSH, sizes).passes(False)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(settings.repeats + 1):
        for name, passes in calls.items():
            (forward,) = passes.values()
            began = clock(torch.device(device))
            forward()
            if repeat:  # the first is to warm up
                samples[name].append(clock(torch.device(device)) - began)
    return {"seconds": {name: statistics.median(seconds) for name, seconds in samples.items()}}


def run_memory(settings: Settings, device: str, records: Records, report: Callable[[str], None]) -> None:
    """Peak memory in bytes of attention by length, and of models by depth: forward and backward."""
    for length in settings.lengths:
        for name, rounds in ((FULL, 1), (LSH, 4)):
            sizes = dataclasses.replace(_attention_sizes(settings, length, rounds, device), batch=1)
            _measure(records, f"attention, {name}, {length}", Request("lsh", name, sizes, True), report)
    for depth in settings.depths:
        for name in ("reversible float", "plain"):
            sizes = Sizes(
                heads=4,
                length=settings.depth_length,
                head_dim=settings.width // 4,
                chunk_length=settings.chunk_length,
                device=device,
                width=settings.width,
                layers=depth,
                d_ff=4 * settings.width,
                variant="attention",
            )
            _measure(records, f"depth, {name}, {depth}", Request("reversible", name, sizes, True), report)


def _measure(records: Records, key: str, request: Request, report: Callable[[str], None]) -> None:
    def compute() -> Record:
        (answer,) = measure_all([request], torch.get_num_threads())
        if isinstance(answer, str):
            raise RuntimeError(f"{key}: {answer}")
        return {"bytes": max(answer.values()), "by_phase": answer}

    record = records.run(key, compute)
    report(f"{key}: {record['bytes'] / 2**20:.1f} MiB")


def _attention_sizes(settings: Settings, length: int, rounds: int, device: str) -> Sizes:
    return Sizes(
        batch=max(1, settings.tokens // length),
        heads=settings.heads,
        length=length,
        head_dim=settings.head_dim,
        n_hashes=rounds,
        chunk_length=settings.chunk_length,
        causal=True,
        device=device,
    )
