"""`reformer-kernels recall`: how much of full attention's mass the hashed windows catch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from torch import Tensor

from reformer_kernels import functional
from reformer_kernels._files import write_atomically
from reformer_kernels.benchmarks import machine
from reformer_kernels.cli.arguments import (
    choices,
    integers,
    new_console,
    positive,
    usage_error,
    writable_file,
)
from reformer_kernels.config import LSHConfig
from reformer_kernels.layout import Layout
from reformer_kernels.rule import normalise_keys

CLUSTERS = ("even", "uneven")
CAUSALITIES = {"causal": True, "both": False}
TOKENS_A_CLUSTER = 32
"""Tokens of the mean cluster of synthetic data."""
BLOCK_PAIRS = 2**24
"""Query-key pairs whose logits are held at once."""
SEED = 0


@dataclass(frozen=True)
class Heads:
    """Queries and keys (B, H, L, D) to attend with, or query-keys that a model shares between both."""

    name: str
    q: Tensor | None = None
    k: Tensor | None = None
    qk: Tensor | None = None


@dataclass(frozen=True)
class Row:
    """Shares of full attention's mass, 0 to 1, means over queries and heads; None where meaningless."""

    data: str
    causal: bool
    window: int
    n_hashes: int
    cursor: float | None
    cursor_across: float | None
    equal_rank: float | None
    shared_qk: float | None


