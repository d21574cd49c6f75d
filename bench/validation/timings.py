"""Times of every operation, beside SDPA's back ends, torch.sort, the predicted floors and the targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch

from reformer_kernels.benchmarks.machine import RateMeter
from reformer_kernels.benchmarks.peers import FULL_ATTENTION, PeerRefusesError
from reformer_kernels.benchmarks.timing import Spread, between, interleave, mark
from reformer_kernels.gpu import cost_model
from reformer_kernels.gpu.architectures import Rates
from reformer_kernels.gpu.cost_model import Shape
from validation import calls
from validation.calls import BOTH, FORWARD, Call, shape_of
from validation.context import Context, Row, attempt
from validation.predicted import Predictions

FLUSH_BYTES = 2**28
"""How much is written before each timed call, so that its tensors are not in the second-level cache."""


def rates_steps(context: Context) -> Iterator[Row]:
    """What the machine copies and multiplies at most. Every floor is computed from these rates."""
    for dtype in context.pick((torch.bfloat16, torch.float32), (torch.float32,)):
        yield attempt(str(dtype).removeprefix("torch."), partial(_measure_rates, context, dtype))


def _measure_rates(context: Context, dtype: torch.dtype) -> Row:
    meter = RateMeter(context.device, dtype)
    cases = meter.timed()
    interleave(cases, budget=context.pick(0.5, 0.01), max_repeats=context.pick(20, 1))
    meter.take(cases)
    return dataclasses.asdict(meter.rates())


def measured_rates(context: Context) -> Rates:
    """The rates of this machine, as the cost model takes them."""
    wide = _measure_rates(context, torch.float32)
    narrow = wide if context.dry_run else _measure_rates(context, torch.bfloat16)
    return Rates(
        device=str(context.device),
        copy=narrow["copy_gbs"] * 1e9,
        matmul_16_bit=narrow["matmul_gflops"] * 1e9,
        matmul_32_bit=wide["matmul_gflops"] * 1e9,
        measured=True,
    )


def time_call(
    context: Context, call: Call, *, budget: float = 0.3, most: int = 30, graph: bool = True
) -> dict[str, Spread]:
    """Seconds of one call: "eager", as Python makes it, and unless `graph` is False "graph", replayed from a
    CUDA graph.

    A call is repeated for `budget` seconds, at most `most` times.
    """
    ways: dict[str, Call] = {"eager": call}
    call()
    if graph and not context.dry_run:
        ways["graph"] = _captured(call)
    flush = torch.empty(context.pick(FLUSH_BYTES, 1024), dtype=torch.uint8, device=context.device)
    spreads = {}
    for way, run in ways.items():
        context.synchronize()
        samples, start = [], perf_counter()
        while len(samples) < context.pick(3, 1) or (len(samples) < most and perf_counter() - start < budget):
            flush.zero_()
            first = mark(context.device)
            run()
            seconds = between(first, mark(context.device))
            samples.append(seconds() if callable(seconds) else seconds)
            if context.dry_run:
                break
        spreads[way] = Spread.of(samples)
    return spreads


def _captured(call: Call) -> Call:
    """A call that replays a CUDA graph of `call`."""
    graph, results = calls.capture(call)

    def replay() -> Any:
        graph.replay()
        return results  # held here, so that nothing else uses their memory

    return replay


class Timer:
    """Makes rows of calls: their times, the predicted floor at this machine's rates, and the ratio of the
    two."""

    def __init__(self, context: Context) -> None:
        self.context, self.rates = context, measured_rates(context)
        self.predictions = Predictions(context)

    def row(
        self, name: str, make: Callable[[], Call], floors: Sequence[str], shape: Shape, **about: Any
    ) -> Row:
        """The row of the call that `make` prepares. Its floor is the sum of those of its operations."""
        return attempt(name, partial(self._time, make, floors, shape, about))

    def _time(self, make: Callable[[], Call], floors: Sequence[str], shape: Shape, about: Row) -> Row:
        try:
            call = make()
        except PeerRefusesError as reason:  # which is no failure of this package
            return about | {"skipped": str(reason)}
        row = dataclasses.asdict(shape) | about
        for way, spread in time_call(self.context, call).items():
            for title, seconds in (("", spread.median), ("_p20", spread.p20), ("_p80", spread.p80)):
                row[f"{way}{title}_us"] = round(seconds * 1e6, 2)
            row[f"{way}_n"] = spread.n
        operation, phase, preset = (about.get(name) for name in ("operation", "phase", "preset"))
        row |= self.predictions.of(str(operation), phase, preset or "paper", shape)
        if floors:
            floor = 1e6 * sum(cost_model.floor(name, shape, self.rates).seconds for name in floors)
            row["floor_us_predicted"] = round(floor, 2)
            row["above_floor"] = round(fastest_us(row) / floor, 3)
        return row

    def attention(self, shape: Shape, phase: str, preset: str = "paper") -> Row:
        """The row of the attention kernels alone."""
        floors = ["attention_forward"] + ["attention_backward"] * (phase == BOTH)
        name = f"attend {preset} {phase} L={shape.length} D={shape.head_dim} R={shape.n_hashes}"
        make = partial(calls.attend, self.context, shape, phase, preset)
        return self.row(name, make, floors, shape, operation="attend", preset=preset, phase=phase)

    def whole_call(self, shape: Shape, phase: str) -> Iterator[Row]:
        """Rows of `lsh_attention` and of dense attention by each of SDPA's back ends, in the same shape."""
        floors = ["hash", "sort", "attention_forward"] + ["attention_backward"] * (phase == BOTH)
        about = {"phase": phase}
        make = partial(calls.lsh_attention, self.context, shape, phase)
        title = f"{phase} L={shape.length}"
        yield self.row(f"lsh_attention {title}", make, floors, shape, operation="lsh_attention", **about)
        for peer in tuple(FULL_ATTENTION.values())[1:]:
            make = partial(calls.full, self.context, shape, phase, peer)
            yield self.row(f"{peer} {title}", make, (), shape, operation=peer, **about)

    def hash_and_sort(self, shape: Shape) -> Iterator[Row]:
        """Rows of hashing, of `bucket_sort` and of torch's stable sorts."""
        title = f"L={shape.length} D={shape.head_dim} R={shape.n_hashes}"
        make = partial(calls.lsh_hash, self.context, shape)
        yield self.row(f"lsh_hash {title}", make, ("hash",), shape, operation="lsh_hash")
        for name, by in (
            ("bucket_sort", "bucket_sort"),
            ("torch.sort int32 stable", "int32"),
            ("torch.sort int64 stable", "int64"),
        ):
            make = partial(calls.sort, self.context, shape, by)
            yield self.row(f"{name} {title}", make, ("sort",), shape, operation=name)


