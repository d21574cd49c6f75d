"""Runs a benchmark: checks results, times the calls alternately, measures memory, and returns a `Report`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from reformer_kernels.benchmarks import machine, memory
from reformer_kernels.benchmarks.calls import Call, seeded
from reformer_kernels.benchmarks.memory_process import Request, measure_all
from reformer_kernels.benchmarks.peers import FULL_ATTENTION, PeerRefusesError
from reformer_kernels.benchmarks.registry import AXES, Operation
from reformer_kernels.benchmarks.results import Report, Row
from reformer_kernels.benchmarks.sizes import Sizes, attention_work, full_attention_work
from reformer_kernels.benchmarks.timing import Timed, interleave

GIB = 2**30

PEER_BYTES_PER_PAIR = {False: 25, True: 45}
"""Bytes that a Reformer peer was seen to hold for each query-key pair in float32, without and with the
backward pass: it keeps several tensors of all pairs of all rounds. It decides only what is left out."""

SDPA_SHARE_OF_MATMUL = 0.5
REFORMER_PEER_SHARE_OF_MATMUL = 0.02
"""Shares of the machine's matmul rate that predict a peer's time. Used only to leave out what would take too
long."""

Say = Callable[[str], None]


@dataclass
class Settings:
    """What to measure, checked.

    Attributes:
        operation: the benchmark.
        sizes: the sizes that are the same in all rows.
        axes: the fields of `Sizes` that vary, each with its values, in the order of `registry.AXES`.
        compare: keys of the peers that run.
        backward: whether to measure the backward pass as well.
        budget: seconds for the samples of one call.
        max_repeats: the most samples of one call.
        max_seconds: a peer predicted to take longer for one call is left out; None: no prediction.
        measure_memory: whether to measure peak memory.
        threads: CPU threads.
    """

    operation: Operation
    sizes: Sizes
    axes: Mapping[str, Sequence[Any]]
    compare: Sequence[str] = ()
    backward: bool = True
    budget: float = 2.0
    max_repeats: int = 20
    max_seconds: float | None = None
    measure_memory: bool = True
    threads: int = field(default_factory=torch.get_num_threads)

    def tables(self) -> Iterator[list[Sizes]]:
        """The sizes of each table: they differ in the number of hash rounds at most."""
        outer = {name: values for name, values in self.axes.items() if name != AXES["hashes"]}
        for chosen in itertools.product(*outer.values()):
            sizes = dataclasses.replace(self.sizes, **dict(zip(outer, chosen, strict=True)))
            rounds = self.axes.get(AXES["hashes"], (sizes.n_hashes,))
            yield [dataclasses.replace(sizes, n_hashes=n_hashes) for n_hashes in rounds]

    @property
    def names(self) -> list[str]:
        """Names of the rows of a table."""
        peers = (self.operation.peers[key] for key in self.compare)
        return [*self.operation.ours, *self.operation.baselines, *peers]

    def to_json(self) -> dict[str, Any]:
        return {
            "sizes": {
                name: list(self.axes[name]) if name in self.axes else getattr(self.sizes, name)
                for name in self.operation.fields
            },
            "compare": list(self.compare),
            "backward": self.backward,
            "budget": self.budget,
            "max_repeats": self.max_repeats,
            "max_seconds": self.max_seconds,
            "threads": self.threads,
            "memory": self.operation.memory if self.measure_memory else None,
        }


def run(settings: Settings, say: Say = lambda text: None) -> Report:
    """Measure everything; `say` gets a line about what is under way.

    Torch's global generator and its number of threads are the same after as before.
    """
    device = torch.device(settings.sizes.device)
    with _threads(settings.threads), seeded():
        say("measuring the machine's own rates")
        meter = machine.RateMeter(device, settings.sizes.torch_dtype)
        timed = meter.timed()
        interleave(timed, budget=0.5, max_repeats=3)
        meter.take(timed)
        operation = settings.operation
        report = Report(
            operation.name, operation.fields, settings.to_json(), machine.provenance(device), meter.rates()
        )
        for sizes in settings.tables():
            _run_table(settings, sizes, report, meter, say)
        report.rates = meter.rates()
        if settings.measure_memory and operation.memory == "resident":
            _measure_resident(settings, report, say)
        return report


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_table(
    settings: Settings, table: Sequence[Sizes], report: Report, meter: machine.RateMeter, say: Say
) -> None:
    """Check, then time alternately, every row of one table."""
    title = f"L = {table[0].length}"
    calls: list[Call] = []
    for sizes in table:
        say(f"{title}: preparing the calls")
        added = list(_build(settings, sizes, {call.name for call in calls}, report))
        calls += added
        if not added:
            continue
        say(f"{title}: comparing results")
        by_name = {call.name: call for call in added}
        for check in settings.operation.check(sizes, by_name):
            report.checks.append(dataclasses.replace(check, sizes=sizes))

    peaks = [_measure_allocated(settings, call, say) for call in calls]
    timed: list[Timed] = []
    owners: list[int] = []
    for index, call in enumerate(calls):
        phases = call.timed(settings.backward)
        timed += phases
        owners += [index] * len(phases)
    rate_calls = meter.timed()
    names = [*(calls[owner].name for owner in owners), "a matrix product", "a copy"]
    interleave(
        [*timed, *rate_calls],
        budget=settings.budget,
        max_repeats=settings.max_repeats,
        progress=lambda index: say(f"{title}: timing {names[index]}"),
    )
    meter.take(rate_calls)
    for one, owner in zip(timed, owners, strict=True):
        call = calls[owner]
        for phase, spread in one.spreads().items():
            is_ours = settings.operation.is_ours(call.name)
            row = Row(call.name, is_ours, call.sizes, phase, spread, call.work, peaks[owner].get(phase))
            row.hash_free = call.name in settings.operation.hash_free
            report.rows.append(row)


def _build(settings: Settings, sizes: Sizes, present: set[str], report: Report) -> Iterator[Call]:
    operation = settings.operation
    keys = {name: key for key, name in operation.peers.items()}
    for name in settings.names:
        if name in present and name in operation.hash_free:
            continue  # one row serves all numbers of rounds
        try:
            if name in keys and settings.max_seconds is not None:
                _refuse_too_large(settings, keys[name], sizes, report)
            yield operation.build(name, sizes)
        except PeerRefusesError as reason:
            report.leave_out(name, sizes, str(reason))


def _refuse_too_large(settings: Settings, key: str, sizes: Sizes, report: Report) -> None:
    """Raises PeerRefusesError, with the prediction, where a peer would not fit or would take too long."""
    assert settings.max_seconds is not None
    if key in FULL_ATTENTION:
        work, share = full_attention_work(sizes), SDPA_SHARE_OF_MATMUL
    else:
        work, share = attention_work(sizes, sizes.config("trax")), REFORMER_PEER_SHARE_OF_MATMUL
        pairs = (work.forward_flops or 0.0) / (4 * sizes.head_dim)
        need = pairs * PEER_BYTES_PER_PAIR[settings.backward]
        have = machine.available_memory()
        if sizes.device == "cpu" and have is not None and need > 0.8 * have:
            raise PeerRefusesError(f"predicted to need {need / GIB:.0f} GiB; {have / GIB:.0f} GiB are free")
    flops = work.flops("forward+backward" if settings.backward else "forward") or 0.0
    seconds = flops / (share * report.rates.matmul_gflops * 1e9)
    if seconds > settings.max_seconds:
        raise PeerRefusesError(
            f"predicted to take {seconds:.0f} s a call; --max-seconds {seconds:.0f} allows it"
        )


def _measure_allocated(settings: Settings, call: Call, say: Say) -> dict[str, int]:
    """Peak memory by phase as torch allocates it, where the operation is measured so."""
    if not settings.measure_memory or settings.operation.memory != "allocated":
        return {}
    say(f"L = {call.sizes.length}: peak memory of {call.name}")
    device = torch.device(call.sizes.device)
    peaks = {}
    for phase, run in call.passes(settings.backward).items():
        run()  # the first call also makes what later calls keep, such as the parameters' gradients
        peaks[phase] = memory.peak_allocated_beyond(run, device)
    return peaks


def _measure_resident(settings: Settings, report: Report, say: Say) -> None:
    """Fill in the rows' peak memory as the system sees it, measured in a fresh process."""
    if not memory.can_measure(torch.device(settings.sizes.device)):
        report.notes.append("memory is not measured on this system (it needs Linux or CUDA)")
        return
    calls = list(dict.fromkeys((row.name, row.sizes) for row in report.rows))
    requests = [Request(settings.operation.name, *call, settings.backward) for call in calls]
    results = measure_all(requests, settings.threads)
    for name, sizes in calls:
        say(f"L = {sizes.length}: peak memory of {name}")
        result = next(results)
        if isinstance(result, str):
            report.notes.append(f"no memory figure for {name} at L = {sizes.length}: {result}")
            continue
        for row in report.rows:
            if row.name == name and row.sizes == sizes:
                row.memory = result.get(row.phase)
