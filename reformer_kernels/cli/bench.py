"""`reformer-kernels bench`: our calls and the peers', timed in turns on one machine in one run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from reformer_kernels.benchmarks import agreement, layers_report, machine, memory
from reformer_kernels.benchmarks.peers import FULL_ATTENTION, PEERS, PeerRefusesError
from reformer_kernels.benchmarks.problem import DTYPES, Problem, attention_work, full_attention_work
from reformer_kernels.benchmarks.report import Report, Row
from reformer_kernels.benchmarks.timing import Case, interleave
from reformer_kernels.benchmarks.workloads import OPERATIONS, OURS, PEER_ROWS, Workload, build
from reformer_kernels.cli.arguments import (
    choice,
    choices,
    integers,
    live_backend,
    new_console,
    positive,
    usage_error,
    writable_file,
)

GIB = 2**30
PEER_BYTES_PER_PAIR = {"forward": 25, "backward": 45}
"""Bytes that a Reformer peer was seen to hold for each query-key pair in float32: it keeps several tensors of
all the pairs of all the rounds. Used to refuse a problem that would not fit, never reported."""

SDPA_SHARE_OF_MATMUL = 0.5
REFORMER_PEER_SHARE_OF_MATMUL = 0.02
"""Shares of the machine's matmul rate, to predict a peer's time before waiting for it; never reported."""


@dataclass
class Settings:
    """The command's arguments, checked."""

    operation: str = "lsh"
    lengths: Sequence[int] = (1024, 4096)
    n_hashes: Sequence[int] = (4,)
    problem: Problem = field(default_factory=Problem)
    """All of a problem but its length and rounds."""
    backward: bool = False
    compare: Sequence[str] = ()
    budget: float = 2.0
    max_repeats: int = 20
    max_seconds: float = 120.0
    measure_memory: bool = True
    threads: int = 1

    def problems(self, length: int) -> Iterator[Problem]:
        for rounds in self.n_hashes:
            yield Problem(**{**self.problem.to_json(), "length": length, "n_hashes": rounds})