def clusters(
    kind: str, heads: int, length: int, head_dim: int, noise: float, offset: float, seed: int = SEED
) -> Heads:
    """Queries and keys around common centres: centre + noise * normal, and `offset` times a vector of all.

    length / 32 normal centres, drawn alike ("even"), or the n-th in proportion to 1 / n ("uneven", of the
    keys in another order of the centres: what is often asked for need not be there often). Each of the two
    has one offset vector a head.
    """
    generator = torch.Generator().manual_seed(seed)
    count = max(2, length // TOKENS_A_CLUSTER)
    shares = torch.ones(count) if kind == "even" else 1 / torch.arange(1, count + 1)
    centres = torch.randn(heads, count, head_dim, generator=generator)

    def draw(shares: Tensor) -> Tensor:
        chosen = torch.multinomial(shares, heads * length, replacement=True, generator=generator)
        index = chosen.view(heads, length, 1).expand(-1, -1, head_dim)
        common = offset * torch.randn(heads, 1, head_dim, generator=generator)
        spread = noise * torch.randn(heads, length, head_dim, generator=generator)
        return (centres.gather(1, index) + spread + common)[None]

    q, k = draw(shares), draw(shares[torch.randperm(count, generator=generator)])
    return Heads(kind, q, k, qk=q)


def read_heads(file: Path) -> Heads:
    """q and k, or qk, or all, of a file that torch.save wrote: tensors (B, H, L, D)."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise usage_error(
            f"--tensors {file}: not a file of tensors that torch.save wrote ({error})"
        ) from error
    names = [n for n in ("q", "k", "qk") if isinstance(found, dict) and isinstance(found.get(n), Tensor)]
    if "qk" not in names and not {"q", "k"} <= set(names):
        raise usage_error(f"--tensors {file} must hold a dictionary with tensors q and k, or qk")
    heads = Heads(file.name, **{n: found[n].float() for n in names if n == "qk" or {"q", "k"} <= set(names)})
    for name in names:
        if found[name].dim() != 4 or not bool(found[name].isfinite().all()):
            raise usage_error(
                f"--tensors {file}: {name} must be finite, (batch, heads, length, head_dim), "
                f"got shape {tuple(found[name].shape)}"
            )
    if heads.q is not None and heads.k is not None:
        q, k = heads.q.shape, heads.k.shape
        if q[:2] != k[:2] or q[3] != k[3]:
            raise usage_error(f"--tensors {file}: q and k must differ in length only, got {q} and {k}")
    return heads


def blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Ranges of queries whose logits fit `BLOCK_PAIRS`."""
    size = max(1, BLOCK_PAIRS // (k.shape[0] * k.shape[1] * k.shape[2]))
    for first in range(0, q.shape[2], size):
        yield slice(first, min(first + size, q.shape[2]))


def masked_logits(q: Tensor, k: Tensor, rows: slice, scale: float, causal: bool, no_self: bool) -> Tensor:
    logits = scale * (q[:, :, rows] @ k.mT)
    i, j = torch.arange(rows.start, rows.stop)[:, None], torch.arange(k.shape[2])
    hidden = (j > i) & causal | (j == i) & no_self
    return logits.masked_fill(hidden, -math.inf)


def full_lse(q: Tensor, k: Tensor, scale: float, causal: bool, *, no_self: bool = False) -> Tensor:
    """The log-sum-exp of full attention's logits, (B, H, L_q)."""
    parts = [masked_logits(q, k, rows, scale, causal, no_self).logsumexp(-1) for rows in blocks(q, k)]
    return torch.cat(parts, dim=2)


def share(lse: Tensor, full: Tensor) -> float:
    """Mean of exp(lse - full): over the union of a query's keys, that is the probability that it caught.

    Queries that full attention leaves nothing to see are left out.
    """
    return float((lse - full)[full.isfinite()].double().exp().mean())


def cursor_recall(
    q: Tensor, k: Tensor, config: LSHConfig, layout: tuple[Layout, Layout], full: Tensor
) -> float:
    v = k.new_zeros((*k.shape[:3], 1))
    _, lse = functional.lsh_cross_attention(q, k, v, config, layout=layout, return_lse=True)
    return share(lse, full)


def equal_rank_recall(
    q: Tensor, k: Tensor, config: LSHConfig, layout: tuple[Layout, Layout], full: Tensor
) -> float:
    """Of chunks of w / 2 sorted keys: a query sees that of its own rank, and the one before it."""
    chunk = max(1, config.window_size // 2)
    L_q, L_k = q.shape[2], k.shape[2]
    rank_q, rank_k = (one.order.long().argsort(dim=-1) for one in layout)
    own, theirs = rank_q * L_k // L_q // chunk, rank_k // chunk
    total, count = 0.0, 0
    for rows in blocks(q, k):
        seen = torch.zeros((*q.shape[:2], rows.stop - rows.start, L_k), dtype=torch.bool)
        for r in range(config.n_hashes):
            distance = own[:, :, r, rows, None] - theirs[:, :, r, None, :]
            seen |= (distance == 0) | (distance == 1)
        logits = masked_logits(q, k, rows, q.shape[-1] ** -0.5, config.causal, False)
        mass = (logits - full[:, :, rows, None]).exp()
        total += float((mass * seen).double().sum())
        count += seen[..., 0].numel()
    return total / count


def shared_recall(qk: Tensor, config: LSHConfig, full: Tensor) -> float:
    v = qk.new_zeros((*qk.shape[:3], 1))
    _, lse = functional.lsh_attention(qk, v, config, seed=SEED, return_lse=True)
    return share(lse, full)


def measure(heads: Heads, windows: Sequence[int], hashes: Sequence[int], causal: bool) -> Iterator[Row]:
    """One row for each window and number of hashes, on the same queries, keys and full attention."""
    full = shared_full = keys = None
    if heads.q is not None and heads.k is not None:
        full = full_lse(heads.q, heads.k, heads.q.shape[-1] ** -0.5, causal)
    if heads.qk is not None:
        keys = normalise_keys(heads.qk, 1)
        shared_full = full_lse(heads.qk, keys, 1.0, causal, no_self=True)
    for w in windows:
        for n_hashes in hashes:
            cursor = across = equal_rank = shared = None
            # `bucket_window` alone, so that short keys are hashed as long ones are.
            config = LSHConfig(window="bucket", bucket_window=w, n_hashes=n_hashes, causal=causal)
            if heads.q is not None and heads.k is not None and full is not None:
                layout = functional.lsh_cross_layout(heads.q, heads.k, config, seed=SEED)
                cursor = cursor_recall(heads.q, heads.k, config, layout, full)
                unmasked = dataclasses.replace(config, window="chunks", attend_across_buckets=True)
                if not unmasked.sees_all_keys(heads.k.shape[2]):  # there the layout is another
                    across = cursor_recall(heads.q, heads.k, unmasked, layout, full)
                equal_rank = equal_rank_recall(heads.q, heads.k, config, layout, full)
            if heads.qk is not None and shared_full is not None:
                chunks = LSHConfig.paper(chunk_length=max(1, w // 2), n_hashes=n_hashes, causal=causal)
                shared = shared_recall(heads.qk, chunks, shared_full)
            yield Row(heads.name, causal, w, n_hashes, cursor, across, equal_rank, shared)


def recall(
    windows: Annotated[str, typer.Option(help="Keys that a query sees in a round.")] = "64,128,256",
    hashes: Annotated[str, typer.Option(help="Hash rounds, separated by commas.")] = "1,2,4,8",
    masks: Annotated[str, typer.Option(help="causal, both (every key), or both words.")] = "causal,both",
    clustered: Annotated[
        str, typer.Option("--clusters", help="Synthetic data: even, uneven, or none.")
    ] = "even,uneven",
    seq_len: Annotated[int, typer.Option(help="Tokens of synthetic data.")] = 2048,
    heads: Annotated[int, typer.Option(help="Heads of synthetic data.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Size of a head of synthetic data.")] = 64,
    noise: Annotated[float, typer.Option(help="Spread around a centre; the centres' own is 1.")] = 0.5,
    offset: Annotated[float, typer.Option(help="Size of the part that all queries, or keys, share.")] = 0.0,
    tensors: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Real q and k, or qk, (B, H, L, D), as torch.save({...}) wrote them."
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
    against each other. **shared-QK**: the paper's chunks, over queries that are keys too, of their own full
    attention. No form sees more than `window` keys a round.
    """
    w, rounds = integers("--windows", windows), integers("--hashes", hashes)
    asked = choices("--masks", masks, tuple(CAUSALITIES))
    kinds = choices("--clusters", clustered, CLUSTERS)
    for name, value in (("--seq-len", seq_len), ("--heads", heads), ("--head-dim", head_dim)):
        positive(name, value)
    if not (math.isfinite(noise) and noise >= 0 and math.isfinite(offset)):
        raise usage_error(f"--noise and --offset must be finite and --noise >= 0, got {noise} and {offset}")
    writable_file("--json", json_file)
    if threads is not None:
        torch.set_num_threads(positive("--threads", threads))
    data = [clusters(kind, heads, seq_len, head_dim, noise, offset) for kind in kinds]
    if tensors is not None:
        data.append(read_heads(tensors))
    if not data or not asked:
        raise usage_error("nothing to measure: give --clusters or --tensors, and --masks")
    console = new_console()
    facts = machine.describe(torch.device("cpu"))
    console.print(f"{facts['cpu']}, {facts['threads']} threads, commit {machine.commit()}")
    table = Table("data", "mask", "window", "hashes", "cursor", "across", "equal rank", "shared-QK")
    rows = []
    with torch.no_grad():
        for one in data:
            for mask in asked:
                for row in measure(one, w, rounds, CAUSALITIES[mask]):
                    shares = (row.cursor, row.cursor_across, row.equal_rank, row.shared_qk)
                    cells = ("" if share is None else f"{100 * share:.1f}%" for share in shares)
                    table.add_row(row.data, mask, str(row.window), str(row.n_hashes), *cells)
                    rows.append(row)
    console.print(table)
    if json_file is not None:
        document: dict[str, Any] = {
            "command": "recall",
            "machine": facts,
            "commit": machine.commit(),
            "versions": machine.versions(),
            "settings": {
                "seq_len": seq_len,
                "heads": heads,
                "head_dim": head_dim,
                "noise": noise,
                "offset": offset,
            },
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        write_atomically(json_file, json.dumps(document, indent=1) + "\n")
