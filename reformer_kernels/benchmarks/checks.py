"""Do our results equal those of what they are compared with? Checked on a benchmark's own tensors.

Two hashes of one vector may differ where two directions nearly tie, and a vector in another bucket moves
every chunk boundary after it. So attention is compared on the peer's own buckets, and the hashes are compared
separately: the share of equal ids, with the peer's rotations.

Each `check_*` function takes the calls of one table by name and yields the outcomes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reformer_kernels import functional
from reformer_kernels.benchmarks.calls import SEED, Call, seeded
from reformer_kernels.benchmarks.kernels import make_inputs, merge_heads
from reformer_kernels.benchmarks.peers import PEERS, HuggingFace, Lucidrains, Peer, own_generator
from reformer_kernels.benchmarks.sizes import Sizes
from reformer_kernels.layout import Layout
from reformer_kernels.testing import TOLERANCE, relative_error

SAME_BUCKETS = {"float64": 0.999999, "float32": 0.9995, "bfloat16": 0.95, "float16": 0.98}
"""The share of bucket ids that must be equal: the peers draw rotations and multiply in the inputs' dtype."""

SEES_ONLY_ITSELF = -1e4
"""A query whose log-sum-exp is below this sees no other key. There the peers add -1e5 to the logit in the
inputs' dtype, which costs float32 0.2-0.35 %; ours is exact. Such queries are left out."""

CROSS_LENGTH = 512
"""Tokens at which attention over separate keys is compared with full attention."""

Calls = Mapping[str, Call]


@dataclass(frozen=True)
class Agreement:
    """The outcome of one comparison with `peer`: `value` must not be beyond `limit`."""

    peer: str
    quantity: str
    value: float
    limit: float
    at_least: bool = False
    """Whether the limit is the least that is accepted; else it is the most."""
    sizes: Sizes | None = None

    @property
    def ok(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        verdict = "agrees" if self.ok else "DISAGREES"
        sign = ">=" if self.at_least else "<="
        return f"{verdict}, {self.quantity} {self.value:.4g}, must be {sign} {self.limit:.4g}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ok": self.ok}


def check_hash(sizes: Sizes, calls: Calls) -> Iterator[Agreement]:
    """Bucket ids against each Reformer peer's."""
    for peer in _reformer_peers(calls):
        other, _, buckets = _run_peer(peer, sizes)
        if buckets is not None:
            yield _compare_hashes(peer.title, sizes, other, buckets)


def check_lsh(sizes: Sizes, calls: Calls) -> Iterator[Agreement]:
    """Bucket ids, and attention on the peer's own buckets, against each Reformer peer's."""
    for peer in _reformer_peers(calls):
        other, theirs, buckets = _run_peer(peer, sizes)
        if buckets is not None:
            yield _compare_hashes(peer.title, sizes, other, buckets)
        yield _compare_attention(peer, sizes, other, theirs, buckets)


def check_attention(sizes: Sizes, calls: Calls) -> Iterator[Agreement]:
    """Attention on the peer's own buckets against each Reformer peer's."""
    for peer in _reformer_peers(calls):
        yield _compare_attention(peer, sizes, *_run_peer(peer, sizes))


def check_cross(sizes: Sizes, calls: Calls) -> Iterator[Agreement]:
    """One window over all keys makes the call full attention; compared with torch's on short tensors."""
    length = min(sizes.length, CROSS_LENGTH)
    q, v = make_inputs(dataclasses.replace(sizes, length=length))
    config = dataclasses.replace(sizes.config("paper"), bucket_window=length)
    with torch.no_grad():
        ours, lse = functional.lsh_cross_attention(q, v, q, config, backend=sizes.backend, return_lse=True)
        theirs = torch.nn.functional.scaled_dot_product_attention(q, v, q, is_causal=sizes.causal)
    yield compare_outputs("torch SDPA", sizes, ours, theirs, lse)


def check_sort(sizes: Sizes, calls: Calls) -> Iterator[Agreement]:
    """A stable order is unique, so every entry must be equal."""
    ours, theirs = (calls[name].forward()[0] for name in ("bucket_sort", "torch.sort(stable)"))
    yield Agreement(
        "torch.sort(stable)", "unequal entries", float((ours.long() != theirs).double().mean()), 0
    )