def bench(
    operation: Annotated[
        str,
        typer.Argument(
            metavar="[hash|sort|attention|lsh|cross|reversible|ffn|loss|memory|model|huggingface|mha|encoder]",
            help="What to time; lsh is the whole call, cross that of separate q and k. "
            "From reversible on, they take --dtype, --device, "
            "--threads, --budget, --repeats, --json and --png.",
        ),
    ] = "lsh",
    seq_lens: Annotated[str, typer.Option(help="Sequence lengths, separated by commas.")] = "1024,4096",
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = 64,
    hashes: Annotated[str, typer.Option(help="Hash rounds, separated by commas.")] = "4",
    chunk: Annotated[int, typer.Option(help="Chunk length.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    causal: Annotated[bool, typer.Option("--causal/--no-causal", help="See no later position.")] = True,
    backward: Annotated[
        bool, typer.Option("--backward/--forward-only", help="Time backward as well as forward.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    backend: Annotated[str, typer.Option(help="auto, reference, native or triton.")] = "auto",
    compare: Annotated[
        str | None,
        typer.Option(
            help=f"Peers to time in the same run: {', '.join(PEERS)}, separated by commas, or none. "
            "flash and cudnn are SDPA's back ends on a GPU.",
            show_default="those installed",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's number")] = None,
    budget: Annotated[float, typer.Option(help="Seconds to spend on each row's repeats.")] = 2.0,
    repeats: Annotated[int, typer.Option(help="Most repeats of a row.")] = 20,
    max_seconds: Annotated[
        float, typer.Option(help="Leave out a peer that is predicted to take longer than this for one call.")
    ] = 120.0,
    measure_memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure peak working memory.")
    ] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all as JSON.")
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the rows as CSV.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Draw what `memory` measures.")
    ] = None,
) -> None:
    """Time the kernels on this machine, beside the peers.

    Every row is the median of n runs, taken in turns with the other rows. A ratio such as 25.0x says how many
    times longer the other call takes. Memory is what a call holds at its worst beyond inputs, outputs and
    gradients.
    """
    if operation in layers_report.OPERATIONS:
        for name, file in (("--json", json_file), ("--png", picture)):
            writable_file(name, file)
        missing = PEERS["hf"].missing() if operation == "huggingface" else None
        if missing is not None:
            raise usage_error(missing)
        console = new_console()
        document = layers_report.run(
            operation,
            threads=positive("--threads", threads if threads is not None else torch.get_num_threads()),
            budget=positive("--budget", budget),
            repeats=positive("--repeats", repeats),
            device=_checked_device(device),
            dtype=DTYPES[choice("--dtype", dtype, tuple(DTYPES))],
        )
        layers_report.show(document, console)
        layers_report.save(document, json_file, picture)
        return
    settings = Settings(
        operation=choice("OPERATION", operation, (*OPERATIONS, *layers_report.OPERATIONS)),
        lengths=integers("--seq-lens", seq_lens),
        n_hashes=integers("--hashes", hashes),
        problem=Problem(
            batch=positive("--batch", batch),
            heads=positive("--heads", heads),
            head_dim=positive("--head-dim", head_dim, most=256),
            chunk_length=positive("--chunk", chunk),
            causal=causal,
            dtype=choice("--dtype", dtype, tuple(DTYPES)),
            device=_checked_device(device),
            backend=live_backend(backend, device, DTYPES[dtype]),
        ),
        backward=backward,
        budget=positive("--budget", budget),
        max_repeats=positive("--repeats", repeats),
        max_seconds=positive("--max-seconds", max_seconds),
        measure_memory=measure_memory,
        threads=positive("--threads", threads if threads is not None else torch.get_num_threads()),
    )
    for name, file in (("--json", json_file), ("--csv", csv_file)):
        writable_file(name, file)
    console = new_console()
    settings.compare = _checked_peers(settings, compare, console)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        report = run(settings, console)
    finally:
        torch.set_num_threads(threads_before)
    report.print(console)
    if json_file is not None:
        report.write_json(json_file)
        console.print(f"Wrote {json_file}")
    if csv_file is not None:
        report.write_csv(csv_file)
        console.print(f"Wrote {csv_file}")
    if not report.agrees:
        raise typer.Exit(1)


def _checked_device(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise usage_error(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise usage_error(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise usage_error(
            f"--device {name}: torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices; "
            "'reformer-kernels info' lists what runs here"
        )
    return name


def _checked_peers(settings: Settings, text: str | None, console: Console) -> tuple[str, ...]:
    """The peers that can run. One asked for by name and missing is named; so is one left out by default."""
    rows = PEER_ROWS[settings.operation]
    wanted = tuple(PEERS) if text is None else choices("--compare", text, tuple(PEERS))
    present = []
    for key in wanted:
        reason, only_on = PEERS[key].missing(), PEERS[key].device
        if only_on not in (None, torch.device(settings.problem.device).type):
            if text is not None:
                message = f"{PEERS[key].title} is compared on {only_on}, not on {settings.problem.device}"
                console.print(f"[yellow]Left out:[/] {message}.", highlight=False)
        elif key not in rows:
            reason = (
                None if text is None else f"{PEERS[key].title} has no call for {settings.operation} alone"
            )
            if reason:
                console.print(f"[yellow]Left out:[/] {reason}.", highlight=False)
        elif reason is not None:
            console.print(f"[yellow]Left out:[/] {reason}", highlight=False)
        else:
            present.append(key)
    if "torch" in rows:
        present.append("torch")
    return tuple(present)


def run(settings: Settings, console: Console) -> Report:
    """Measure everything; what is under way shows on standard error."""
    device = torch.device(settings.problem.device)
    with Console(stderr=True).status("measuring the machine's own rates") as status:
        meter = machine.RateMeter(device, settings.problem.torch_dtype)
        cases = meter.cases()
        interleave(cases, budget=0.5, max_repeats=3)
        meter.take(cases)
        report = Report(settings, meter.rates(), sys.argv[1:])
        for length in settings.lengths:
            _run_length(settings, length, report, meter, status.update)
        report.rates = meter.rates()
        if settings.measure_memory:
            _measure_memory(settings, report, status.update)
    return report


def _run_length(
    settings: Settings, length: int, report: Report, meter: machine.RateMeter, say: Callable[[str], None]
) -> None:
    """Check, then time in turns, every row of one length."""
    workloads: list[Workload] = []
    for problem in settings.problems(length):
        say(f"L = {length}: checking that results agree with the peers'")
        if settings.operation != "sort":
            report.checks += _checks(settings, problem, report)
        for name in OURS[settings.operation]:
            workloads.append(build(settings.operation, name, problem))
        for key in settings.compare:
            name = PEER_ROWS[settings.operation][key]
            full = name in FULL_ATTENTION.values()
            if full and any(workload.name == name for workload in workloads):
                continue  # full attention has no rounds: one row a length
            try:
                _refuse_too_large(settings, key, problem, report)
                workloads.append(build(settings.operation, name, problem))
            except PeerRefusesError as reason:
                report.left_out(name, problem, str(reason))
        if settings.operation == "sort":
            ours, theirs = workloads[-2:]
            report.checks.append(agreement.check_sort(problem, ours.forward(), theirs.forward()))

    cases: list[Case] = []
    owners: list[Workload] = []
    rate_cases = meter.cases()
    for workload in workloads:
        new = workload.cases(settings.backward)
        cases += new
        owners += [workload] * len(new)
    names = [*(owner.name for owner in owners), "a matrix product", "a copy"]
    interleave(
        [*cases, *rate_cases],
        budget=settings.budget,
        max_repeats=settings.max_repeats,
        progress=lambda index: say(f"L = {length}: timing {names[index]}"),
    )
    meter.take(rate_cases)
    for case, workload in zip(cases, owners, strict=True):
        for phase, spread in case.spreads().items():
            report.rows.append(Row(workload.name, workload.problem, phase, spread, workload.work))


def _checks(settings: Settings, problem: Problem, report: Report) -> list[agreement.Agreement]:
    found: list[agreement.Agreement] = []
    if settings.operation == "cross":
        found.append(agreement.check_cross(problem))
    for key in settings.compare:
        if PEERS[key].preset is not None:
            try:
                _refuse_too_large(settings, key, problem, report)
                found += agreement.check(key, settings.operation, problem)
            except PeerRefusesError:
                pass  # said when its row is left out
    return [dataclasses.replace(check, problem=problem) for check in found]


def _refuse_too_large(settings: Settings, key: str, problem: Problem, report: Report) -> None:
    """Leave out a peer that would not fit in memory or would take too long.

    Raises:
        PeerRefusesError: with the prediction.
    """
    if settings.operation not in ("lsh", "attention", "cross"):
        return
    if key in FULL_ATTENTION:
        work = full_attention_work(problem)
        share = SDPA_SHARE_OF_MATMUL
    else:
        work = attention_work(problem, problem.config("trax"))
        share = REFORMER_PEER_SHARE_OF_MATMUL
        pairs = (work.forward_flops or 0.0) / (4 * problem.head_dim)
        need = pairs * PEER_BYTES_PER_PAIR["backward" if settings.backward else "forward"]
        have = machine.available_memory()
        if problem.device == "cpu" and have is not None and need > 0.8 * have:
            raise PeerRefusesError(f"predicted to need {need / GIB:.0f} GiB; {have / GIB:.0f} GiB are free")
    flops = work.flops("forward+backward" if settings.backward else "forward") or 0.0
    seconds = flops / (share * report.rates.matmul_gflops * 1e9)
    if seconds > settings.max_seconds:
        raise PeerRefusesError(
            f"predicted to take {seconds:.0f} s a call; --max-seconds {seconds:.0f} allows it"
        )


def _measure_memory(settings: Settings, report: Report, say: Callable[[str], None]) -> None:
    """Fill in the rows' working memory, measured in a fresh process."""
    if not memory.can_measure(torch.device(settings.problem.device)):
        report.memory_notes.append("working memory is not measured on this system (it needs Linux or CUDA)")
        return
    wanted = {(row.name, row.problem): None for row in report.rows}
    requests = [(settings.operation, name, problem, settings.backward) for name, problem in wanted]
    results = memory.measure_all(requests, settings.threads)
    for _, name, problem, _ in requests:
        say(f"L = {problem.length}: peak memory of {name}")
        found = next(results)
        if isinstance(found, str):
            report.memory_notes.append(f"no memory figure for {name} at L = {problem.length}: {found}")
            continue
        for row in report.rows:
            if row.name == name and row.problem == problem:
                row.working_memory = found.get(row.phase)
