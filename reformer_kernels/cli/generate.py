"""`reformer-kernels generate`: text from a model that `reformer-kernels train` saved."""

from __future__ import annotations

import codecs
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from reformer_kernels.cli import arguments
from reformer_kernels.cli.arguments import INTERRUPTED, positive, printable, usage_error
from reformer_kernels.models import CheckpointError, ReformerLM
from reformer_kernels.training.byte_model import VOCABULARY, not_finite


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A folder that `reformer-kernels train` saved.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    length: Annotated[int, typer.Option(help="Bytes to write.")] = 300,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte each time.")] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(help="Draw among the k likeliest bytes only.", show_default="all")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw among the likeliest bytes with this total probability.", show_default="1"),
    ] = None,
    beams: Annotated[int, typer.Option(help="Beams of beam search; above 1 it needs temperature 0.")] = 1,
    hashes: Annotated[int | None, typer.Option(help="Hash rounds.", show_default="as in training")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's number")] = None,
) -> None:
    """Write the prompt and the model's continuation, byte by byte; the speed goes to standard error.

    Each byte takes the same time, however long the text before it is. Ctrl-C stops with exit code 130.
    """
    for name, value in (("--length", length), ("--beams", beams), ("--top-k", top_k), ("--hashes", hashes)):
        if value is not None:
            positive(name, value)
    if not prompt:
        raise usage_error("--prompt must hold at least one byte")
    if not 0 <= seed <= arguments.MAX_SEED:
        raise usage_error(f"--seed must be from 0 to 2**63 - 1, got {seed}")
    torch.set_num_threads(arguments.threads(threads))
    try:
        model = ReformerLM.load(checkpoint)
    except CheckpointError as error:
        raise usage_error(str(error)) from error
    if model.config.vocab_size != VOCABULARY:
        raise usage_error(
            f"{checkpoint} is a model of {model.config.vocab_size} tokens, not of the {VOCABULARY} bytes"
        )
    if broken := not_finite(model):
        raise usage_error(f"the weights in {checkpoint} are not finite ({', '.join(broken[:3])})")
    data = prompt.encode(errors="surrogateescape")
    tokens = torch.tensor([list(data)], dtype=torch.int64)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    typer.echo(printable(decoder.decode(data)), nl=False)
    start = time.perf_counter()
    count = 0
    try:
        if beams > 1:
            (continuation,) = model.generate(
                tokens,
                length,
                beams=beams,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                n_hashes=hashes,
            )
            new_bytes = iter(continuation)
        else:
            new_bytes = model.stream(
                tokens,
                length,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                n_hashes=hashes,
                generator=torch.Generator().manual_seed(seed),
            )
        for byte in new_bytes:
            typer.echo(printable(decoder.decode(bytes([int(byte)]))), nl=False)
            count += 1
    except ValueError as error:
        typer.echo("")
        raise usage_error(str(error)) from error
    except KeyboardInterrupt:
        typer.echo("")
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(printable(decoder.decode(b"", final=True)))
    typer.echo(f"{count / (time.perf_counter() - start):.0f} bytes/s", err=True)
