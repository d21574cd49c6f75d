"""Fuzzed calls of attention: the public functions, and the operators with rules that no configuration gives.

Each result is compared with the reference in float64 on the same layout, and, where the pairs are few, with
`oracle`, which shares no code with it: outputs, log-sum-exps and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bench.fuzz import oracle
from bench.fuzz.problems import SMALL, Band, Function, Operator, Problem
from bench.fuzz.values import DTYPES, error, gradients, magnitude
from reformer_kernels import Layout, LSHConfig
from reformer_kernels import functional as F
from reformer_kernels.call import cross_attention_call, cross_attention_rule, self_attention_call
from reformer_kernels.config import KEY_NORMS
from reformer_kernels.ops.attention import reference
from reformer_kernels.ops.attention.op import Arguments
from reformer_kernels.ops.sort.reference import bucket_sort
from reformer_kernels.rule import AttentionRule, widest_range
from reformer_kernels.testing import TOLERANCE, isa, torch_threads

ORACLE_PAIRS = 6000
"""Pairs up to which a case also goes through the oracle."""

Results = tuple[Tensor, Tensor]
Attend = Callable[[Sequence[Tensor]], Results]


def check_function(case: Function) -> None:
    own_keys = case.own_keys or case.function in ("lsh_cross_attention", "local_attention")
    leaves = case.inputs(own_keys)
    q, _, *rest = leaves
    k = rest[0] if rest else None
    mask, config = case.key_padding_mask(), case.config
    with _machine(case):
        layouts = _layouts(case, q, k, mask)
        actual = _run(case, lambda x: _call(case, x, layouts, case.backend), leaves)
        if case.given != "layout":
            with torch.no_grad():
                again = _call(case, leaves, layouts, case.backend, given="layout")
            for one, other in zip(actual[0], again, strict=True):
                assert torch.equal(one.nan_to_num(), other.nan_to_num()), (
                    "another result with the layout given"
                )
    if case.function == "lsh_cross_attention":
        assert k is not None
        call = cross_attention_call(config, q, k)
    else:
        call = self_attention_call(config, q, shared_qk=k is None)
    exact = _run(case, lambda x: _call(case, x, layouts, "reference"), _doubled(leaves))
    places = [x for layout in layouts for x in (layout.order, layout.bucket_starts)]
    _compare(
        case, actual, exact, call.rule, call.scale, lambda x: _call(case, x, layouts, "reference"), leaves
    )
    _check_oracle(case, exact, _doubled(leaves), places, call.rule, call.scale)


def check_band(case: Band) -> None:
    leaves = case.inputs(own_keys=True)

    def call(x: Sequence[Tensor], backend: str) -> Results:
        q, v, k = x
        out = F.sliding_window_attention(
            q, k, v, case.window, causal=case.causal, scale=case.scale, dropout_p=case.dropout_p,
            key_padding_mask=case.key_padding_mask(), seed=case.seed, backend=backend,
        )  # fmt: skip
        return out, torch.zeros(out.shape[:3])

    def dense(x: Sequence[Tensor]) -> Results:
        q, v, k = x
        i, j, padding, bias = torch.arange(case.L)[:, None], torch.arange(case.L), case.padding(), case.bias()
        unseen = ((i - j).abs() >= case.window) | (case.causal & (j > i))
        unseen = unseen.expand(case.B, 1, case.L, case.L)
        if padding is not None:
            unseen = unseen | padding[:, None, None]
            q, k, v = (t.masked_fill(padding[:, None, :, None], 0) for t in (q, k, v))
        logits = case.scale * q @ k.mT + (0 if bias is None else bias[:, None, None].double())
        nothing = unseen.all(-1, keepdim=True)
        weights = logits.masked_fill(unseen & ~nothing, -torch.inf).softmax(-1).masked_fill(nothing, 0)
        return weights @ v, torch.zeros(q.shape[:3])

    with _machine(case):
        actual = _run(case, lambda x: call(x, case.backend), leaves)
    exact = _run(case, lambda x: call(x, "reference"), _doubled(leaves))
    rule = cross_attention_rule(LSHConfig(), case.L)  # which has keys of their own, as here
    _compare(case, actual, exact, rule, case.scale, lambda x: call(x, "reference"), leaves)
    if case.dropout_p == 0:
        found = _errors(case, _run(case, dense, _doubled(leaves)), exact, rule, case.scale)
        assert max(found.values()) <= 1e-9, f"the reference is not a softmax over the band: {found}"


def check_operator(case: Operator) -> None:
    leaves = case.inputs(case.own_keys or case.key_length is not None)
    places = [*_random_layout(case, case.L, case.seed)]
    if case.key_length is not None:
        places += _random_layout(case, case.key_length, case.seed + 50)
    seed = torch.tensor(_signed(case.seed)) if case.dropout_p > 0 else None

    def arguments(x: Sequence[Tensor]) -> Arguments:
        bias = case.key_bias()
        bias = bias.double() if bias is not None and x[0].dtype == torch.float64 else bias
        q, v, *k = x
        return Arguments(
            q, k[0] if k else None, v, *places[:2], bias, seed, case.rule, case.scale, case.dropout_p,
            *places[2:],
        )  # fmt: skip

    def expected(x: Sequence[Tensor]) -> Results:
        return reference.attention(arguments(x))

    operator = getattr(torch.ops.reformer_kernels, case.operator)
    with _machine(case):
        actual = _run(case, lambda x: operator(*arguments(x)), leaves)
    exact = _run(case, expected, _doubled(leaves))
    _compare(case, actual, exact, case.rule, case.scale, expected, leaves)
    _check_oracle(case, exact, _doubled(leaves), places, case.rule, case.scale)


@contextmanager
def _machine(case: Problem) -> Iterator[None]:
    with torch_threads(case.threads), isa(case.isa) if case.backend == "native" else nullcontext():
        yield


def _doubled(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in leaves]


def _signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def _layouts(case: Function, q: Tensor, k: Tensor | None, mask: Tensor | None) -> list[Layout]:
    """The layouts by the case's own back end, as two of them need not agree on near-ties."""
    options: dict[str, Any] = {"seed": case.seed, "backend": case.backend, "key_padding_mask": mask}
    q = q.detach()
    if case.function == "lsh_cross_attention":
        assert k is not None
        return list(F.lsh_cross_layout(q, k.detach(), case.config, **options))
    if case.function == "local_attention":
        order = torch.arange(case.L, dtype=torch.int32).expand(case.B, case.H, 1, case.L)
        ends = torch.tensor([0, case.L], dtype=torch.int32).expand(case.B, case.H, 1, 2)
        return [Layout(order, ends)]
    return [F.lsh_layout(q, case.config, **options)]


