"""Do our results equal a peer's? Asked on the benchmark's own tensors before any time is quoted.

Two hashes of one row may differ where two directions nearly tie, and a row in another bucket moves every
chunk boundary after it. So attention is compared on the peer's own buckets, and the hashes are compared on
their own: the share of equal ids, with the peer's rotations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reformer_kernels import functional
from reformer_kernels.benchmarks.peers import PEERS, HuggingFace, Lucidrains, own_generator
from reformer_kernels.benchmarks.problem import Problem
from reformer_kernels.benchmarks.workloads import SEED, flat, make_inputs
from reformer_kernels.layout import Layout

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
"""Of the largest difference, relative to the largest output, by dtype. In float32 and below the peers
themselves are the less exact side."""

SAME_BUCKETS = {"float64": 0.999999, "float32": 0.9995, "bfloat16": 0.95, "float16": 0.98}
"""Share of bucket ids that must be equal: the peers draw rotations and multiply in the inputs' dtype."""

SEES_ONLY_ITSELF = -1e4
"""Rows of a log-sum-exp below this see no other key. There the peers add -1e5 in the inputs' dtype, which
costs float32 0.2-0.35 %; ours is exact. They are left out."""


CROSS_LENGTH = 512
"""Tokens at which attention over separate keys is compared with full attention."""


@dataclass(frozen=True)
class Agreement:
    """The outcome of one comparison."""

    peer: str
    quantity: str
    value: float
    limit: float
    ok: bool
    problem: Problem | None = None

    def __str__(self) -> str:
        sign = "<=" if self.quantity != "equal bucket ids" else ">="
        verdict = "agrees" if self.ok else "DISAGREES"
        place = f" (L = {self.problem.length}, {self.problem.n_hashes} rounds)" if self.problem else ""
        figures = f"{self.quantity} {self.value:.4g}, must be {sign} {self.limit:.4g}"
        return f"{self.peer}{place}: {verdict}, {figures}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def layout_of(buckets: Tensor, n_buckets: int, backend: str = "auto") -> Layout:
    """The layout of bucket ids (B, H, R, L) in [0, n_buckets)."""
    order = functional.bucket_sort(buckets.int().contiguous(), n_buckets + 1, backend=backend)
    counts = torch.zeros(*buckets.shape[:3], n_buckets + 1, dtype=torch.int64, device=buckets.device)
    counts.scatter_add_(-1, buckets.long(), torch.ones_like(buckets, dtype=torch.int64))
    starts = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)).int()
    return Layout(order, starts)


def check(peer: str, operation: str, problem: Problem) -> Iterator[Agreement]:
    """Compare with one Reformer peer what `operation` computes.

    Raises:
        PeerRefusesError: the peer cannot take this problem.
    """
    qk, v = make_inputs(problem)
    title = PEERS[peer].title
    other: HuggingFace | Lucidrains
    with torch.no_grad(), own_generator(SEED):
        if peer == "hf":
            other = HuggingFace(problem)
            torch.manual_seed(SEED)
            theirs, buckets = other.attend(flat(qk), flat(v))
            theirs = other.heads(theirs)
        else:
            other = Lucidrains(problem)
            torch.manual_seed(SEED)
            theirs, buckets = other.attend(qk.flatten(0, 1), v.flatten(0, 1))
            theirs = theirs.view_as(v)
    if buckets is not None:
        buckets = other.without_offsets(buckets)
    if buckets is not None and operation in ("hash", "lsh"):
        yield _check_hash(title, problem, other, qk, buckets)
    if operation in ("attention", "lsh"):
        config = problem.config(PEERS[peer].preset or "trax")
        n_buckets = 1
        for factor in other.factors if buckets is not None else ():
            n_buckets *= factor
        with torch.no_grad():
            layout = (
                layout_of(buckets, n_buckets, problem.backend)
                if buckets is not None
                else functional.lsh_layout(qk, config, seed=SEED, backend=problem.backend)
            )
            ours, lse = functional.attend(qk, v, layout, config, backend=problem.backend, return_lse=True)
        yield _check_outputs(title, problem, ours, theirs, lse)


def _check_hash(title: str, problem: Problem, other: Any, qk: Tensor, buckets: Any) -> Agreement:
    with torch.no_grad(), own_generator(SEED):
        rotations = torch.randn(other.rotations_shape(), device=qk.device, dtype=qk.dtype).float()
        ours = functional.lsh_hash(qk, rotations, other.factors, backend=problem.backend)
    same = float((ours == buckets).double().mean())
    limit = SAME_BUCKETS[problem.dtype]
    return Agreement(title, "equal bucket ids", same, limit, same >= limit)


def _check_outputs(title: str, problem: Problem, ours: Tensor, theirs: Tensor, lse: Tensor) -> Agreement:
    compared = (lse > SEES_ONLY_ITSELF).unsqueeze(-1)
    difference = ((ours.double() - theirs.double()).abs() * compared).max()
    error = float(difference / theirs.double().abs().max())
    limit = TOLERANCE[problem.dtype]
    return Agreement(title, "largest output difference", error, limit, error <= limit)


def check_cross(problem: Problem) -> Agreement:
    """The call with one window over all keys, which is full attention, against torch's, on short tensors."""
    length = min(problem.length, CROSS_LENGTH)
    q, v = make_inputs(dataclasses.replace(problem, length=length))
    config = dataclasses.replace(problem.config("paper"), bucket_window=length)
    with torch.no_grad():
        ours, lse = functional.lsh_cross_attention(q, v, q, config, backend=problem.backend, return_lse=True)
        theirs = torch.nn.functional.scaled_dot_product_attention(q, v, q, is_causal=problem.causal)
    return _check_outputs("torch SDPA", problem, ours, theirs, lse)


def check_sort(problem: Problem, ours: Tensor, theirs: Tensor) -> Agreement:
    """A stable order is unique: every entry must be equal."""
    wrong = float((ours.long() != theirs).double().mean())
    return Agreement("torch.sort(stable)", "unequal places", wrong, 0.0, wrong == 0.0)
