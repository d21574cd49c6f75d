"""`reformer-kernels bench`: the benchmarks of the registry as commands, and what is done with saved results.

Each operation is a command with exactly the options that it takes. `reformer-kernels bench` alone, or with
options alone, is `bench lsh`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from typer.core import TyperGroup

from reformer_kernels._limits import MAX_HEAD_DIM, MAX_LENGTH
from reformer_kernels.benchmarks import plots, results, tables
from reformer_kernels.benchmarks.harness import Settings, run
from reformer_kernels.benchmarks.peers import PEERS
from reformer_kernels.benchmarks.registry import AXES, OPERATIONS, SINGLE, Operation
from reformer_kernels.benchmarks.sizes import DTYPES, Sizes
from reformer_kernels.cli import arguments
from reformer_kernels.cli.arguments import usage_error, writable_file
from reformer_kernels.cli.bench_results import compare, plot
from reformer_kernels.config import MAX_CHUNK_LENGTH, MAX_HASHES
from reformer_kernels.models.config import MAX_SIZE

DEFAULT = next(iter(OPERATIONS))
TABLE_WIDTH = 100

LIMITS = {
    "seq_lens": MAX_LENGTH,
    "head_dim": MAX_HEAD_DIM,
    "layers": 10_000,
    "hashes": MAX_HASHES,
    "chunk": MAX_CHUNK_LENGTH,
}
"""The largest values of options; those of other sizes is `MAX_SIZE`."""

OPTIONS: dict[str, Any] = {
    "seq_lens": Annotated[str, typer.Option(help="Sequence lengths, separated by commas.")],
    "batch": Annotated[int, typer.Option(help="Batch size.")],
    "heads": Annotated[int, typer.Option(help="Attention heads.")],
    "head_dim": Annotated[int, typer.Option(help="Size of a head.")],
    "width": Annotated[int, typer.Option(help="Size of the hidden states.")],
    "layers": Annotated[str, typer.Option(help="Numbers of layers, separated by commas.")],
    "d_ff": Annotated[str, typer.Option(help="Inner sizes of the feed-forward, separated by commas.")],
    "vocabulary": Annotated[str, typer.Option(help="Sizes of the vocabulary, separated by commas.")],
    "variants": Annotated[str, typer.Option()],
    "hashes": Annotated[str, typer.Option(help="Hash rounds, separated by commas.")],
    "chunk": Annotated[int, typer.Option(help="Chunk length.")],
    "causal": Annotated[bool, typer.Option("--causal/--no-causal", help="See no later position.")],
    "backend": Annotated[str, typer.Option(help="auto, reference, native or triton.")],
    "compare": Annotated[str | None, typer.Option(show_default="those installed")],
    "max_seconds": Annotated[
        float, typer.Option(help="Leave out a peer that is predicted to take longer than this for one call.")
    ],
    "dtype": Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")],
    "device": Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")],
    "threads": Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's number")],
    "backward": Annotated[
        bool, typer.Option("--backward/--forward-only", help="Time backward as well as forward.")
    ],
    "budget": Annotated[float, typer.Option(help="Seconds to spend on the samples of each call.")],
    "repeats": Annotated[int, typer.Option(help="The most samples of a call.")],
    "memory": Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory.")],
    "wide": Annotated[bool, typer.Option("--wide", help="Show every column.")],
    "json": Annotated[Path | None, typer.Option(metavar="FILE", help="Write all results as JSON.")],
    "csv": Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows as CSV.")],
    "plot": Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw time and memory, as .png or .svg.")
    ],
}
"""Every option that some operation takes, as Typer reads it."""

COMMON: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "threads": None,
    "backward": True,
    "budget": 2.0,
    "repeats": 20,
    "memory": True,
    "wide": False,
    "json": None,
    "csv": None,
    "plot": None,
}
"""The options that all operations take, with their defaults."""


class BenchGroup(TyperGroup):
    """A group of commands whose first one runs where options come without a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = [DEFAULT, *args]
        elif args[0] != "--help" and args[0] not in self.commands:
            names = ", ".join(self.commands)
            raise usage_error(f"OPERATION must be one of {names}, got {args[0]!r}")
        return super().parse_args(ctx, args)


