"""The rows of the benchmark's tables: our calls and the peers', on the same random tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reformer_kernels import functional
from reformer_kernels.benchmarks.peers import (
    FULL_ATTENTION,
    FullAttention,
    HuggingFace,
    Lucidrains,
    own_generator,
)
from reformer_kernels.benchmarks.problem import (
    Problem,
    Work,
    attention_work,
    full_attention_work,
    hash_work,
    lsh_work,
    sort_work,
)
from reformer_kernels.benchmarks.timing import Case, Seconds, between, mark

OPERATIONS = ("hash", "sort", "attention", "lsh", "cross")

OURS = {
    "hash": ("lsh_hash",),
    "sort": ("bucket_sort",),
    "attention": ("trax()", "paper()", "window=bucket"),
    "lsh": ("trax()", "paper()", "window=bucket"),
    "cross": ("lsh_cross_attention",),
}
PRESETS = {"trax()": "trax", "paper()": "paper", "window=bucket": "bucket"}

PEER_ROWS = {
    "hash": {"hf": "Hugging Face", "lucidrains": "reformer_pytorch"},
    "sort": {"torch": "torch.sort(stable)"},
    "attention": {**FULL_ATTENTION, "hf": "Hugging Face"},
    "lsh": {**FULL_ATTENTION, "hf": "Hugging Face", "lucidrains": "reformer_pytorch"},
    "cross": dict(FULL_ATTENTION),
}
"""Which peers have the operation, by key. reformer_pytorch has no call that takes buckets as given."""

SEED = 0


@dataclass
class Workload:
    """One row's call, made ready: `call(*inputs)` returns the output that gradients start from."""

    name: str
    problem: Problem
    work: Work
    inputs: Sequence[Tensor]
    call: Callable[..., Tensor]
    differentiable: bool = True
    grad_out: Tensor | None = field(default=None, repr=False)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.call(*self.inputs)

    def forward_and_backward(self) -> tuple[Tensor, tuple[Tensor, ...], Seconds]:
        """The output, the inputs' gradients and the seconds that backward took."""
        device = torch.device(self.problem.device)
        leaves = [tensor.detach().requires_grad_() for tensor in self.inputs]
        out = self.call(*leaves)
        if self.grad_out is None:
            self.grad_out = torch.randn(out.shape, device=device).to(out.dtype)
        start = mark(device)
        gradients = torch.autograd.grad(out, leaves, self.grad_out)
        return out.detach(), gradients, between(start, mark(device))

    def cases(self, backward: bool) -> list[Case]:
        """Cases for the timing harness: the forward pass without autograd, then both passes."""
        device = torch.device(self.problem.device)

        def run_forward() -> dict[str, Seconds]:
            start = mark(device)
            self.forward()
            return {"forward": between(start, mark(device))}

        def run_both() -> dict[str, Seconds]:
            start = mark(device)
            backward_seconds = self.forward_and_backward()[2]
            return {"forward+backward": between(start, mark(device)), "backward": backward_seconds}

        cases = [Case(run_forward)]
        if backward and self.differentiable:
            cases.append(Case(run_both, warmed_by=cases[0]))
        return cases


def random_rows(problem: Problem, generator: torch.Generator) -> Tensor:
    """Normal (B, H, L, D), drawn on the CPU so that every device gets the same."""
    shape = (problem.batch, problem.heads, problem.length, problem.head_dim)
    return torch.randn(shape, generator=generator).to(problem.device, problem.torch_dtype)


def flat(rows: Tensor) -> Tensor:
    """(B, H, L, D) as a projection writes it, (B, L, H * D)."""
    return rows.transpose(1, 2).flatten(2).contiguous()


def make_inputs(problem: Problem) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return random_rows(problem, generator), random_rows(problem, generator)


def build(operation: str, name: str, problem: Problem) -> Workload:
    """The row called `name` of an operation's table.

    Raises:
        PeerRefusesError: the peer cannot take this problem.
        KeyError: no such row.
    """
    return _BUILDERS[operation](name, problem)


def _build_lsh(name: str, problem: Problem) -> Workload:
    qk, v = make_inputs(problem)
    if name in PRESETS:
        config = problem.config(PRESETS[name])

        def ours(qk: Tensor, v: Tensor) -> Tensor:
            return functional.lsh_attention(qk, v, config, seed=SEED, backend=problem.backend)

        return Workload(name, problem, lsh_work(problem, config), (qk, v), ours)
    if name in FULL_ATTENTION.values():
        return _full_attention(name, problem, qk, v)
    if name == "Hugging Face":
        hugging_face = HuggingFace(problem)
        work = lsh_work(problem, problem.config("trax"))
        return Workload(name, problem, work, (flat(qk), flat(v)), lambda qk, v: hugging_face.attend(qk, v)[0])
    if name == "reformer_pytorch":
        lucidrains = Lucidrains(problem)
        work = lsh_work(problem, problem.config("lucidrains"))
        inputs = (qk.flatten(0, 1), v.flatten(0, 1))
        return Workload(name, problem, work, inputs, lambda qk, v: lucidrains.attend(qk, v)[0])
    raise KeyError(name)


