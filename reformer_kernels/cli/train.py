"""`reformer-kernels train`: a byte-level language model on any text."""

from __future__ import annotations

import dataclasses
import itertools
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
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text as RichText

from reformer_kernels._files import remove_left_over
from reformer_kernels._limits import MAX_HEAD_DIM
from reformer_kernels.cli import arguments
from reformer_kernels.cli.arguments import (
    INTERRUPTED,
    new_console,
    positive,
    printable,
    usable_backend,
    usage_error,
)
from reformer_kernels.training.checkpoint import LIMITS, Recipe, read_checkpoint
from reformer_kernels.training.text import TextError, load_text
from reformer_kernels.training.trainer import DivergedError, Trainer

CHANGEABLE = ("steps", "lr")
"""The parts of its recipe that a resumed run may change."""

SHORT_EVALUATION = 4
LONG_EVALUATION = 16
PROMPT_LENGTH = 200
SMOOTHING = 0.9


class Interrupt:
    """Remembers whether Ctrl-C was pressed. A second press raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.pressed = False

    def __call__(self) -> bool:
        return self.pressed

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
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
        int | None, typer.Option(help="Seed of weights, text order and hashing.", show_default="0")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Save here, at each evaluation and at the end.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations on held-out text.")] = 50,
    sample_length: Annotated[int, typer.Option(help="Bytes to write at the end; 0 for none.")] = 300,
    backend: Annotated[str, typer.Option(help="auto, reference, native or triton.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's number")] = None,
) -> None:
    """Train a byte-level language model with LSH attention.

    Ctrl-C finishes the step, saves a checkpoint (to FOLDER, or to a new folder here) and exits with code 130.
    The same command with --resume continues, with the same losses as a run that was never stopped.
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
            positive("--" + name.replace("_", "-"), value, LIMITS[name])
    positive("--eval-every", eval_every)
    if sample_length < 0:
        raise usage_error(f"--sample-length must be at least 0, got {sample_length}")
    if not 0 <= (seed or 0) < 2**40:
        raise usage_error(f"--seed must be from 0 to 2**40 - 1, got {seed}")
    usable_backend(backend, "cpu", torch.float32)
    if checkpoint is not None:
        _check_folder(checkpoint)
        if checkpoint.exists():
            remove_left_over(checkpoint)
    torch.set_num_threads(arguments.threads(threads))

    console = new_console()
    try:
        trainer = _make_trainer(text, given, checkpoint, resume, overwrite, backend)
    except (TextError, ValueError) as error:  # ValueError: a checkpoint or a size that is not accepted
        raise usage_error(str(error)) from error
    console.print(
        f"{trainer.parameters / 1e6:.1f} million parameters; {trainer.text.size / 1e6:.1f} MB of text "
        f"({trainer.text.name}), {trainer.text.held_out.numel() / 1e6:.1f} MB of it held out",
        highlight=False,
        markup=False,
    )
    if trainer.note is not None:
        console.print(trainer.note, highlight=False)
    if resume:
        console.print(f"Resuming {checkpoint} after step {trainer.step}.", highlight=False, markup=False)
    interrupt = Interrupt()
    try:
        with interrupt.watch():
            finished = _run(trainer, console, checkpoint, eval_every, sample_length, interrupt)
    except (DivergedError, OSError) as error:
        console.print(f"[red]Stopped:[/] {escape(str(error))}.", highlight=False)
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
    if resume:
        if checkpoint is None:
            raise usage_error("--resume needs --checkpoint FOLDER, the folder to continue from")
        saved = read_checkpoint(checkpoint)
        for name, value in given.items():
            old = getattr(saved.recipe, name)
            if name not in CHANGEABLE and value != old:
                flag = "--" + name.replace("_", "-")
                raise usage_error(
                    f"{checkpoint} was trained with {flag} {old}, got {flag} {value}; leave it out"
                )
        recipe = dataclasses.replace(saved.recipe, **given)
        if saved.step >= recipe.steps:
            raise usage_error(
                f"{checkpoint} has finished its {recipe.steps} steps; give a larger --steps to continue"
            )
        return Trainer.resume(checkpoint, load_text(text, recipe.seq_len), recipe=recipe, backend=backend)
    if checkpoint is not None and checkpoint.exists() and any(checkpoint.iterdir()) and not overwrite:
        raise usage_error(
            f"{checkpoint} exists and is not empty; continue from it with --resume or replace the checkpoint "
            "in it with --overwrite"
        )
    recipe = Recipe(**given)
    if recipe.dim % recipe.heads or recipe.dim // recipe.heads > MAX_HEAD_DIM:
        raise usage_error(
            f"--dim must be a multiple of --heads, at most {MAX_HEAD_DIM} times it, got --dim {recipe.dim} "
            f"and --heads {recipe.heads}"
        )
    return Trainer(recipe, load_text(text, recipe.seq_len), backend)


def _check_folder(folder: Path) -> None:
    """Refuse at once, before minutes of work, a checkpoint folder that could not be written."""
    if folder.exists() and not folder.is_dir():
        raise usage_error(f"--checkpoint must name a folder, got the file {folder}")
    if not folder.absolute().parent.is_dir():
        raise usage_error(f"--checkpoint: the folder {folder.absolute().parent} does not exist")


def _run(
    trainer: Trainer,
    console: Console,
    checkpoint: Path | None,
    eval_every: int,
    sample_length: int,
    interrupt: Interrupt,
) -> bool:
    """Train to the end. Returns whether it was reached, which Ctrl-C prevents."""
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
                    try:
                        _save(trainer, checkpoint)
                    except OSError as error:  # the next evaluation may find room again
                        progress.console.print(f"[red]Not saved:[/] {escape(str(error))}.", highlight=False)
    if interrupt():
        return _leave(trainer, console, checkpoint)
    if checkpoint is not None:
        _save(trainer, checkpoint)
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
        console.print(f"Saved {checkpoint}", highlight=False, markup=False)
    return True


def _leave(trainer: Trainer, console: Console, checkpoint: Path | None) -> bool:
    folder = _new_folder() if checkpoint is None else checkpoint
    try:
        _save(trainer, folder)
    except OSError:
        if checkpoint is None:
            folder.rmdir()
        raise
    console.print(
        f"Stopped after step {trainer.step} of {trainer.recipe.steps}; saved {folder}. "
        f"Continue with: reformer-kernels train --checkpoint {folder} --resume (and the same text)",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return False


def _new_folder() -> Path:
    """A new folder here whose name no other run has, not even one that stops in the same second."""
    name = time.strftime("reformer-train-%Y%m%d-%H%M%S")
    for attempt in itertools.count(1):
        folder = Path(name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        break
    return folder


def _save(trainer: Trainer, folder: Path) -> None:
    """Save a checkpoint. Raises OSError, which says where, why and what is left."""
    try:
        trainer.save(folder)
    except OSError as error:
        raise OSError(
            f"cannot save the checkpoint to {folder} ({error.strerror or error}); an older one there is whole"
        ) from error
