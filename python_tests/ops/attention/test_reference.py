"""The reference against scalar loops, gradcheck, and the properties that make it LSH attention."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.fuzz import oracle
from python_tests.helpers import (
    assert_close,
    gradients,
    layout_from_buckets,
    padding_mask,
    qkv,
    random_layout,
    reference_attention,
)
from reformer_kernels import Layout, LSHConfig
from reformer_kernels import functional as F
from reformer_kernels.call import self_attention_rule
from reformer_kernels.ops.attention import reference
from reformer_kernels.rule import AttentionRule, normalise_keys
from reformer_kernels.testing import normal, relative_error


def bias_of(padding: Tensor | None) -> Tensor | None:
    return None if padding is None else torch.zeros(padding.shape).masked_fill(padding, -math.inf)


@st.composite
def rules(draw: st.DrawFn) -> AttentionRule:
    by_bucket = draw(st.booleans())
    return AttentionRule(
        rank_window=by_bucket,
        chunk_length=draw(st.integers(1, 6)),
        chunks_before=draw(st.integers(0, 3)),
        chunks_after=draw(st.integers(0, 2)),
        window_before=draw(st.integers(0, 5)),
        window_after=draw(st.integers(0, 4)),
        bucket_mask=by_bucket or draw(st.booleans()),
        causal=draw(st.booleans()),
        exclude_self=draw(st.booleans()),
        correct_duplicates=draw(st.booleans()),
        ring=not by_bucket and draw(st.booleans()),
        key_norm=draw(st.sampled_from([0, 1, 2])),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    rule=rules(),
    B=st.integers(1, 2),
    H=st.integers(1, 2),
    R=st.integers(1, 3),
    L=st.integers(1, 11),
    D=st.integers(1, 4),
    Dv=st.integers(1, 3),
    n_buckets=st.integers(1, 4),
    separate=st.booleans(),
    padded=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.0, 0.3]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_equals_scalar_loops(
    rule: AttentionRule,
    B: int,
    H: int,
    R: int,
    L: int,
    D: int,
    Dv: int,
    n_buckets: int,
    separate: bool,
    padded: bool,
    dropout_p: float,
    seed: int,
) -> None:
    q, k, v = qkv(B, H, L, D, Dv)
    keys = k if separate else None
    layout = random_layout(B, H, R, L, n_buckets, seed=seed % 1000)
    padding = padding_mask([L // 2, L][:B], L) if padded else None
    args = (layout.order, layout.bucket_starts)
    out, lse = reference_attention(
        q, keys, v, *args, bias_of(padding), torch.tensor(seed), rule, 0.7, dropout_p
    )
    expected = oracle.attention(q, keys, v, *args, padding, seed, rule, 0.7, dropout_p)
    assert_close(out, expected[0], 1e-12)
    assert_close(lse, expected[1], 1e-12)


CONFIGS: dict[str, LSHConfig] = {
    "paper": LSHConfig.paper(chunk_length=4, bucket_factors=(4,), n_hashes=2),
    "paper causal": LSHConfig.paper(chunk_length=4, bucket_factors=(4,), n_hashes=2, causal=True),
    "trax": LSHConfig.trax(chunk_length=4, chunks_after=1, bucket_factors=(4,), n_hashes=2),
    "ring, corrected": LSHConfig.trax(
        chunk_length=4, correct_duplicates=True, bucket_factors=(4,), n_hashes=2
    ),
    "lucidrains": LSHConfig.lucidrains(chunk_length=4, bucket_factors=(4,), n_hashes=2, causal=True),
    "bucket": LSHConfig(window="bucket", bucket_window=3, bucket_factors=(4,), n_hashes=2),
    "bucket causal": LSHConfig(
        window="bucket", bucket_window=3, bucket_factors=(4,), n_hashes=2, causal=True
    ),
    "one chunk": LSHConfig.paper(chunk_length=16, causal=True),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("variant", ["plain", "padded", "dropout", "separate"])
def test_gradcheck(name: str, variant: str) -> None:
    config = CONFIGS[name]
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 10, 3, 2))
    mask = padding_mask([7], 10) if variant == "padded" else None
    layout = F.lsh_layout(q, config, seed=0, key_padding_mask=mask)
    options: dict[str, Any] = {
        "key_padding_mask": mask,
        "seed": 3,
        "dropout_p": 0.4 if variant == "dropout" else 0.0,
    }

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys = k if variant == "separate" else None
        out, lse = F.attend(q, v, layout, config, k=keys, return_lse=True, **options)
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(call, (q, k, v))


def test_rows_that_see_nothing() -> None:
    """Alone in its bucket: v and -1e5 without a gradient through them; padding: 0 and -inf."""
    config = LSHConfig.paper(n_hashes=1, chunk_length=2, chunks_after=1, bucket_factors=(4,))
    layout = layout_from_buckets(torch.tensor([0, 1, 1, 4]).view(1, 1, 1, 4), 4)
    mask = padding_mask([3], 4)
    q, _, v = (x.requires_grad_() for x in qkv(1, 1, 4, 3, 2))
    out, lse = F.attend(q, v, layout, config, key_padding_mask=mask, return_lse=True)
    assert torch.equal(out[0, 0, 0], v[0, 0, 0]) and lse[0, 0, 0] == -1e5
    assert torch.equal(out[0, 0, 1], v[0, 0, 2]) and torch.equal(out[0, 0, 2], v[0, 0, 1])
    assert out[0, 0, 3].abs().max() == 0 and lse[0, 0, 3] == -math.inf
    grad_out, grad_lse = normal(1, 1, 4, 2), torch.tensor([[[5.0, 0, 0, 7.0]]], dtype=torch.float64)
    grad_q, grad_v = torch.autograd.grad((out, lse), (q, v), (grad_out, grad_lse))
    assert grad_q.abs().max() == 0  # rows 1 and 2 see one key each: p = 1 whatever q is
    expected = grad_out[0, 0, [0, 2, 1, 3]].clone()
    expected[3] = 0
    assert torch.equal(grad_v[0, 0], expected)

    out, lse = F.attend(q, v, layout, config, k=q.detach(), key_padding_mask=mask, return_lse=True)
    assert torch.equal(out[0, 0, 0], v[0, 0, 0])  # separate keys: it sees itself


def test_all_padding_is_zero_without_nan() -> None:
    q, _, v = (x.requires_grad_() for x in qkv(2, 1, 9, 3))
    for config in CONFIGS.values():
        mask = torch.ones(2, 9, dtype=torch.bool)
        out, lse = F.lsh_attention(q, v, config, seed=0, key_padding_mask=mask, return_lse=True)
        assert out.abs().max() == 0 and bool((lse == -math.inf).all())
        for grad in torch.autograd.grad(out.sum() + lse.clamp_min(-1).sum(), (q, v)):
            assert grad.abs().max() == 0


def test_hand_computed() -> None:
    """Three tokens of one bucket on a line, no key norm: logits q_i q_j, softmax over the other two."""
    config = LSHConfig(n_hashes=1, chunk_length=3, key_norm="none")
    qk = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).view(1, 1, 3, 1)
    v = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64).view(1, 1, 3, 1)
    out, lse = F.lsh_attention(qk, v, config, return_lse=True)
    e2 = math.exp(2)
    expected = [25.0, (10 + 30 * e2) / (1 + e2), (10 + 20 * e2) / (1 + e2)]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(
        lse.flatten(), torch.tensor([math.log(2), math.log(1 + e2), math.log(1 + e2)], dtype=torch.float64)
    )


def test_key_norms() -> None:
    q = normal(2, 5, 8)
    rms = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() / math.sqrt(8)
    assert_close(normalise_keys(q, 1), rms, 1e-14)
    assert_close(normalise_keys(q, 2), q / q.norm(dim=-1, keepdim=True), 1e-14)
    assert normalise_keys(q, 0) is q
    for norm in (1, 2):
        assert normalise_keys(torch.zeros(3, 4), norm).abs().max() == 0


def full_attention(
    qk: Tensor, v: Tensor, causal: bool, padding: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Shared-QK softmax attention over every pair i != j (j < i if causal); a row with none gives v."""
    L = qk.shape[2]
    logits = qk @ normalise_keys(qk, 1).mT
    off = torch.eye(L, dtype=torch.bool)
    if causal:
        off = off | torch.ones(L, L, dtype=torch.bool).triu()
    off = off.expand(logits.shape)
    if padding is not None:
        off = off | padding[:, None, None, :]
    logits = logits.masked_fill(off, -math.inf)
    empty = off.all(-1, keepdim=True)
    p = logits.masked_fill(empty, 0).softmax(-1)
    return torch.where(empty, v, p @ v), logits.logsumexp(-1).masked_fill(empty[..., 0], -1e5)


