"""How much of full attention's mass hashed windows catch, on synthetic clusters, saved tensors or a model."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reformer_kernels import functional, hf
from reformer_kernels.config import LSHConfig
from reformer_kernels.layout import Layout
from reformer_kernels.models import Reformer, ReformerLM
from reformer_kernels.modules import LSHSelfAttention

CLUSTERS = ("even", "uneven")

TOKENS_A_CLUSTER = 32
"""Tokens of the mean cluster of synthetic data."""

BLOCK_PAIRS = 2**24
"""Query-key pairs whose logits are held at once."""

SEED = 0

BYTES = 256
BYTES_AND_TWO = 258
"""The vocabulary of google/reformer-enwik8: bytes after two special tokens."""


class RecallError(ValueError):
    """Tensors or a model that recall cannot be measured on; the message says why."""


@dataclass(frozen=True)
class Heads:
    """Queries and keys (B, H, L, D) to attend with, or query-keys that a model shares between both.

    Attributes:
        rule: how the query-keys attend; None: the paper's rule.
    """

    name: str
    q: Tensor | None = None
    k: Tensor | None = None
    qk: Tensor | None = None
    rule: LSHConfig | None = None


@dataclass(frozen=True)
class Row:
    """Shares of full attention's mass, 0 to 1, means over queries and heads; None without such a form.

    Attributes:
        cursor: separate queries and keys, windows around cursors, within buckets.
        cursor_across: the same, not only within buckets.
        equal_rank: the same hashes and sorted orders, chunks of equal rank against each other.
        shared_qk: shared query-keys in the paper's chunks, of their own full attention.
    """

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
    """Synthetic queries and keys: a common centre + noise * normal + offset * a vector that all share.

    There are length / 32 normal centres. They are drawn with equal probability ("even"), or the n-th in
    proportion to 1 / n ("uneven"; the keys rank the centres in another order, since what many queries ask
    for need not be there often). Queries and keys have one shared vector each in every head.
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
    """q and k, or qk, or all three, (B, H, L, D), of a .safetensors file or one that torch.save wrote.

    Raises:
        RecallError: the file is damaged, lacks them, or their shapes do not fit.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RecallError(f"{file} is not a file of tensors ({error})") from error
    names = [n for n in ("q", "k", "qk") if isinstance(tensors, dict) and isinstance(tensors.get(n), Tensor)]
    both = {"q", "k"} <= set(names)
    if "qk" not in names and not both:
        raise RecallError(f"{file} must hold tensors named q and k, or qk")
    for name in names:
        if tensors[name].dim() != 4 or not bool(tensors[name].isfinite().all()):
            raise RecallError(
                f"{file}: {name} must be finite, (batch, heads, length, head_dim), "
                f"got shape {tuple(tensors[name].shape)}"
            )
    q, k, qk = (tensors[name].float() if name in names else None for name in ("q", "k", "qk"))
    heads = Heads(file.name, q, k, qk) if both else Heads(file.name, qk=qk)
    if heads.q is not None and heads.k is not None:
        sizes = tuple(heads.q.shape), tuple(heads.k.shape)
        if sizes[0][:2] != sizes[1][:2] or sizes[0][3] != sizes[1][3]:
            raise RecallError(f"{file}: q and k must differ in length only, got {sizes[0]} and {sizes[1]}")
    return heads


def load_model(folder: Path) -> nn.Module:
    """The model of a folder that `Model.save` or transformers wrote, in evaluation mode, on the CPU.

    Raises:
        RecallError: there is no such model.
    """
    config: Any = {}
    try:
        config = json.loads((folder / "config.json").read_text())
        if isinstance(config, dict) and config.get("format") == "reformer-kernels":
            classes: dict[str, Any] = {"Reformer": Reformer, "ReformerLM": ReformerLM}
            if config.get("class") not in classes:
                raise RecallError(
                    f"{folder} holds a {config.get('class')}; recall reads {', '.join(classes)} "
                    "and models of transformers"
                )
            model: nn.Module = classes[config["class"]].load(folder)
        else:
            model = hf.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise error if isinstance(error, RecallError) else RecallError(f"{folder}: {error}") from error
    return model.eval()


def model_heads(model: nn.Module, text: Tensor) -> list[Heads]:
    """The query-keys of every LSH layer of a model that reads `text`, uint8 bytes (L,).

    Raises:
        RecallError: the model has no LSH layer, or does not read bytes or so long a text.
    """
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, LSHSelfAttention)
    ]
    if not layers:
        raise RecallError("the model has no LSH layer")
    captured: dict[str, Tensor] = {}

    def capture(name: str, layer: LSHSelfAttention, projected: Tensor) -> None:
        batch, length, _ = projected.shape
        qk = projected.view(batch, length, layer.num_heads, layer.head_dim).transpose(1, 2)
        captured[name] = (qk if layer.rotary is None else layer.rotary(qk, None)).float()

    hooks = [
        layer.query_key.register_forward_hook(
            lambda module, inputs, output, name=name, layer=layer: capture(name, layer, output)
        )
        for name, layer in layers
    ]
    try:
        with torch.no_grad():
            model(_tokens(model, text)[None])
    except (IndexError, RuntimeError, ValueError) as error:
        raise RecallError(f"the model does not read {len(text)} bytes of text: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return [Heads(name, qk=captured[name], rule=layer.config) for name, layer in layers if name in captured]


def _tokens(model: nn.Module, text: Tensor) -> Tensor:
    """The text as a byte-level model reads it."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    size = max((embedding.num_embeddings for embedding in embeddings), default=BYTES)
    if size < BYTES:
        raise ValueError(f"its vocabulary has {size} tokens, fewer than the {BYTES} bytes")
    return text.long() + (size - BYTES if size == BYTES_AND_TWO else 0)