def _random_layout(case: Operator, length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed % 2**31)
    ids = torch.rand((case.B, case.H, case.R, length), generator=generator) ** 2 * case.n_buckets
    return bucket_sort(ids.int(), case.n_buckets + 1, case.n_buckets + 2)


def _call(
    case: Function, x: Sequence[Tensor], layouts: list[Layout], backend: str, given: str | None = None
) -> Results:
    q, v, *rest = x
    config, given = case.config, given or ("layout" if backend != case.backend else case.given)
    given = "layout" if q.dtype != DTYPES[case.dtype] else given
    options: dict[str, Any] = {
        "key_padding_mask": case.key_padding_mask(),
        "dropout_p": case.dropout_p,
        "seed": case.seed,
        "backend": backend,
        "return_lse": True,
    }
    if case.function == "local_attention":
        return F.local_attention(
            q, rest[0], v,
            chunk_length=config.chunk_length, chunks_before=config.chunks_before,
            chunks_after=config.chunks_after, causal=config.causal, ring=config.ring == "rounds",
            scale=config.scale, **options,
        )  # fmt: skip
    if case.function == "attend":
        return F.attend(q, v, layouts[0], config, k=rest[0] if rest else None, **options)
    if given == "rotations":
        options["rotations"] = F.sample_rotations(config, case.H, case.D, case.seed)
    if case.function == "lsh_cross_attention":
        if given == "layout":
            options["layout"] = tuple(layouts)
        return F.lsh_cross_attention(q, rest[0], v, config, **options)
    if given == "layout":
        options["layout"] = layouts[0]
    return F.lsh_attention(q, v, config, **options)