@pytest.mark.parametrize("causal", [False, True])
def test_paper_joins_every_pair_and_equals_full_attention(causal: bool) -> None:
    """Two buckets, many rounds, whole buckets in reach: each pair shares a bucket in some round."""
    config = LSHConfig.paper(
        n_hashes=60, chunk_length=8, chunks_before=2, chunks_after=2, bucket_factors=(2,)
    )
    config = dataclasses.replace(config, causal=causal)
    qk, _, v = (x.requires_grad_() for x in qkv(1, 2, 24, 4, 3))
    layout = F.lsh_layout(qk, config, seed=1)
    seen = seen_pairs(layout, self_attention_rule(dataclasses.replace(config, causal=False), 24))
    assert bool((seen | torch.eye(24, dtype=torch.bool)).all()), "not every pair is joined: raise n_hashes"
    actual = F.attend(qk, v, layout, config, return_lse=True)
    expected = full_attention(qk, v, causal)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, 1e-12)
    for a, e in zip(gradients(actual, (qk, v)), gradients(expected, (qk, v)), strict=True):
        assert_close(a, e, 1e-10)


def seen_pairs(layout: Layout, rule: AttentionRule) -> Tensor:
    """(B, H, L, L) bool: whether i meets j, found by hashing one-hot values through the reference."""
    B, H, _, L = layout.order.shape
    zeros = torch.zeros(B, H, L, 1, dtype=torch.float64)
    eye = torch.eye(L, dtype=torch.float64).expand(B, H, L, L)
    out, _ = reference_attention(zeros, None, eye, layout.order, layout.bucket_starts, None, None, rule, 1, 0)
    return out > 0