def measure(heads: Heads, windows: Sequence[int], hashes: Sequence[int], causal: bool) -> Iterator[Row]:
    """One row for each window and number of hash rounds, all against the same full attention."""
    full = shared_full = None
    rule = heads.rule or LSHConfig.paper()
    if heads.q is not None and heads.k is not None:
        full = _full_lse(heads.q, heads.k, heads.q.shape[-1] ** -0.5, causal)
    if heads.qk is not None:
        keys, scale = _keys(heads.qk, rule)
        shared_full = _full_lse(heads.qk, keys, scale, causal, no_self=True)
    for w in windows:
        for n_hashes in hashes:
            cursor = across = equal_rank = shared = None
            # Only `bucket_window` is set, so that short keys are hashed as long ones are.
            config = LSHConfig(window="bucket", bucket_window=w, n_hashes=n_hashes, causal=causal)
            if heads.q is not None and heads.k is not None and full is not None:
                layout = functional.lsh_cross_layout(heads.q, heads.k, config, seed=SEED)
                cursor = _cursor_recall(heads.q, heads.k, config, layout, full)
                unmasked = dataclasses.replace(config, window="chunks", attend_across_buckets=True)
                if not unmasked.sees_all_keys(heads.k.shape[2]):  # else this layout is not the one it takes
                    across = _cursor_recall(heads.q, heads.k, unmasked, layout, full)
                equal_rank = _equal_rank_recall(heads.q, heads.k, config, layout, full)
            if heads.qk is not None and shared_full is not None:
                shared = _shared_recall(heads.qk, _with_window(rule, w, n_hashes, causal), shared_full)
            yield Row(heads.name, causal, w, n_hashes, cursor, across, equal_rank, shared)