def fastest_us(row: Row) -> float:
    """Microseconds of the faster way, eager or graph, of a timed row."""
    return min(row[way] for way in ("graph_us", "eager_us") if way in row)


def headline_steps(context: Context) -> Iterator[Row]:
    """The shapes that targets are for: attention alone, hash and sort, then the whole call and SDPA by
    length."""
    timer = Timer(context)
    for n_hashes in context.pick((4, 1), (2,)):
        for phase in (FORWARD, BOTH):
            yield timer.attention(shape_of(context, n_hashes=n_hashes), phase)
    yield from timer.hash_and_sort(shape_of(context))
    for length in context.pick((16384, 65536, 2048, 3072, 4096, 1024), (24,)):
        yield from timer.whole_call(shape_of(context, length=length), BOTH)


def other_steps(context: Context) -> Iterator[Row]:
    """Other rules, dtypes, head dimensions, chunk lengths, and a million tokens."""
    timer = Timer(context)
    for phase in (FORWARD, BOTH):
        shape = shape_of(context)
        one = dataclasses.replace(shape, n_hashes=1)
        floors = ["attention_forward"] + ["attention_backward"] * (phase == BOTH)
        make = partial(calls.local, context, one, phase)
        yield timer.row(
            f"local_attention {phase}", make, floors, one, operation="local", preset="local", phase=phase
        )
        for preset in context.pick(("trax", "bucket"), ("trax",)):
            yield timer.attention(shape, phase, preset)
    if context.dry_run:
        return
    for fields in ({"head_dim": 128}, {"chunk_length": 128}, {"bits": 32}, {"heads": 1, "length": 2**20}):
        for phase in (FORWARD, BOTH):
            yield timer.attention(shape_of(context, **fields), phase)
    yield from timer.hash_and_sort(shape_of(context, n_hashes=2, length=2**20, heads=1))
    yield from timer.whole_call(shape_of(context), FORWARD)


def target_rows(rows: Sequence[Row], dry_run: bool) -> Iterator[Row]:
    """The targets for an H100 (bf16, D = 64, chunk 64) and what was measured. A dry run meets none."""
    timed = [row for row in rows if "eager_us" in row]

    def find(operation: str, **fields: Any) -> Row | None:
        for row in timed:
            if row["operation"] == operation and all(row[name] == value for name, value in fields.items()):
                return row
        return None

    def ratio(numerator: Row | None, denominator: Row | None) -> float | None:
        if numerator is None or denominator is None:
            return None
        return fastest_us(numerator) / fastest_us(denominator)

    def row(target: str, value: float | None, met: Callable[[float], bool]) -> Row:
        if value is None:
            return {"check": target, "ok": None, "reason": "not measured"}
        if dry_run:
            return {"check": target, "ok": None, "reason": "a dry run"}
        return {"check": target, "ok": met(value), "value": round(value, 3)}

    for rounds in (1, 4):
        for phase in (FORWARD, BOTH):
            timing = find("attend", n_hashes=rounds, phase=phase, preset="paper")
            title = f"attention {phase}, {rounds} rounds: at most 1.33 times the floor"
            yield row(title, timing and timing["above_floor"], lambda value: value <= 1.33)

    def speedup(length: int) -> float | None:
        fields = {"length": length, "phase": BOTH}
        return ratio(find("SDPA flash", **fields), find("lsh_attention", **fields))

    lengths = sorted({r["length"] for r in timed if r["operation"] == "lsh_attention" and r["phase"] == BOTH})
    speedups = {length: value for length in lengths if (value := speedup(length)) is not None}
    ahead = [length for length, value in speedups.items() if value > 1]
    shortest = (ahead or [float("inf")])[0] if speedups else None
    yield row("shortest L ahead of SDPA flash, 4 rounds: at most 3072", shortest, lambda value: value <= 3072)
    yield row("SDPA flash at 65536 tokens: at least 20 times as long", speedups.get(65536), lambda v: v >= 20)
    radix = ratio(find("torch.sort int32 stable"), find("bucket_sort"))
    yield row("torch.sort (a radix sort): at least twice as long", radix, lambda value: value >= 2)
    hashing = find("lsh_hash")
    yield row("hash: at most 1/0.6 of its floor", hashing and hashing["above_floor"], lambda v: v <= 1 / 0.6)