def _build_cross(name: str, problem: Problem) -> Workload:
    q, v = make_inputs(problem)
    if name in FULL_ATTENTION.values():
        return _full_attention(name, problem, q, v)
    if name != "lsh_cross_attention":
        raise KeyError(name)
    k = random_rows(problem, torch.Generator().manual_seed(SEED + 1))
    config = problem.config("paper")

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.lsh_cross_attention(q, k, v, config, seed=SEED, backend=problem.backend)

    work = attention_work(problem, problem.config("bucket"))
    return Workload(name, problem, dataclasses.replace(work, forward_bytes=None), (q, k, v), ours)


def _full_attention(name: str, problem: Problem, q: Tensor, v: Tensor) -> Workload:
    k = random_rows(problem, torch.Generator().manual_seed(SEED + 1))
    work = full_attention_work(problem)
    return Workload(name, problem, work, (q, k, v), FullAttention(name, problem).attend)


def _build_attention(name: str, problem: Problem) -> Workload:
    qk, v = make_inputs(problem)
    if name in PRESETS:
        config = problem.config(PRESETS[name])
        layout = functional.lsh_layout(qk, config, seed=SEED, backend=problem.backend)

        def ours(qk: Tensor, v: Tensor) -> Tensor:
            return functional.attend(qk, v, layout, config, backend=problem.backend)

        return Workload(name, problem, attention_work(problem, config), (qk, v), ours)
    if name in FULL_ATTENTION.values():
        return _full_attention(name, problem, qk, v)
    if name == "Hugging Face":
        hugging_face = HuggingFace(problem)
        flat_qk, flat_v = flat(qk), flat(v)
        with torch.no_grad(), own_generator(SEED):
            buckets = hugging_face.attend(flat_qk, flat_v)[1]
        work = attention_work(problem, problem.config("trax"))
        return Workload(
            name, problem, work, (flat_qk, flat_v), lambda qk, v: hugging_face.attend(qk, v, buckets)[0]
        )
    raise KeyError(name)


def _build_hash(name: str, problem: Problem) -> Workload:
    qk, _ = make_inputs(problem)
    options: dict[str, Any] = {"differentiable": False}
    if name == "lsh_hash":
        rotations = _rotations(problem, sum(problem.factors) // 2)

        def ours(qk: Tensor) -> Tensor:
            return functional.lsh_hash(qk, rotations, problem.factors, backend=problem.backend)

        return Workload(name, problem, hash_work(problem), (qk,), ours, **options)
    if name == "Hugging Face":
        return Workload(name, problem, hash_work(problem), (flat(qk),), HuggingFace(problem).hash, **options)
    if name == "reformer_pytorch":
        return Workload(
            name, problem, hash_work(problem), (qk.flatten(0, 1),), Lucidrains(problem).hash, **options
        )
    raise KeyError(name)


def _rotations(problem: Problem, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    shape = (problem.heads, problem.head_dim, problem.n_hashes, width)
    return torch.randn(shape, generator=generator).to(problem.device)


def _build_sort(name: str, problem: Problem) -> Workload:
    qk, _ = make_inputs(problem)
    rotations = _rotations(problem, sum(problem.factors) // 2)
    buckets = functional.lsh_hash(qk, rotations, problem.factors, backend=problem.backend)
    n_buckets = 1
    for factor in problem.factors:
        n_buckets *= factor

    def ours(buckets: Tensor) -> Tensor:
        return functional.bucket_sort(buckets, n_buckets, backend=problem.backend)

    def torch_sort(buckets: Tensor) -> Tensor:
        return torch.sort(buckets, dim=-1, stable=True).indices

    calls = {"bucket_sort": ours, "torch.sort(stable)": torch_sort}
    return Workload(name, problem, sort_work(problem), (buckets,), calls[name], differentiable=False)


_BUILDERS: dict[str, Callable[[str, Problem], Workload]] = {
    "hash": _build_hash,
    "sort": _build_sort,
    "attention": _build_attention,
    "lsh": _build_lsh,
    "cross": _build_cross,
}