def _with_window(rule: LSHConfig, window: int, n_hashes: int, causal: bool) -> LSHConfig:
    """The rule with chunks (or bucket windows) of which a query sees `window` keys in a round."""
    chunks = 1 + rule.chunks_before + rule.chunks_after
    chunk_length = max(1, window // chunks)
    bucket_window = window if rule.window == "bucket" else None
    return dataclasses.replace(
        rule,
        chunk_length=chunk_length,
        bucket_window=bucket_window,
        bucket_factors=None,
        n_hashes=n_hashes,
        causal=causal,
        # A key that several rounds find is caught once.
        correct_duplicates=True,
    )


def _keys(qk: Tensor, rule: LSHConfig) -> tuple[Tensor, float]:
    """The keys of shared query-keys by the rule's normalisation, and the scale of the logits."""
    head_dim = qk.shape[-1]
    scale = rule.scale
    if scale is None:
        scale = 1.0 if rule.key_norm == "rms" else head_dim**-0.5
    if rule.key_norm == "rms":
        return qk * (qk.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * head_dim**-0.5, scale
    if rule.key_norm == "l2":
        return torch.nn.functional.normalize(qk, dim=-1, eps=1e-12), scale
    return qk, scale


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Ranges of queries whose logits fit `BLOCK_PAIRS`."""
    size = max(1, BLOCK_PAIRS // (k.shape[0] * k.shape[1] * k.shape[2]))
    for first in range(0, q.shape[2], size):
        yield slice(first, min(first + size, q.shape[2]))


def _masked_logits(q: Tensor, k: Tensor, rows: slice, scale: float, causal: bool, no_self: bool) -> Tensor:
    logits = scale * (q[:, :, rows] @ k.mT)
    i, j = torch.arange(rows.start, rows.stop)[:, None], torch.arange(k.shape[2])
    hidden = (j > i) & causal | (j == i) & no_self
    return logits.masked_fill(hidden, -math.inf)


def _full_lse(q: Tensor, k: Tensor, scale: float, causal: bool, *, no_self: bool = False) -> Tensor:
    """The log-sum-exp of full attention's logits, (B, H, L_q)."""
    parts = [_masked_logits(q, k, rows, scale, causal, no_self).logsumexp(-1) for rows in _blocks(q, k)]
    return torch.cat(parts, dim=2)


def _share(lse: Tensor, full: Tensor) -> float:
    """The mean of exp(lse - full), (B, H, L_q): the probability that the union of a query's keys caught.

    Queries to which full attention shows no key are left out.
    """
    return float((lse - full)[full.isfinite()].double().exp().mean())


def _cursor_recall(
    q: Tensor, k: Tensor, config: LSHConfig, layout: tuple[Layout, Layout], full: Tensor
) -> float:
    v = k.new_zeros((*k.shape[:3], 1))
    _, lse = functional.lsh_cross_attention(q, k, v, config, layout=layout, return_lse=True)
    return _share(lse, full)


def _equal_rank_recall(
    q: Tensor, k: Tensor, config: LSHConfig, layout: tuple[Layout, Layout], full: Tensor
) -> float:
    """Recall of chunks of w / 2 sorted keys: a query sees the chunk of its own rank and the one before."""
    chunk = max(1, config.window_size // 2)
    L_q, L_k = q.shape[2], k.shape[2]
    rank_q, rank_k = (one.order.long().argsort(dim=-1) for one in layout)
    query_chunk, key_chunk = rank_q * L_k // L_q // chunk, rank_k // chunk
    total, count = 0.0, 0
    for rows in _blocks(q, k):
        seen = torch.zeros((*q.shape[:2], rows.stop - rows.start, L_k), dtype=torch.bool)
        for r in range(config.n_hashes):
            distance = query_chunk[:, :, r, rows, None] - key_chunk[:, :, r, None, :]
            seen |= (distance == 0) | (distance == 1)
        logits = _masked_logits(q, k, rows, q.shape[-1] ** -0.5, config.causal, False)
        mass = (logits - full[:, :, rows, None]).exp()
        total += float((mass * seen).double().sum())
        count += seen[..., 0].numel()
    return total / count


def _shared_recall(qk: Tensor, config: LSHConfig, full: Tensor) -> float:
    v = qk.new_zeros((*qk.shape[:3], 1))
    _, lse = functional.lsh_attention(qk, v, config, seed=SEED, return_lse=True)
    return _share(lse, full)