@pytest.mark.parametrize("causal", [False, True])
def test_duplicate_correction_is_softmax_over_the_union(causal: bool) -> None:
    """Pairs that only the ring joins, across buckets: reformer_pytorch counts 0 there, weight e^20."""
    config = LSHConfig.trax(
        n_hashes=3,
        chunk_length=4,
        bucket_factors=(4,),
        correct_duplicates=True,
        causal=causal,
        chunks_after=1,
    )
    qk, _, v = qkv(1, 1, 22, 4)
    layout = F.lsh_layout(qk, config, seed=0)
    pairs = seen_pairs(layout, self_attention_rule(config, 22))
    assert 0.2 < pairs.double().mean() < 0.9
    logits = (qk @ normalise_keys(qk, 1).mT).masked_fill(~pairs, -math.inf)
    logits = logits.masked_fill(torch.eye(22, dtype=torch.bool), -math.inf)
    some = (logits > -math.inf).any(-1)
    out, lse = F.attend(qk, v, layout, config, return_lse=True)
    assert some.sum() >= 20
    assert_close(out[some], (logits.softmax(-1) @ v)[some], 1e-12)
    assert_close(lse[some], logits.logsumexp(-1)[some], 1e-12)


def test_uncorrected_rounds_merge_by_their_log_sum_exps() -> None:
    """out = sum_r out_r exp(lse_r - logsumexp_r lse_r), each round attended alone (without a ring)."""
    config = LSHConfig.paper(n_hashes=3, chunk_length=4, bucket_factors=(4,), correct_duplicates=False)
    qk, _, v = qkv(2, 2, 19, 4)
    layout = F.lsh_layout(qk, config, seed=0)
    one = dataclasses.replace(config, n_hashes=1)
    outs, lses = zip(
        *(
            F.attend(
                qk,
                v,
                Layout(layout.order[:, :, r : r + 1], layout.bucket_starts[:, :, r : r + 1]),
                one,
                return_lse=True,
            )
            for r in range(3)
        ),
        strict=True,
    )
    out, lse = F.attend(qk, v, layout, config, return_lse=True)
    merged = torch.stack(lses).logsumexp(0)
    some = merged > -1e4
    weights = (torch.stack(lses) - merged).exp()
    assert_close(out[some], (weights[..., None] * torch.stack(outs)).sum(0)[some], 1e-12)
    assert_close(lse[some], merged[some], 1e-12)