def _run(case: Problem, attend: Attend, leaves: Sequence[Tensor]) -> tuple[Results, list[Tensor]]:
    out, lse = attend(leaves)
    return (out, lse), gradients((out, lse), leaves, case.seed, case.gradient)


def _compare(
    case: Problem,
    actual: tuple[Results, list[Tensor]],
    exact: tuple[Results, list[Tensor]],
    rule: AttentionRule,
    scale: float,
    expected: Attend,
    leaves: Sequence[Tensor],
) -> None:
    """Within the tolerance of the dtype, or within four times what the reference loses at that dtype.

    Probabilities are exponentials of differences of logits in float32, and backward's of a logit and the
    log-sum-exp, so their relative error is that of the largest logit.
    """
    found = _errors(case, actual, exact, rule, scale)
    lse = _defined(case, exact[0][1]).detach()
    logits = lse[lse.isfinite() & (lse != reference.EMPTY_LSE)].abs()
    limit = TOLERANCE[DTYPES[case.dtype]] + (4 * 2.0**-24 * float(logits.max()) if logits.numel() else 0.0)
    if not max(found.values()) <= limit:
        with torch_threads(case.threads):
            plain = _run(case, expected, [x.detach().requires_grad_() for x in leaves])
        allowed = _errors(case, plain, exact, rule, scale)
        worse = {n: (e, allowed[n]) for n, e in found.items() if not e <= max(limit, 4 * allowed[n])}
        assert not worse, f"error, and the reference's at {case.dtype}: {worse}"


def _check_oracle(
    case: Problem,
    exact: tuple[Results, list[Tensor]],
    leaves: Sequence[Tensor],
    places: Sequence[Tensor],
    rule: AttentionRule,
    scale: float,
) -> None:
    rounds = places[0].shape[2]
    pairs = case.B * case.H * case.L * rounds * min(widest_range(rule, case.keys), case.keys * rounds)
    if pairs > ORACLE_PAIRS:
        return

    def independent(x: Sequence[Tensor]) -> Results:
        q, v, *k = x
        return oracle.attention(
            q, k[0] if k else None, v, *places[:2], case.padding(), _signed(case.seed), rule, scale,
            case.dropout_p, *places[2:], *([None, None] * (len(places) == 2)), case.bias(),
        )  # fmt: skip

    found = _errors(case, _run(case, independent, leaves), exact, rule, scale)
    assert max(found.values()) <= 1e-9, f"the reference is not what the oracle says: {found}"


def _errors(
    case: Problem,
    actual: tuple[Results, list[Tensor]],
    exact: tuple[Results, list[Tensor]],
    rule: AttentionRule,
    scale: float,
) -> dict[str, float]:
    """A gradient that is nil by rights has the rounding of the terms that cancel, whose size is the floor.

    One that is beyond the dtype counts as the dtype's largest number.
    """
    dtype = DTYPES[case.dtype]
    size = magnitude(case.values, dtype)
    # Backward reads out as it was stored, so that in 16 bits even terms that cancel are off by its rounding;
    # where large logits make each query see one key, all the queries' terms are of that kind.
    queries = case.L**0.5 if case.values == "large" else 1.0
    share = queries if dtype.itemsize == 2 else 0.1
    terms = share * case.Dv**0.5 * max(1.0, abs(scale)) / (1 - case.dropout_p)
    names = ["out", "lse", "grad q", "grad v", "grad k"]
    # A zero query-key's gradient is multiplied by what its norm divides by.
    norm = KEY_NORMS[rule.key_norm] if len(actual[1]) == 2 and case.values in SMALL else "none"
    stretch = {"none": 1.0, "rms": 1e3, "l2": 1e12}[norm]
    floors = [0.1 * size, 1.0, terms * size**2 * stretch, terms, terms * size**2]
    most = torch.finfo(dtype).max
    results = [[*found[0], *(x.clamp(-most, most) for x in found[1])] for found in (actual, exact)]
    pairs = zip(*results, strict=True)
    return {
        name: error(_defined(case, a), _defined(case, e), floor)
        for name, floor, (a, e) in zip(names, floors, pairs, strict=False)
    }


def _defined(case: Problem, x: Tensor) -> Tensor:
    """The heads that have a defined result."""
    return x.flatten(0, 1)[1:] if case.values == "head" else x