def check_same_outputs(sizes: Sizes, calls: Calls) -> Iterator[Agreement]:
    """Every call of the table computes the same as the one named "plain"."""
    with seeded():
        expected = calls["plain"].forward()[0]
    for name, call in calls.items():
        if name != "plain":
            with seeded():
                error = relative_error(call.forward()[0], expected)
            yield Agreement(f"plain and {name}", "largest output difference", error, _tolerance(sizes))


def compare_outputs(title: str, sizes: Sizes, ours: Tensor, theirs: Tensor, lse: Tensor) -> Agreement:
    """Outputs (B, H, L, D), without queries that see only themselves, by their log-sum-exp (B, H, L)."""
    compared = (lse > SEES_ONLY_ITSELF).unsqueeze(-1)
    difference = ((ours.double() - theirs.double()).abs() * compared).max()
    error = float(difference / theirs.double().abs().max())
    return Agreement(title, "largest output difference", error, _tolerance(sizes))


def _tolerance(sizes: Sizes) -> float:
    # The peers are the less exact side, and their float16 is the least exact.
    return 1e-2 if sizes.dtype == "float16" else TOLERANCE[sizes.torch_dtype]


def _reformer_peers(calls: Calls) -> Iterator[Peer]:
    for peer in PEERS.values():
        if peer.preset is not None and peer.title in calls:
            yield peer


def _run_peer(peer: Peer, sizes: Sizes) -> tuple[HuggingFace | Lucidrains, Tensor, Tensor | None]:
    """The peer, its output (B, H, L, D), and its buckets (B, H, R, L), None where it did not hash."""
    qk, v = make_inputs(sizes)
    other: HuggingFace | Lucidrains
    with torch.no_grad(), own_generator(SEED):
        if peer.key == "hf":
            other = HuggingFace(sizes)
            torch.manual_seed(SEED)
            theirs, buckets = other.attend(merge_heads(qk), merge_heads(v))
            theirs = other.heads(theirs)
        else:
            other = Lucidrains(sizes)
            torch.manual_seed(SEED)
            theirs, buckets = other.attend(qk.flatten(0, 1), v.flatten(0, 1))
            theirs = theirs.view_as(v)
    return other, theirs, None if buckets is None else other.without_offsets(buckets)


def _compare_hashes(title: str, sizes: Sizes, other: HuggingFace | Lucidrains, buckets: Tensor) -> Agreement:
    qk, _ = make_inputs(sizes)
    with torch.no_grad(), own_generator(SEED):
        rotations = torch.randn(other.rotations_shape(), device=qk.device, dtype=qk.dtype).float()
        ours = functional.lsh_hash(qk, rotations, other.factors, backend=sizes.backend)
    same = float((ours == buckets).double().mean())
    return Agreement(title, "equal bucket ids", same, SAME_BUCKETS[sizes.dtype], at_least=True)


def _compare_attention(
    peer: Peer, sizes: Sizes, other: HuggingFace | Lucidrains, theirs: Tensor, buckets: Tensor | None
) -> Agreement:
    qk, v = make_inputs(sizes)
    config = sizes.config(peer.preset or "trax")
    with torch.no_grad():
        layout = (
            functional.lsh_layout(qk, config, seed=SEED, backend=sizes.backend)
            if buckets is None
            else _layout_of(buckets, math.prod(other.factors), sizes.backend)
        )
        ours, lse = functional.attend(qk, v, layout, config, backend=sizes.backend, return_lse=True)
    return compare_outputs(peer.title, sizes, ours, theirs, lse)


def _layout_of(buckets: Tensor, n_buckets: int, backend: str) -> Layout:
    """The layout of bucket ids (B, H, R, L) in [0, n_buckets)."""
    order = functional.bucket_sort(buckets.int().contiguous(), n_buckets + 1, backend=backend)
    counts = torch.zeros(*buckets.shape[:3], n_buckets + 1, dtype=torch.int64, device=buckets.device)
    counts.scatter_add_(-1, buckets.long(), torch.ones_like(buckets, dtype=torch.int64))
    starts = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).int()
    return Layout(order, starts)