def test_lse_merges_attentions_of_two_key_sets() -> None:
    """What a differentiable log-sum-exp is for: attend to two halves apart, merge, get the whole."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 12, 4))
    mask = torch.arange(12)[None] % 3 == 0
    halves = [
        F.local_attention(q, k, v, chunk_length=16, key_padding_mask=m, return_lse=True)
        for m in (mask, ~mask)
    ]
    # Padding rows are read as zeros, as queries too, so only the other mask's rows are compared.
    whole = F.local_attention(q, k, v, chunk_length=16, return_lse=True)
    logits = (q @ k.mT) / 2
    for m, (out, lse) in zip((mask, ~mask), halves, strict=True):
        rows = ~m[0]
        expected = logits.masked_fill(m[:, None, None], -math.inf)
        assert_close(lse[:, :, rows], expected.logsumexp(-1)[:, :, rows], 1e-12)
        assert_close(out[:, :, rows], (expected.softmax(-1) @ v)[:, :, rows], 1e-12)
    assert_close(whole[0], logits.softmax(-1) @ v, 1e-12)
    direct = gradients((whole[1],), (q, k))
    for a, e in zip(direct, gradients((logits.logsumexp(-1),), (q, k)), strict=True):
        assert_close(a, e, 1e-12)


@pytest.mark.parametrize("L", [9, 40])
@pytest.mark.parametrize("more", [1, 7, 50])
def test_appending_tokens_changes_no_earlier_output(L: int, more: int) -> None:
    config = LSHConfig(
        window="bucket", bucket_window=5, causal=True, n_hashes=3, bucket_factors=(4,), chunk_length=4
    )
    qk, _, v = qkv(1, 2, L + more, 4)
    short = F.lsh_attention(qk[:, :, :L], v[:, :, :L], config, seed=0, return_lse=True)
    long = F.lsh_attention(qk, v, config, seed=0, return_lse=True)
    for a, e in zip(long, short, strict=True):
        assert_close(a[:, :, :L], e, 1e-13)


def test_chunks_move_when_tokens_are_appended() -> None:
    """So the test above is no matter of course."""
    config = LSHConfig.paper(causal=True, n_hashes=3, bucket_factors=(4,), chunk_length=4)
    qk, _, v = qkv(1, 2, 41, 4)
    short = F.lsh_attention(qk[:, :, :40], v[:, :, :40], config, seed=0)
    assert relative_error(F.lsh_attention(qk, v, config, seed=0)[:, :, :40], short) > 1e-3


@pytest.mark.parametrize("name", [n for n, c in CONFIGS.items() if c.ring == "none" and n != "one chunk"])
def test_a_padded_row_equals_the_row_alone(name: str) -> None:
    config = CONFIGS[name]
    for length in (13, 5, 1):
        if config.is_short(length):
            continue  # alone it would not be hashed: another rule
        qk, _, v = qkv(2, 2, 21, 4)
        mask = padding_mask([length, 21], 21)
        qk[0, :, length:], v[0, :, length:] = math.nan, math.inf
        qk.requires_grad_(), v.requires_grad_()
        padded = F.lsh_attention(qk, v, config, seed=0, key_padding_mask=mask, return_lse=True)
        alone = F.lsh_attention(qk[:1, :, :length], v[:1, :, :length], config, seed=0, return_lse=True)
        for a, e in zip(padded, alone, strict=True):
            assert_close(a[:1, :, :length], e, 1e-13)
        assert bool(padded[0].isfinite().all())
        for a, e in zip(
            gradients([x[:1, :, :length] for x in padded], (qk, v)), gradients(alone, (qk, v)), strict=True
        ):
            assert bool(a.isfinite().all())
            assert_close(a, e, 1e-12)


def test_non_finite_tokens_reach_only_those_who_see_them() -> None:
    config = LSHConfig.paper(n_hashes=1, chunk_length=4, bucket_factors=(4,))
    layout = layout_from_buckets((torch.arange(16) // 4).view(1, 1, 1, 16), 4)
    qk, _, v = qkv(1, 1, 16, 3)
    clean = F.attend(qk, v, layout, config)
    qk[:, :, 5], v[:, :, 6] = math.nan, math.inf
    qk.requires_grad_()
    out = F.attend(qk, v, layout, config)
    others = torch.cat([torch.arange(4), torch.arange(8, 16)])
    assert torch.equal(out[:, :, others], clean[:, :, others])
    (grad,) = torch.autograd.grad(out[:, :, others].sum(), qk)
    assert bool(grad[:, :, others].isfinite().all())


def test_dropout_is_inverted_per_round_and_reproducible() -> None:
    config = LSHConfig.trax(n_hashes=2, chunk_length=8, bucket_factors=(4,))
    qk, _, v = qkv(1, 1, 32, 4)
    layout = F.lsh_layout(qk, config, seed=0)
    plain, plain_lse = F.attend(qk, v, layout, config, return_lse=True)
    runs = [F.attend(qk, v, layout, config, dropout_p=0.5, seed=s, return_lse=True) for s in range(200)]
    assert torch.equal(runs[0][0], F.attend(qk, v, layout, config, dropout_p=0.5, seed=0))
    assert not torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(lse, plain_lse) for _, lse in runs)
    mean = torch.stack([out for out, _ in runs]).mean(0)
    deviation = torch.stack([out for out, _ in runs]).std(0) / math.sqrt(200)
    assert bool(((mean - plain).abs() < 5 * deviation).all())
    assert torch.equal(F.attend(qk, v, layout, config, dropout_p=0.0, seed=0), plain)


def test_a_pair_met_in_several_rounds_has_the_dropout_of_the_first() -> None:
    """Where every round is the same, all but the first could be left out, also under dropout."""
    rule = self_attention_rule(LSHConfig.paper(chunk_length=4, bucket_factors=(4,)), 30)
    q, _, v = qkv(1, 2, 30, 4)
    once = random_layout(1, 2, 1, 30, 4, seed=1)
    often = Layout(once.order.expand(-1, -1, 3, -1), once.bucket_starts.expand(-1, -1, 3, -1))
    seed = torch.tensor(5)
    results = [
        reference_attention(q, None, v, layout.order, layout.bucket_starts, None, seed, rule, 1, 0.5)
        for layout in (once, often)
    ]
    for one, several in zip(*results, strict=True):
        assert_close(several, one, 1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_of_queries_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name]
    qk, _, v = (x.requires_grad_() for x in qkv(2, 1, 17, 3))

    def run() -> tuple[Tensor, ...]:
        outputs = F.lsh_attention(qk, v, config, seed=0, dropout_p=0.2, return_lse=True)
        return (*outputs, *gradients(outputs, (qk, v)))

    whole = run()
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 1)
    for a, e in zip(run(), whole, strict=True):
        assert_close(a, e, 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_low_precision_computes_in_float32(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    qk, _, v = (x.requires_grad_() for x in qkv(2, 2, 30, 8, dtype=dtype))
    exact_qk, exact_v = (x.detach().double().requires_grad_() for x in (qk, v))
    layout = F.lsh_layout(exact_qk, config, seed=0)
    out, lse = F.attend(qk, v, layout, config, return_lse=True, backend="reference")
    exact = F.attend(exact_qk, exact_v, layout, config, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32 and exact[1].dtype == torch.float64
    assert_close(lse, exact[1], 1e-5)
    assert_close(out, exact[0], {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype])
    for a, e in zip(gradients((out, lse), (qk, v)), gradients(exact, (exact_qk, exact_v)), strict=True):
        assert a.dtype == dtype
        assert_close(a, e, {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype])


def test_float16_stays_finite() -> None:
    qk, v = (
        torch.full((1, 1, 40, 8), 3e4, dtype=torch.float16),
        torch.full((1, 1, 40, 8), 6e4, dtype=torch.float16),
    )
    for config, sign in itertools.product(CONFIGS.values(), (1, -1)):
        out = F.lsh_attention(sign * qk, v, config, seed=0, backend="reference")
        assert bool(out.isfinite().all())


@pytest.mark.parametrize("L", [1, 2, 3])
def test_tiny_lengths_and_huge_chunks(L: int) -> None:
    qk, _, v = qkv(1, 1, L, 2)
    full = full_attention(qk, v, causal=False)
    for config in (
        LSHConfig.paper(chunk_length=2**24),
        LSHConfig.trax(chunk_length=2**24),
        LSHConfig.paper(
            chunk_length=1, chunks_before=2**16, chunks_after=2**16, bucket_factors=(2,), n_hashes=30
        ),
        LSHConfig(window="bucket", bucket_window=2**24, bucket_factors=(2,), n_hashes=30),
    ):
        for a, e in zip(F.lsh_attention(qk, v, config, seed=0, return_lse=True), full, strict=True):
            assert_close(a, e, 1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_empty_batch(name: str) -> None:
    qk = normal(0, 2, 20, 4).requires_grad_()
    out, lse = F.lsh_attention(qk, qk, CONFIGS[name], seed=0, return_lse=True)
    assert out.shape == (0, 2, 20, 4) and lse.shape == (0, 2, 20)
    out.sum().backward()


def test_wrong_layout_values_are_refused() -> None:
    config = LSHConfig.paper(n_hashes=1, chunk_length=4, bucket_factors=(2,))
    qk, _, v = qkv(1, 1, 8, 2)
    layout = F.lsh_layout(qk, config, seed=0)
    for place, value in ((0, -1), (0, 8), (3, int(layout.order[..., 4]))):
        order = layout.order.clone()
        order[..., place] = value
        with pytest.raises(ValueError, match="permutation"):
            F.attend(qk, v, Layout(order, layout.bucket_starts), config)
    for place, value in ((0, 1), (-1, 7), (1, 9)):
        starts = layout.bucket_starts.clone()
        starts[..., place] = value
        with pytest.raises(ValueError, match="rise from 0 to 8"):
            F.attend(qk, v, Layout(layout.order, starts), config)
    # Kernels tell by ranks who is earlier, so that causal buckets must be in order of position.
    order = layout.order.clone()
    first, last = 0, int(layout.bucket_starts[..., 1]) - 1
    assert last > first, "the first bucket holds several tokens"
    order[..., [first, last]] = order[..., [last, first]]
    F.attend(qk, v, Layout(order, layout.bucket_starts), config)
    with pytest.raises(ValueError, match="must be sorted"):
        F.attend(qk, v, Layout(order, layout.bucket_starts), dataclasses.replace(config, causal=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [-1e9, torch.finfo(torch.float32).min])
def test_rows_that_see_only_keys_with_a_large_bias(dtype: torch.dtype, bias: float) -> None:
    """Such masks stand for padding elsewhere; beside them the logs of sums and counts vanish."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 12, 4, dtype=dtype))
    config = LSHConfig(n_hashes=3, chunk_length=4, attend_across_buckets=True, scale=0.0)
    layout = F.lsh_layout(q, config, seed=0)
    options = {"k": k, "backend": "reference", "return_lse": True}
    plain = F.attend(q, v, layout, config, **options)
    biased = F.attend(
        q, v, layout, config, key_padding_mask=torch.full((1, 12), bias, dtype=dtype), **options
    )
    assert_close(biased[0], plain[0], 1e-6)
    for ours, theirs in zip(gradients(biased, (q, k, v)), gradients(plain, (q, k, v)), strict=True):
        assert_close(ours, theirs, 1e-6)