bench = typer.Typer(
    cls=BenchGroup,
    help=f"Time the kernels on this machine, beside the peers. Without OPERATION: {DEFAULT}.\n\n"
    "Every figure is the median of n samples, taken alternately with the other calls. A ratio such as 25.0x "
    "says how many times as long the other call takes. 'bench OPERATION --help' lists what OPERATION takes.",
    subcommand_metavar="[OPERATION] [OPTIONS]",
    rich_markup_mode="markdown",
)


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _command(operation: Operation) -> Callable[..., None]:
    """The command of an operation: a function whose signature has the options that the operation takes."""

    def command(ctx: typer.Context, **options: Any) -> None:
        if ctx.args:
            raise usage_error(_why_refused(operation, ctx.args[0]))
        _bench(operation, options)

    defaults = {**operation.options, **COMMON}
    keyword, positional = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("ctx", positional, annotation=typer.Context)]
    for name, default in defaults.items():
        annotation = _annotation(operation, name)
        parameters.append(inspect.Parameter(name, keyword, default=default, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = operation.help
    return command


def _annotation(operation: Operation, option: str) -> Any:
    """An option's annotation, with the choices that this operation has."""
    if option == "variants":
        title = operation.variant_title.capitalize()
        text = f"{title}, separated by commas: {', '.join(operation.variants)}."
        return Annotated[str, typer.Option(help=text)]
    if option == "compare":
        text = f"Peers to time in the same run, separated by commas, or none: {', '.join(operation.peers)}."
        if "flash" in operation.peers:
            text += " flash and cudnn are SDPA's back ends on a GPU."
        return Annotated[str | None, typer.Option(help=text, show_default="those installed")]
    return OPTIONS[option]


def _why_refused(operation: Operation, argument: str) -> str:
    flag = argument.split("=")[0]
    takes = ", ".join(_flag(name) for name in (*operation.options, *COMMON))
    if not flag.startswith("-"):
        return f"bench {operation.name} takes options only, got {argument!r}; they are {takes}"
    return f"bench {operation.name} takes no {flag}; it takes {takes}"


for _operation in OPERATIONS.values():
    bench.command(
        _operation.name,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(_command(_operation))
bench.command("compare")(compare)
bench.command("plot")(plot)


def _bench(operation: Operation, options: dict[str, Any]) -> None:
    for name in ("json", "csv", "plot"):
        writable_file(_flag(name), options[name])
    if options["plot"] is not None:
        try:
            plots.check_plot_file(options["plot"])
        except plots.PlotError as error:
            raise usage_error(f"--plot: {error}") from error
    console = arguments.new_console(None if options["wide"] else TABLE_WIDTH)
    settings = _settings(operation, options, console)
    with Console(stderr=True).status("starting") as status:
        report = run(settings, status.update)
    document = report.to_json()
    if not report.rows:
        raise usage_error("nothing could be timed: " + "; ".join(left["reason"] for left in report.left_out))
    tables.print_results(document, console, wide=options["wide"])
    for name, write in (("json", results.write_json), ("csv", results.write_csv), ("plot", _draw)):
        if options[name] is not None:
            write(document, options[name])
            console.print(f"Wrote {options[name]}", highlight=False)
    if not report.agrees:
        raise typer.Exit(1)


def _draw(document: results.Document, file: Path) -> None:
    plots.draw([document], file)


def _settings(operation: Operation, options: dict[str, Any], console: Console) -> Settings:
    """The options, checked."""
    axes: dict[str, Any] = {}
    sizes: dict[str, Any] = {}
    for name in operation.options:
        value = options[name]
        if name == "variants":
            axes[AXES[name]] = arguments.choices(_flag(name), value, operation.variants)
            if not axes[AXES[name]]:
                raise usage_error(f"--variants must name one or more of {', '.join(operation.variants)}")
        elif name in AXES:
            axes[AXES[name]] = arguments.integers(_flag(name), value, most=LIMITS.get(name, MAX_SIZE))
        elif name in ("causal", "backend"):
            sizes[SINGLE[name]] = value
        elif name in SINGLE:
            most = LIMITS.get(name, MAX_SIZE)
            sizes[SINGLE[name]] = arguments.positive(_flag(name), value, most=most)
    dtype, device = options["dtype"], arguments.device(options["device"])
    arguments.choice("--dtype", dtype, tuple(DTYPES))
    if "backend" in sizes:
        arguments.usable_backend(sizes["backend"], device, DTYPES[dtype])
    _check_heads(sizes)
    if operation.package is not None and (reason := PEERS[operation.package].missing()) is not None:
        raise usage_error(reason)
    axes = {name: axes[name] for name in AXES.values() if name in axes}
    max_seconds = options.get("max_seconds")
    return Settings(
        operation,
        Sizes(**sizes, dtype=dtype, device=device),
        axes,
        compare=_peers(operation, options.get("compare"), device, console) if operation.peers else (),
        backward=options["backward"],
        budget=arguments.positive("--budget", options["budget"]),
        max_repeats=arguments.positive("--repeats", options["repeats"]),
        max_seconds=None if max_seconds is None else arguments.positive("--max-seconds", max_seconds),
        measure_memory=options["memory"],
        threads=arguments.threads(options["threads"]),
    )


def _check_heads(sizes: dict[str, Any]) -> None:
    """Where heads share the hidden states, each must get an equal part."""
    if "width" not in sizes or "heads" not in sizes or "head_dim" in sizes:
        return
    width, heads = sizes["width"], sizes["heads"]
    if width % heads or width // heads > MAX_HEAD_DIM:
        raise usage_error(
            f"--width must be a multiple of --heads, and a head at most {MAX_HEAD_DIM} wide, "
            f"got --width {width} and --heads {heads}"
        )


def _peers(operation: Operation, text: str | None, device: str, console: Console) -> tuple[str, ...]:
    """Keys of the peers that can run. Those asked for that cannot, and those missing, are named."""
    if text is None:
        wanted = tuple(operation.peers)
    else:
        wanted = arguments.choices("--compare", text, tuple(operation.peers))
    present = []
    for key in wanted:
        peer = PEERS[key]
        if peer.device not in (None, torch.device(device).type):
            reason = f"{peer.title} is compared on {peer.device}, not on {device}." if text else None
        else:
            reason = peer.missing()
            if reason is None:
                present.append(key)
        if reason is not None:
            console.print(f"[yellow]Left out:[/] {reason}", highlight=False)
    return tuple(present)
