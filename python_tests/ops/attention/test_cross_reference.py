"""Attention of queries over keys sorted apart: the reference against scalar loops and full attention."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.fuzz import oracle
from python_tests.helpers import assert_close, padding_mask, random_layout, reference_attention
from reformer_kernels import Layout, LSHConfig
from reformer_kernels import functional as F
from reformer_kernels.call import self_attention_rule
from reformer_kernels.rule import AttentionRule
from reformer_kernels.testing import normal

CONFIG = LSHConfig(n_hashes=2, bucket_window=5, bucket_factors=(4,))


def cross_qkv(B: int, H: int, L: int, L_k: int, D: int, Dv: int, **options: Any) -> tuple[Tensor, ...]:
    return tuple(
        normal(B, H, *size, seed=n, **options) for n, size in enumerate([(L, D), (L_k, D), (L_k, Dv)])
    )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    rule=st.builds(
        AttentionRule,
        rank_window=st.just(True),
        chunk_length=st.just(4),
        chunks_before=st.just(0),
        chunks_after=st.just(0),
        window_before=st.integers(0, 6),
        window_after=st.integers(0, 6),
        bucket_mask=st.booleans(),
        causal=st.booleans(),
        exclude_self=st.just(False),
        correct_duplicates=st.booleans(),
        ring=st.just(False),
        key_norm=st.just(0),
    ),
    B=st.integers(1, 2),
    H=st.integers(1, 2),
    R=st.integers(1, 3),
    L=st.integers(1, 12),
    L_k=st.integers(1, 12),
    n_buckets=st.integers(1, 4),
    padding=st.sampled_from(["none", "tail", "bias"]),
    dropout_p=st.sampled_from([0.0, 0.3]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_equals_scalar_loops(
    rule: AttentionRule,
    B: int,
    H: int,
    R: int,
    L: int,
    L_k: int,
    n_buckets: int,
    padding: str,
    dropout_p: float,
    seed: int,
) -> None:
    q, k, v = cross_qkv(B, H, L, L_k, 3, 2)
    layout, keys = (random_layout(B, H, R, n, n_buckets, seed=seed % 1000 + n) for n in (L, L_k))
    places = (layout.order, layout.bucket_starts)
    key_places = (keys.order, keys.bucket_starts)
    mask = padding_mask([L_k // 2, L_k][:B], L_k) if padding == "tail" else None
    added = normal(B, L_k, seed=5) if padding == "bias" else None
    bias = added if mask is None else torch.zeros(mask.shape).masked_fill(mask, -math.inf)
    actual = reference_attention(
        q, k, v, *places, bias, torch.tensor(seed), rule, 0.7, dropout_p, *key_places
    )
    expected = oracle.attention(q, k, v, *places, mask, seed, rule, 0.7, dropout_p, *key_places, added)
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("variant", ["plain", "bias", "dropout", "across"])
def test_gradcheck(causal: bool, variant: str) -> None:
    config = dataclasses.replace(CONFIG, causal=causal, attend_across_buckets=variant == "across")
    q, k, v = (x.requires_grad_() for x in cross_qkv(1, 2, 7, 10, 3, 2))
    layout = F.lsh_cross_layout(q, k, config, seed=0)
    bias = normal(1, 10, seed=4)
    bias = bias.masked_fill(bias > 1, -math.inf) if variant == "bias" else None
    options: dict[str, Any] = {"seed": 3, "dropout_p": 0.4 * (variant == "dropout"), "key_padding_mask": bias}

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = F.lsh_cross_attention(q, k, v, config, layout=layout, return_lse=True, **options)
        return out, lse.masked_fill(lse.isinf(), 0)

    assert torch.autograd.gradcheck(call, (q, k, v))


@pytest.mark.parametrize(("L", "L_k"), [(1, 1), (1, 50), (50, 1), (40, 40), (70, 31), (31, 70)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", ["chunks", "bucket"])
def test_wide_windows_are_full_attention(L: int, L_k: int, causal: bool, window: str) -> None:
    """Unhashed (window "chunks"), or one bucket with a window over all: ordinary scaled attention."""
    q, k, v = cross_qkv(2, 2, L, L_k, 8, 5)
    w = L_k if window == "chunks" else 2 * L_k
    config = LSHConfig(window=window, bucket_window=w, bucket_factors=(2,), n_hashes=2, causal=causal)
    layout = None
    if window == "bucket":
        one = random_layout(2, 2, 2, L, 1), random_layout(2, 2, 2, L_k, 1)
        layout = tuple(Layout(x.order, x.bucket_starts) for x in one)
    bias = normal(2, L_k, seed=3)
    bias[0, 0] = -math.inf if L_k > 1 and not causal else 0
    out, lse = F.lsh_cross_attention(q, k, v, config, layout=layout, key_padding_mask=bias, return_lse=True)
    mask = bias[:, None, None].expand(2, 1, L, L_k)
    if causal:
        mask = mask.masked_fill(torch.ones(L, L_k, dtype=torch.bool).triu(1), -math.inf)
    assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert_close(lse, (q @ k.mT / 8**0.5 + mask).logsumexp(-1))


def test_appended_tokens_change_no_earlier_output_of_causal_attention() -> None:
    q, k, v = cross_qkv(1, 2, 60, 90, 8, 8)
    for across in (False, True):
        # Across buckets a window is cut where later tokens are sorted in between, so only w = all is stable.
        config = dataclasses.replace(
            CONFIG, causal=True, bucket_window=90 if across else 5, attend_across_buckets=across,
            window="bucket" if not across else "chunks",
        )  # fmt: skip
        whole = F.lsh_cross_attention(q, k, v, config, seed=0)
        for L, L_k in [(30, 90), (30, 30), (60, 60)]:
            part = F.lsh_cross_attention(q[:, :, :L], k[:, :, :L_k], v[:, :, :L_k], config, seed=0)
            assert_close(part, whole[:, :, :L], 1e-12)


def test_padding_is_not_read() -> None:
    """Keys of padding hold NaN; a bool mask, a float mask and the shorter sequence give the same."""
    q, k, v = cross_qkv(1, 2, 33, 50, 8, 4)
    config = dataclasses.replace(CONFIG, causal=True)
    short = F.lsh_cross_attention(q, k[:, :, :40], v[:, :, :40], config, seed=0)
    k[:, :, 40:], v[:, :, 40:] = math.nan, math.nan
    mask = padding_mask([40], 50)
    for given_mask in (mask, torch.zeros(1, 50, dtype=torch.bfloat16).masked_fill(mask, -math.inf)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = F.lsh_cross_attention(*leaves, config, seed=0, key_padding_mask=given_mask)
        assert_close(out, short)
        for grad in torch.autograd.grad(out.sum(), leaves):
            assert bool(grad.isfinite().all())
    everything = torch.full((1, 50), -math.inf)
    out, lse = F.lsh_cross_attention(q, k, v, config, seed=0, key_padding_mask=everything, return_lse=True)
    assert out.abs().max() == 0 and bool((lse == -math.inf).all())


def test_float_masks_of_shared_query_keys() -> None:
    """`lsh_attention` and `attend` take the same masks: -inf is padding, other numbers are added."""
    x, _, v = cross_qkv(2, 2, 64, 64, 8, 4)
    config = LSHConfig(chunk_length=8)
    mask = padding_mask([50, 64], 64)
    expected = F.lsh_attention(x, v, config, seed=0, key_padding_mask=mask)
    zeros = torch.zeros(2, 64, dtype=torch.float16).masked_fill(mask, -math.inf)
    assert torch.equal(F.lsh_attention(x, v, config, seed=0, key_padding_mask=zeros), expected)
    bias = normal(2, 64, seed=4)
    layout = F.lsh_layout(x, config, seed=0)
    plain, biased = (
        reference_attention(x, None, v, layout.order, layout.bucket_starts, b, None, rule, 1.0, 0.0)[0]
        for rule in [self_attention_rule(config, 64)]
        for b in (None, bias)
    )
    assert_close(F.lsh_attention(x, v, config, layout=layout, key_padding_mask=bias), biased)
    assert not torch.allclose(plain, biased)
    lowest = torch.full((2, 64), torch.finfo(torch.float64).min, dtype=torch.float64)
    out = F.lsh_attention(x, v, config, layout=layout, key_padding_mask=lowest)
    assert bool(out.isfinite().all())


def test_no_batch_and_strides_and_autocast() -> None:
    q, k, v = cross_qkv(1, 2, 20, 30, 8, 4, dtype=torch.float32)
    out, lse = F.lsh_cross_attention(q[:0], k[:0], v[:0], CONFIG, seed=0, return_lse=True)
    assert out.shape == (0, 2, 20, 4) and lse.shape == (0, 2, 20)
    expected = F.lsh_cross_attention(q, k, v, CONFIG, seed=0)
    views = [x.mT.contiguous().mT for x in (q, k, v)]
    assert_close(F.lsh_cross_attention(*views, CONFIG, seed=0), expected)
    with torch.autocast("cpu"):
        assert F.lsh_cross_attention(q, k, v, CONFIG, seed=0).dtype == torch.bfloat16


def test_the_scale_of_a_configuration_is_honoured() -> None:
    """None is the scale of ordinary attention; a number is taken as it is."""
    q, k, v = cross_qkv(1, 2, 9, 12, 4, 4)
    for scale in (None, 0.25, 2.0):
        out = F.lsh_cross_attention(q, k, v, LSHConfig(scale=scale))
        assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale))


B, H, L, L_K, D = 2, 2, 20, 30, 8
_LAYOUT = F.lsh_cross_layout(*cross_qkv(B, H, L, L_K, D, D)[:2], CONFIG, seed=0)
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "head dims": ({"k": torch.zeros(B, H, L_K, 4)}, ValueError, "q and k must have one head dimension"),
    "lengths": ({"v": torch.zeros(B, H, L, D)}, ValueError, "k and v must have one length"),
    "heads": ({"k": torch.zeros(B, 1, L_K, D)}, ValueError, "the same batch and heads"),
    "dtype": ({"k": torch.zeros(B, H, L_K, D).double()}, TypeError, "must have one dtype"),
    "mask length": ({"key_padding_mask": torch.zeros(B, L).bool()}, ValueError, "key_padding_mask must be"),
    "mask kind": ({"key_padding_mask": torch.zeros(B, L_K).int()}, TypeError, "or a float bias"),
    "mask gradient": (
        {"key_padding_mask": torch.zeros(B, L_K, requires_grad=True)},
        ValueError,
        "carries no gradient",
    ),
    "one layout": ({"layout": _LAYOUT[0]}, TypeError, "a pair of Layouts"),
    "swapped": ({"layout": _LAYOUT[::-1]}, ValueError, "layout.order must be"),
    "other buckets": (
        {"layout": (_LAYOUT[0], random_layout(B, H, 2, L_K, 7))},
        ValueError,
        "must have the same buckets",
    ),
    "both": (
        {"layout": _LAYOUT, "rotations": F.sample_rotations(CONFIG, H, D, 0)},
        ValueError,
        "rotations or a layout",
    ),
    "unsorted": (
        {"layout": (_LAYOUT[0], Layout(_LAYOUT[1].order.flip(-1), _LAYOUT[1].bucket_starts))},
        ValueError,
        "must be sorted",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    changes, error, message = WRONG[name]
    q, k, v = cross_qkv(B, H, L, L_K, D, D, dtype=torch.float32)
    with pytest.raises(error, match=message):
        F.lsh_cross_attention(**{"q": q, "k": k, "v": v, "config": CONFIG, "seed": 0} | changes)


@pytest.mark.parametrize("causal", [False, True])
def test_the_place_of_a_query_depends_on_no_other_query(causal: bool) -> None:
    config = LSHConfig(n_hashes=2, chunk_length=8, causal=causal)
    q, k = torch.randn(1, 2, 60, 8) + 1, torch.randn(1, 2, 100, 8) + 1
    changed = torch.cat([q[:, :, :30], 5 * torch.randn(1, 2, 30, 8) - 3], dim=2)
    orders = [F.lsh_cross_layout(x, k, config, seed=0)[0].order for x in (q, changed)]
    # The first half's places among one another.
    first, second = (order[order < 30].view(1, 2, 2, 30) for order in orders)
    assert torch.equal(first, second) and not torch.equal(*orders)
