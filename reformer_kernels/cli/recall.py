"""`reformer-kernels recall`: how much of full attention's mass the hashed windows catch."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table

from reformer_kernels._limits import MAX_HEAD_DIM, MAX_LENGTH
from reformer_kernels.benchmarks import machine
from reformer_kernels.benchmarks.recall import (
    CLUSTERS,
    Heads,
    RecallError,
    Row,
    clusters,
    load_model,
    measure,
    model_heads,
    read_heads,
)
from reformer_kernels.benchmarks.results import write_json
from reformer_kernels.cli import arguments
from reformer_kernels.cli.arguments import (
    choices,
    integers,
    new_console,
    positive,
    usage_error,
    writable_file,
)
from reformer_kernels.config import MAX_CHUNK_LENGTH, MAX_HASHES
from reformer_kernels.models.config import MAX_SIZE
from reformer_kernels.training.text import TextError, load_text

MASKS = {"causal": True, "both": False}
SYNTHETIC = {"heads": 2, "head_dim": 64, "noise": 0.5, "offset": 0.0}
SEQ_LEN = 2048


def recall(
    windows: Annotated[str, typer.Option(help="Keys that a query sees in a round.")] = "64,128,256",
    hashes: Annotated[str, typer.Option(help="Hash rounds, separated by commas.")] = "1,2,4,8",
    masks: Annotated[
        str | None,
        typer.Option(help="causal, both (every key), or both words.", show_default="both, or the model's"),
    ] = None,
    clustered: Annotated[
        str | None,
        typer.Option(
            "--clusters", help="Synthetic data: even, uneven.", show_default="both, without other data"
        ),
    ] = None,
    activations: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Tensors q and k, or qk, (B, H, L, D): .safetensors, or from torch.save."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A byte-level model of this package or of transformers; each LSH layer is measured.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What the model reads: the end of a text file or folder.",
            show_default="Python's standard library",
        ),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of synthetic data or of the text.", show_default=str(SEQ_LEN))
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Heads of synthetic data.", show_default="2")] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Size of a head of synthetic data.", show_default="64")
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            help="Spread of synthetic data around a centre; the centres' own is 1.", show_default="0.5"
        ),
    ] = None,
    offset: Annotated[
        float | None,
        typer.Option(
            help="Size of the part that all synthetic queries, or all keys, share.", show_default="0"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's number")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all as JSON.")
    ] = None,
) -> None:
    """The share of full attention's mass that hashed windows catch, by window and number of hashes.

    **cursor**: separate queries and keys, windows around cursors (`lsh_cross_attention`), within buckets;
    **across**: not only within. **equal rank**: the same hashes and sorted orders, chunks of equal rank set
    against each other. **shared-QK**: the paper's chunks (or the model's rule) over query-keys, of their own
    full attention. No form sees more than `window` keys a round.
    """
    window_sizes, rounds = (
        integers("--windows", windows, MAX_CHUNK_LENGTH),
        integers("--hashes", hashes, MAX_HASHES),
    )
    asked = None if masks is None else choices("--masks", masks, tuple(MASKS))
    if asked == ():
        raise usage_error("--masks must name causal, both, or both words")
    writable_file("--json", json_file)
    synthetic = {"heads": heads, "head_dim": head_dim, "noise": noise, "offset": offset}
    kinds = _kinds(clustered, activations is not None or model is not None)
    _refuse_unused(kinds, model, {"--text": text, "--seq-len": seq_len}, synthetic)
    length = positive("--seq-len", SEQ_LEN if seq_len is None else seq_len, MAX_LENGTH)
    torch.set_num_threads(arguments.threads(threads))
    data = _synthetic(kinds, length, synthetic)
    try:
        if activations is not None:
            data.append(read_heads(activations))
        if model is not None:
            data += model_heads(load_model(model), load_text(text, length).held_out[-length:])
    except (RecallError, TextError) as error:
        raise usage_error(str(error)) from error
    rows: list[Row] = []
    with torch.no_grad():
        for one in data:
            own = tuple(MASKS.values()) if one.rule is None else (one.rule.causal,)
            for causal in own if asked is None else (MASKS[mask] for mask in asked):
                rows += measure(one, window_sizes, rounds, causal)
    _print(rows)
    if json_file is not None:
        settings: dict[str, Any] = {
            "seq_len": length,
            **synthetic,
            "model": None if model is None else str(model),
        }
        provenance = machine.provenance(torch.device("cpu"))
        document = {"command": "recall", **provenance, "settings": settings}
        write_json(document | {"rows": [dataclasses.asdict(row) for row in rows]}, json_file)


def _kinds(clustered: str | None, other_data: bool) -> tuple[str, ...]:
    """The kinds of synthetic data: those asked for, or all where there is no other data."""
    if clustered is None:
        return () if other_data else CLUSTERS
    kinds = choices("--clusters", clustered, CLUSTERS)
    if not kinds and not other_data:
        raise usage_error("nothing to measure: give --clusters, --activations or --model")
    return kinds


def _refuse_unused(
    kinds: tuple[str, ...], model: Path | None, texts: dict[str, Any], synthetic: dict[str, Any]
) -> None:
    for name, value in synthetic.items():
        if value is not None and not kinds:
            raise usage_error(f"--{name.replace('_', '-')} is of synthetic data; give --clusters too")
    if texts["--text"] is not None and model is None:
        raise usage_error("--text is what a model reads; give --model too")
    if texts["--seq-len"] is not None and model is None and not kinds:
        raise usage_error("--seq-len is of synthetic data or of a model's text, not of --activations")


def _synthetic(kinds: tuple[str, ...], length: int, options: dict[str, Any]) -> list[Heads]:
    for name, default in SYNTHETIC.items():
        options[name] = default if options[name] is None else options[name]
    positive("--heads", options["heads"], MAX_SIZE)
    positive("--head-dim", options["head_dim"], MAX_HEAD_DIM)
    noise, offset = options["noise"], options["offset"]
    if not (math.isfinite(noise) and noise >= 0 and math.isfinite(offset)):
        raise usage_error(f"--noise and --offset must be finite and --noise >= 0, got {noise} and {offset}")
    return [clusters(kind, options["heads"], length, options["head_dim"], noise, offset) for kind in kinds]


def _print(rows: list[Row]) -> None:
    console = new_console(100)
    facts = machine.describe(torch.device("cpu"))
    console.print(f"{facts['cpu']}, {facts['threads']} threads, commit {machine.commit()}", highlight=False)
    forms = {
        "cursor": "cursor",
        "cursor_across": "across",
        "equal_rank": "equal rank",
        "shared_qk": "shared-QK",
    }
    forms = {name: title for name, title in forms.items() if any(getattr(r, name) is not None for r in rows)}
    table = Table("data", "mask", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title in ("window", "hashes", *forms.values()):
        table.add_column(title, justify="right")
    for row in rows:
        shares = (getattr(row, name) for name in forms)
        cells = ("" if share is None else f"{100 * share:.1f}%" for share in shares)
        mask = "causal" if row.causal else "both"
        table.add_row(row.data, mask, str(row.window), str(row.n_hashes), *cells)
    console.print(table)
