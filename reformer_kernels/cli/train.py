"""`reformer-kernels train`: a byte-level language model on any text."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text as RichText

from reformer_kernels.cli.arguments import (
    INTERRUPTED,
    new_console,
    positive,
    printable,
    usable_backend,
    usage_error,
    writable_file,
)
from reformer_kernels.training.text import TextError, load_text
from reformer_kernels.training.trainer import CheckpointError, DivergedError, Recipe, Trainer, read_checkpoint

CHANGEABLE = ("steps", "lr")
"""What a resumed run may change of its recipe."""

SHORT_EVALUATION = 4
LONG_EVALUATION = 16
PROMPT_LENGTH = 200
SMOOTHING = 0.9


class Interrupt:
    """Whether Ctrl-C was pressed. A second press raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.pressed = False

    def __call__(self) -> bool:
        return self.pressed

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    @contextmanager
    def watch(self) -> Iterator[None]:
        previous = signal.signal(signal.SIGINT, self.handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def train(
    text: Annotated[
        Path | None,
        typer.Argument(help="A text file, or a folder of them.", show_default="Python's standard library"),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.", show_default="200")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Bytes in a sequence.", show_default="4096")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences in a step.", show_default="1")] = None,
    layers: Annotated[int | None, typer.Option(help="Transformer blocks.", show_default="2")] = None,
    dim: Annotated[int | None, typer.Option(help="Size of hidden states.", show_default="256")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.", show_default="4")] = None,
    hashes: Annotated[int | None, typer.Option(help="Hash rounds.", show_default="2")] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Chunk length of LSH attention.", show_default="64")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.", show_default="0.01")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of weights, text order and hashing.", show_default="0")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save here, at each evaluation and at the end.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations on held-out text.")] = 50,
    sample_length: Annotated[int, typer.Option(help="Bytes to write at the end; 0 for none.")] = 300,
    backend: Annotated[str, typer.Option(help="auto, reference, native or triton.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's number")] = None,
) -> None:
    """Train a byte-level language model with LSH attention.

    Ctrl-C finishes the step, saves a checkpoint (to FILE, or to a new file in this folder) and leaves with
    exit code 130; the same command with --resume goes on, with the same losses as a run never stopped.
    """
    options: dict[str, Any] = {
        "steps": steps,
        "seq_len": seq_len,
        "batch": batch,
        "layers": layers,
        "dim": dim,
        "heads": heads,
    }
    options |= {"hashes": hashes, "chunk": chunk, "lr": lr, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name != "seed":
            positive("--" + name.replace("_", "-"), value)
    positive("--eval-every", eval_every)
    if sample_length < 0:
        raise usage_error(f"--sample-length must be at least 0, got {sample_length}")
    if not 0 <= (seed or 0) < 2**40:
        raise usage_error(f"--seed must be from 0 to 2**40 - 1, got {seed}")
    usable_backend(backend, "cpu", torch.float32)
    writable_file("--checkpoint", checkpoint)
    if threads is not None:
        torch.set_num_threads(positive("--threads", threads))

    console = new_console()
    try:
        trainer = _make_trainer(text, given, checkpoint, resume, overwrite, backend)
    except (TextError, CheckpointError) as error:
        raise usage_error(str(error)) from error
    console.print(
        f"{trainer.parameters / 1e6:.1f} million parameters; {trainer.text.size / 1e6:.1f} MB of text "
        f"({trainer.text.name}), {trainer.text.held_out.numel() / 1e6:.1f} MB of it held out",
        highlight=False,
    )
    if resume:
        console.print(f"Resuming {checkpoint} after step {trainer.step}.", highlight=False)
    interrupt = Interrupt()
    try:
        with interrupt.watch():
            finished = _run(trainer, console, checkpoint, eval_every, sample_length, interrupt)
    except DivergedError as error:
        console.print(f"[red]Stopped:[/] {error}.", highlight=False)
        raise typer.Exit(1) from error
    if not finished:
        raise typer.Exit(INTERRUPTED)


def _make_trainer(
    text: Path | None,
    given: dict[str, Any],
    checkpoint: Path | None,
    resume: bool,
    overwrite: bool,
    backend: str,
) -> Trainer:
    state = None
    if resume:
        if checkpoint is None:
            raise CheckpointError("--resume needs --checkpoint FILE, the file to go on from")
        recipe, state = read_checkpoint(checkpoint)
        for name, value in given.items():
            saved = getattr(recipe, name)
            if name not in CHANGEABLE and value != saved:
                flag = "--" + name.replace("_", "-")
                raise CheckpointError(
                    f"{checkpoint} was trained with {flag} {saved}, got {flag} {value}; leave it out"
                )
        recipe = dataclasses.replace(recipe, **given)
        if state["step"] >= recipe.steps:
            raise CheckpointError(
                f"{checkpoint} has finished its {recipe.steps} steps; give a larger --steps to go on"
            )
    else:
        if checkpoint is not None and checkpoint.exists() and not overwrite:
            raise CheckpointError(
                f"{checkpoint} exists; go on from it with --resume or replace it with --overwrite"
            )
        recipe = Recipe(**given)
    if recipe.dim % recipe.heads or recipe.dim // recipe.heads > 256:
        raise CheckpointError(
            f"--dim must be a multiple of --heads, at most 256 times it, got --dim {recipe.dim} "
            f"and --heads {recipe.heads}"
        )
    trainer = Trainer(recipe, load_text(text, recipe.seq_len), backend)
    if state is not None and checkpoint is not None:
        trainer.restore(state, checkpoint)
    return trainer


def _run(
    trainer: Trainer,
    console: Console,
    checkpoint: Path | None,
    eval_every: int,
    sample_length: int,
    interrupt: Interrupt,
) -> bool:
    """Train to the end; False where Ctrl-C ended it first."""
    recipe = trainer.recipe
    before = trainer.evaluate(SHORT_EVALUATION, interrupt)
    console.print(f"step {trainer.step:>6}  held-out {before:.3f} bits per byte", highlight=False)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("training", total=recipe.steps, completed=trainer.step, facts="")
        smoothed = math.nan
        training_seconds = 0.0
        first = trainer.step
        while trainer.step < recipe.steps and not interrupt():
            start = time.perf_counter()
            loss = trainer.train_step()
            training_seconds += time.perf_counter() - start
            smoothed = loss if math.isnan(smoothed) else SMOOTHING * smoothed + (1 - SMOOTHING) * loss
            rate = (trainer.step - first) * trainer.tokens_per_step / training_seconds
            facts = f"{smoothed:.3f} bits per byte, {rate:,.0f} tokens/s"
            progress.update(task, completed=trainer.step, facts=facts)
            if trainer.step % eval_every == 0 and trainer.step < recipe.steps and not interrupt():
                held_out = trainer.evaluate(SHORT_EVALUATION, interrupt)
                progress.console.print(
                    f"step {trainer.step:>6}  held-out {held_out:.3f} bits per byte, "
                    f"training {smoothed:.3f}, {rate:,.0f} tokens/s",
                    highlight=False,
                )
                if checkpoint is not None:
                    trainer.save(checkpoint)
    if interrupt():
        return _leave(trainer, console, checkpoint)
    if checkpoint is not None:
        trainer.save(checkpoint)
    after = trainer.evaluate(LONG_EVALUATION, interrupt)
    console.print(
        f"step {trainer.step:>6}  held-out {after:.3f} bits per byte "
        f"(training {smoothed:.3f}), from {before:.3f}; {rate:,.0f} tokens/s",
        highlight=False,
    )
    if sample_length and not interrupt():
        prompt = bytes(trainer.text.held_out[:PROMPT_LENGTH].tolist())
        with console.status("writing a sample"):
            written = trainer.sample(prompt, sample_length, stop=interrupt)
        sample = RichText(printable(prompt), style="dim").append(printable(written), style="not dim bold")
        console.print(Panel(sample, title="held-out text, then the model's own", title_align="left"))
    if checkpoint is not None:
        console.print(f"Saved {checkpoint}", highlight=False)
    return True


def _leave(trainer: Trainer, console: Console, checkpoint: Path | None) -> bool:
    if checkpoint is None:
        checkpoint = Path(time.strftime("reformer-train-%Y%m%d-%H%M%S.pt"))
    trainer.save(checkpoint)
    console.print(
        f"Stopped after step {trainer.step} of {trainer.recipe.steps}; saved {checkpoint}. "
        f"Go on with: reformer-kernels train --checkpoint {checkpoint} --resume (and the same text)",
        highlight=False,
        soft_wrap=True,
    )
    return False
