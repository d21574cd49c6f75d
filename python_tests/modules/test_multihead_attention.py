"""`MultiheadAttention` against `nn.MultiheadAttention`, and against the functions beyond its threshold."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from python_tests.helpers import assert_close, gradients, padding_mask
from reformer_kernels import LSHConfig, MultiheadAttention, ReversibleSequence, functional
from reformer_kernels.modules import attention_masks
from reformer_kernels.modules.multihead_arguments import warn_of_full_attention
from reformer_kernels.testing import normal

E, H, N = 16, 2, 3
ALL_SEEN = LSHConfig(n_hashes=2, chunk_length=64)
"""Its window of 128 keys covers every sequence here, so that LSH attention is full attention."""
SPARSE = LSHConfig(n_hashes=2, chunk_length=4)
"""Its window of 8 keys covers none."""

CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "kdim-vdim": {"kdim": 10, "vdim": 6},
    "extra-keys": {"add_bias_kv": True, "add_zero_attn": True},
    "bias-kv": {"add_bias_kv": True, "kdim": 10},
    "dropout": {"dropout": 0.4},
}
CONSTRUCTED = pytest.mark.parametrize("construction", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)


def pair(
    dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and ours with the same weights, biases not zero."""
    ours_only = {
        name: options.pop(name)
        for name in ("config", "full_attention_threshold", "shared_qk", "seed", "backend", "fallback")
        if name in options
    }
    theirs = nn.MultiheadAttention(E, H, **options, dtype=dtype)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "bias" in name:
                parameter.normal_()
    ours = MultiheadAttention(E, H, **options, dtype=dtype, **ours_only)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def inputs(
    module: nn.MultiheadAttention,
    L: int,
    S: int | None,
    *,
    batched: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value for `module`: a single tensor if S is None and the module takes one."""

    def make(length: int, size: int, seed: int) -> Tensor:
        x = normal(N, length, size, dtype=dtype, seed=seed)
        x = x if module.batch_first else x.transpose(0, 1).contiguous()
        return x if batched else x.select(0 if module.batch_first else 1, 0).contiguous()

    query = make(L, E, 1)
    if S is None and module.kdim == module.vdim == E:
        return query, query, query
    return query, make(S or L, module.kdim, 2), make(S or L, module.vdim, 3)


def masks(L: int, S: int, kind: str, batched: bool) -> dict[str, Any]:
    """Mask arguments of `forward`, by the name of their kind."""
    lengths = [S, S - 2, 1]
    padding = padding_mask(lengths, S) if batched else padding_mask([S - 2], S)[0]
    some = normal(L, S, seed=4)
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "key-bias": {"key_padding_mask": normal(*padding.shape, seed=5).masked_fill(padding, float("-inf"))},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal-unhinted": {"attn_mask": causal},
        "causal-float": {"attn_mask": torch.zeros(L, S).double().masked_fill(causal, float("-inf"))},
        "causal-padding": {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
        "bool": {"attn_mask": (some > 1).fill_diagonal_(False)},
        "float": {"attn_mask": some},
        "by-head": {"attn_mask": normal((N if batched else 1) * H, L, S, seed=6)},
        "bool-padding": {
            "attn_mask": (some > 1).index_fill(1, torch.tensor(0), False),
            "key_padding_mask": padding,
        },
    }[kind]


# One of its parts is no mask of the LSH path's
FULL_ONLY = ("bool", "float", "by-head", "bool-padding")
HONOURED = ("none", "padding", "key-bias", "causal", "causal-unhinted", "causal-float", "causal-padding")
CASES = list(itertools.product((True, False), (True, False), (None, 7)))  # batched, batch_first, S


@CONSTRUCTED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_makes_the_same_module(construction: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    theirs, state = nn.MultiheadAttention(E, H, dtype=dtype, **construction), torch.get_rng_state()
    torch.manual_seed(3)
    ours = MultiheadAttention(E, H, dtype=dtype, **construction)
    assert torch.equal(torch.get_rng_state(), state)
    for (name, a), (other, b) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert name == other and a.dtype == b.dtype == dtype and torch.equal(a, b)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.manual_seed(4)
    theirs._reset_parameters()
    torch.manual_seed(4)
    ours._reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    assert MultiheadAttention(E, H, device="meta", **construction).out_proj.weight.is_meta


@CONSTRUCTED
@pytest.mark.parametrize("threshold", [8, 0])
def test_full_attention_is_torchs(construction: dict[str, Any], threshold: int) -> None:
    """Bit for bit in training, dropout included; to rounding in evaluation, where torch may fuse.

    Without a threshold, the calls that LSH attention cannot serve.
    """
    answers = itertools.cycle(((False, True), (True, True), (True, False)))  # no weights, averaged, by head
    for (batched, batch_first, S), kind in itertools.product(CASES, HONOURED + FULL_ONLY):
        need_weights, average = next(answers)
        if threshold == 0 and kind in HONOURED and not need_weights:
            continue
        theirs, ours = pair(**construction, batch_first=batch_first, full_attention_threshold=threshold)
        query, key, value = inputs(theirs, 8, S, batched=batched)
        call = {
            **masks(8, S or 8, kind, batched),
            "need_weights": need_weights,
            "average_attn_weights": average,
        }
        for training in (True, False):
            theirs.train(training), ours.train(training)
            with torch.set_grad_enabled(training):
                torch.manual_seed(1)
                expected, expected_weights = theirs(query, key, value, **call)
                torch.manual_seed(1)
                out, weights = ours(query, key, value, **call)
            assert out.shape == expected.shape and out.dtype == expected.dtype
            assert (weights is None) == (expected_weights is None), kind
            for a, b in ((out, expected), (weights, expected_weights)):
                if training and a is not None:
                    assert torch.equal(a, b), kind
                elif a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@CONSTRUCTED
def test_with_a_window_over_all_keys_lsh_attention_is_full_attention(construction: dict[str, Any]) -> None:
    """Outputs and all gradients, through the LSH path, of every mask that it honours."""
    for (batched, batch_first, S), kind in itertools.product(CASES, HONOURED):
        theirs, ours = pair(
            **{**construction, "dropout": 0.0},
            batch_first=batch_first,
            config=ALL_SEEN,
            full_attention_threshold=0,
            fallback="raise",
        )
        query, key, value = (x.requires_grad_() for x in inputs(theirs, 8, S, batched=batched))
        call = {**masks(8, S or 8, kind, batched), "need_weights": False}
        out = ours(query, key, value, **call)[0]
        # With the hint torch hides extra keys from queries, as it takes the mask for one over all keys.
        expected = theirs(query, key, value, **{**call, "is_causal": False})[0]
        assert_close(out, expected)
        given = [query] if key is query else [query, key, value]
        found = gradients([out], [*given, *ours.parameters()])
        for a, b in zip(found, gradients([expected], [*given, *theirs.parameters()]), strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("with_mask", [True, False])
def test_is_causal_alone_is_the_causal_mask(with_mask: bool) -> None:
    for construction, threshold, need_weights in itertools.product(
        ({}, {"add_zero_attn": True}), (8, 0), (False, True)
    ):
        theirs, ours = pair(**construction, config=ALL_SEEN, full_attention_threshold=threshold)
        query, key, value = inputs(theirs, 8, 7)
        padding = {"key_padding_mask": padding_mask([7, 4, 1], 7)} if with_mask else {}
        out, weights = ours(query, key, value, is_causal=True, need_weights=need_weights, **padding)
        causal = torch.ones(8, 7, dtype=torch.bool).triu(1)
        expected = theirs(query, key, value, attn_mask=causal, need_weights=need_weights, **padding)
        assert_close(out, expected[0])
        if need_weights:
            assert_close(weights, expected[1])


def heads(x: Tensor, batch_first: bool) -> Tensor:
    return (x if batch_first else x.transpose(0, 1)).unflatten(-1, (H, E // H)).transpose(1, 2)


@pytest.mark.parametrize(("batch_first", "S"), [(True, None), (False, None), (True, 31)])
@pytest.mark.parametrize("causal", [True, False])
def test_beyond_the_threshold_it_is_the_function(batch_first: bool, S: int | None, causal: bool) -> None:
    theirs, ours = pair(batch_first=batch_first, config=SPARSE, full_attention_threshold=24, seed=5)
    ours.eval()
    query, key, value = inputs(theirs, 40, S)
    padding = padding_mask([S or 40, 25, 12], S or 40)
    out = ours(query, key, value, padding, need_weights=False, is_causal=causal)[0]
    q, k, v = (
        heads(x @ w.T + b, batch_first)
        for x, w, b in zip(
            (query, key, value), ours.in_proj_weight.chunk(3), ours.in_proj_bias.chunk(3), strict=True
        )
    )
    config = LSHConfig(n_hashes=2, chunk_length=4, causal=causal)
    attended = functional.lsh_cross_attention(q, k, v, config, seed=5, key_padding_mask=padding)
    expected = ours.out_proj(attended.transpose(1, 2).flatten(2))
    assert_close(out if batch_first else out.transpose(0, 1), expected)
    full = theirs(query, key, value, padding, need_weights=False)[0]
    assert not torch.allclose(out, full, rtol=1e-2)


@pytest.mark.parametrize("length", [3, 40])
def test_shared_queries_and_keys_are_the_papers(length: int) -> None:
    theirs, ours = pair(batch_first=True, config=SPARSE, shared_qk=True, seed=5)
    ours.eval()
    x = inputs(theirs, length, None)[0].requires_grad_()
    value = normal(N, length, E, seed=8)
    padding = padding_mask([length, 2, length - 1], length)
    out = ours(x, x, value, padding, need_weights=False, is_causal=True)[0]
    weights, biases = ours.in_proj_weight.chunk(3), ours.in_proj_bias.chunk(3)
    qk, v = heads(x @ weights[0].T + biases[0], True), heads(value @ weights[2].T + biases[2], True)
    config = LSHConfig(n_hashes=2, chunk_length=4, causal=True)
    attended = functional.lsh_attention(qk, v, config, seed=5, key_padding_mask=padding)
    assert_close(out, ours.out_proj(attended.transpose(1, 2).flatten(2)))
    in_proj, reached = gradients([out], [ours.in_proj_weight, x])
    assert in_proj[:E].abs().sum() > 0 and (in_proj[E : 2 * E] == 0).all() and reached.abs().sum() > 0
    # Weights are those of another function, so they are refused unless the caller takes it.
    with pytest.raises(RuntimeError, match="attention weights are asked for"):
        ours(x, x, x)
    ours.fallback = "exact"
    assert_close(ours(x, x, x)[1], theirs(x, x, x)[1])


def test_cross_attention_has_no_shared_form() -> None:
    theirs, separate = pair(batch_first=True, config=SPARSE, full_attention_threshold=0)
    shared = MultiheadAttention(E, H, batch_first=True, config=SPARSE, shared_qk=True, dtype=torch.float64)
    shared.load_state_dict(theirs.state_dict())
    call = inputs(theirs, 20, 33)
    one, other = (module.eval()(*call, need_weights=False)[0] for module in (separate, shared))
    assert torch.equal(one, other)


def test_extra_keys_are_dropped_out_too() -> None:
    """Where all ordinary keys are padding, a head gives the value of the bias, kept or dropped."""
    _, ours = pair(batch_first=True, add_bias_kv=True, dropout=0.5, config=SPARSE, full_attention_threshold=0)
    x = inputs(ours, 40, None)[0]
    out = ours(x, x, x, torch.ones(N, 40, dtype=torch.bool), need_weights=False)[0]
    bias = ours.bias_v.view(H, E // H)
    choices = torch.stack(
        [
            ours.out_proj(torch.cat([a * bias[0], b * bias[1]]))
            for a, b in itertools.product((0.0, 2.0), repeat=2)
        ]
    )
    nearest = (out.reshape(-1, 1, E) - choices).abs().amax(-1).min(dim=1)
    assert nearest.values.max() < 1e-10 and set(nearest.indices.tolist()) == {0, 1, 2, 3}


def test_the_scale_holds_for_extra_keys_too() -> None:
    """Doubled logits equal doubled queries."""
    options = {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}
    config = dataclasses.replace(ALL_SEEN, scale=2 * (E // H) ** -0.5)
    theirs, ours = pair(**options, config=config, full_attention_threshold=0, fallback="raise")
    with torch.no_grad():
        theirs.in_proj_weight[:E] *= 2
        theirs.in_proj_bias[:E] *= 2
    x = inputs(theirs, 20, None)[0]
    assert_close(ours(x, x, x, need_weights=False)[0], theirs(x, x, x, need_weights=False)[0])


# Masks are never ignored


def test_a_mask_that_is_not_the_causal_one_is_honoured_or_refused() -> None:
    theirs, ours = pair(config=SPARSE, full_attention_threshold=0)
    x = inputs(theirs, 12, None)[0]
    causal = torch.ones(12, 12, dtype=torch.bool).triu(1)
    for i, j in ((11, 0), (0, 1), (5, 5), (0, 11), (7, 6)):
        mask = causal.clone()
        mask[i, j] ^= True
        for given in (mask, torch.zeros(12, 12).double().masked_fill(mask, float("-inf"))):
            ours.fallback = "exact"
            out = ours(x, x, x, attn_mask=given, need_weights=False)[0]
            torch.testing.assert_close(out, theirs(x, x, x, attn_mask=given, need_weights=False)[0])
            ours.fallback = "raise"
            with pytest.raises(RuntimeError, match="attn_mask is not the causal mask"):
                ours(x, x, x, attn_mask=given, need_weights=False)
            for ours.full_attention_threshold in (0, 100):
                for weights in (False, True):
                    with pytest.raises(ValueError, match="is_causal=True says that attn_mask is the causal"):
                        ours(x, x, x, attn_mask=given, need_weights=weights, is_causal=True)
            ours.full_attention_threshold = 0
    ours(x, x, x, attn_mask=causal, need_weights=False)
    bias = torch.zeros(N, 12).double().requires_grad_()
    with pytest.raises(RuntimeError, match="key_padding_mask requires grad"):
        ours(x, x, x, bias, need_weights=False)
    ours.fallback = "exact"
    assert gradients([ours(x, x, x, bias, need_weights=False)[0]], [bias])[0].abs().sum() > 0


def test_a_mask_that_needs_full_attention_warns_once() -> None:
    _, ours = pair(config=SPARSE, full_attention_threshold=0)
    x = inputs(ours, 12, None)[0]
    mask = torch.zeros(12, 12).double().masked_fill(torch.ones(12, 12).triu(1).bool(), -1e4)
    warn_of_full_attention.cache_clear()
    with pytest.warns(UserWarning, match=r"full attention beyond its threshold.*attn_mask is not the causal"):
        ours(x, x, x, attn_mask=mask, need_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(x, x, x, attn_mask=mask, need_weights=False)
        ours(x, x, x)
        ours(x, x, x, attn_mask=mask.masked_fill(mask != 0, torch.finfo(mask.dtype).min), need_weights=False)


@pytest.mark.parametrize("shape", [(1, 1), (9, 9), (9, 4), (4, 9), (6, 9, 9)])
def test_the_causal_mask_is_recognised(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_masks, "MASK_BLOCK", 3 * shape[-1])
    causal = torch.ones(shape, dtype=torch.bool).triu(1)
    additive = torch.zeros(shape).masked_fill(causal, float("-inf"))
    is_causal_mask = attention_masks.is_causal_mask
    assert is_causal_mask(causal) and is_causal_mask(additive)
    assert len(shape) == 2 or is_causal_mask(causal[:1].expand(shape))
    for index in itertools.product(*(range(n) for n in shape)):
        wrong = causal.clone()
        wrong[index] ^= True
        assert not is_causal_mask(wrong)
        for value in (float("nan"), -1e8, 1.0) if len(shape) == 2 else ():
            other = additive.clone()
            other[index] = value
            assert not is_causal_mask(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_large_negative_numbers_hide_as_well(dtype: torch.dtype) -> None:
    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    for value in (torch.finfo(dtype).min, *(() if dtype == torch.float16 else (-1e9,))):
        assert attention_masks.is_causal_mask(torch.zeros(9, 9, dtype=dtype).masked_fill(later, value))
    assert not attention_masks.is_causal_mask(torch.zeros(9, 9, dtype=dtype).masked_fill(later, -1e4))


def test_a_mask_is_read_once_and_again_when_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    real = attention_masks._hides_later_keys
    monkeypatch.setattr(attention_masks, "_hides_later_keys", lambda mask: reads.append(1) or real(mask))
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert all(attention_masks.is_causal_mask(mask) for _ in range(3)) and len(reads) == 1
    mask[0, 0] = True
    assert not attention_masks.is_causal_mask(mask) and len(reads) == 2
    mask[0, 0] = False
    assert attention_masks.is_causal_mask(mask) and len(reads) == 3
    assert not attention_masks.is_causal_mask(mask.logical_not()) and len(reads) == 4
    with torch.inference_mode():
        mask = mask.clone()
        assert all(attention_masks.is_causal_mask(mask) for _ in range(2)) and len(reads) == 6


# Wrong use

WRONG: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "query-size": ({"query": normal(N, 8, E + 1)}, {}),
    "value-length": ({"value": normal(N, 7, E)}, {}),
    "batches": ({"key": normal(2, 8, E), "value": normal(2, 8, E)}, {}),
    "dimensions": ({"key": normal(8, E), "value": normal(8, E)}, {}),
    "query-4d": ({"query": normal(1, N, 8, E)}, {}),
    "query-1d": ({"query": normal(E)}, {}),
    "padding-shape": ({}, {"key_padding_mask": torch.zeros(N, 9, dtype=torch.bool)}),
    "padding-transposed": ({}, {"key_padding_mask": torch.zeros(8, N, dtype=torch.bool)}),
    "padding-dtype": ({}, {"key_padding_mask": torch.zeros(N, 8, dtype=torch.int64)}),
    "mask-shape": ({}, {"attn_mask": torch.zeros(8, 9)}),
    "mask-batch": ({}, {"attn_mask": torch.zeros(N, 8, 8)}),
    "mask-4d": ({}, {"attn_mask": torch.zeros(N, H, 8, 8)}),
    "mask-dtype": ({}, {"attn_mask": torch.zeros(8, 8, dtype=torch.uint8)}),
}


@pytest.mark.parametrize(("tensors", "options"), WRONG.values(), ids=WRONG)
def test_what_torch_refuses_is_refused(tensors: dict[str, Any], options: dict[str, Any]) -> None:
    theirs, ours = pair(batch_first=True, config=SPARSE)
    x = normal(N, 8, E)
    arguments = {"query": x, "key": x, "value": x, **tensors}
    for need_weights in (True, False):
        with pytest.raises((AssertionError, RuntimeError, ValueError, TypeError)):
            theirs(**arguments, **options, need_weights=need_weights)
        for threshold in (0, 100):
            ours.full_attention_threshold = threshold
            with pytest.raises((AssertionError, RuntimeError, ValueError, TypeError)) as caught:
                ours(**arguments, **options, need_weights=need_weights)
            if threshold == 0 and arguments["query"].dim() == arguments["key"].dim() == 3:
                assert "must" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"config": {"n_hashes": 2}}, TypeError, "config must be an LSHConfig, .*got dict"),
        ({"config": LSHConfig(causal=True)}, ValueError, "each call says whether it is causal"),
        ({"full_attention_threshold": -1}, ValueError, "full_attention_threshold must be an integer in 0"),
        ({"shared_qk": 1}, ValueError, "shared_qk must be True or False"),
        ({"seed": 1.0}, ValueError, "seed must be an integer"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"fallback": "ignore"}, ValueError, "fallback must be one of 'exact', 'raise', got 'ignore'"),
        ({"shared_qk": True, "add_bias_kv": True}, ValueError, "shared_qk has no form of add_bias_kv"),
        ({"shared_qk": True, "add_zero_attn": True}, ValueError, "shared_qk has no form of add_bias_kv"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiheadAttention(E, H, **options)


def test_what_torchs_constructor_refuses_is_refused() -> None:
    for arguments in ((0, 2), (16, 0), (16, 3)):
        for kind in (nn.MultiheadAttention, MultiheadAttention):
            with pytest.raises((AssertionError, ValueError)):
                kind(*arguments)


def test_heads_beyond_the_kernels_take_full_attention() -> None:
    ours = MultiheadAttention(257, 1, full_attention_threshold=0)
    x = torch.randn(5, 1, 257)
    assert ours(x, x, x, need_weights=False)[0].shape == x.shape
    ours.fallback = "raise"
    with pytest.raises(RuntimeError, match="heads of 257, where LSH attention takes at most 256"):
        ours(x, x, x, need_weights=False)


def test_torchscript_is_refused_in_words() -> None:
    layer = nn.TransformerEncoderLayer(E, H)
    layer.self_attn = MultiheadAttention(E, H)
    for module in (MultiheadAttention(E, H), layer):
        with pytest.raises(RuntimeError, match=r"cannot be compiled by TorchScript; use torch\.compile"):
            torch.jit.script(module)


# Numbers


@pytest.mark.parametrize("shared_qk", [False, True])
def test_padding_never_leaks(shared_qk: bool) -> None:
    for poison in (float("nan"), float("inf"), 1e30):
        _, ours = pair(batch_first=True, config=SPARSE, full_attention_threshold=0, shared_qk=shared_qk)
        clean = inputs(ours, 40, None)[0]
        padding = padding_mask([40, 25, 12], 40)
        dirty = clean.masked_fill(padding[..., None], poison).requires_grad_()
        ours.eval()
        for causal in (False, True):
            expected = ours(clean, clean, clean, padding, need_weights=False, is_causal=causal)[0]
            out = ours(dirty, dirty, dirty, padding, need_weights=False, is_causal=causal)[0]
            assert torch.equal(out[~padding], expected[~padding])


@pytest.mark.parametrize("shared_qk", [False, True])
def test_random_state(shared_qk: bool) -> None:
    """Training draws from torch's generator, evaluation does not."""
    _, ours = pair(config=SPARSE, full_attention_threshold=0, shared_qk=shared_qk, dropout=0.1)
    x = inputs(ours, 40, None)[0]

    def run() -> Tensor:
        return ours(x, x, x, need_weights=False)[0]

    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(run(), first) and not torch.equal(first, second)
    ours.eval()
    state = torch.get_rng_state()
    fixed = run()
    assert torch.equal(run(), fixed) and torch.equal(torch.get_rng_state(), state)
    ours.seed = 1
    assert not torch.equal(run(), fixed)


def test_copies_compute_the_same() -> None:
    options: dict[str, Any] = {
        "config": SPARSE,
        "full_attention_threshold": 7,
        "fallback": "raise",
        "seed": 9,
    }
    _, ours = pair(**options)
    ours.eval()
    x = inputs(ours, 40, None)[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])
        assert all(getattr(other, name) == value for name, value in options.items())
    for part in ("full_attention_threshold=7", "shared_qk=False", "seed=9", "fallback='raise'", "n_hashes=2"):
        assert part in repr(ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    """Keys that fit the window are all seen, so that no hash can flip."""
    for options in ({}, {"add_bias_kv": True}):
        theirs, _ = pair(**options)
        ours = MultiheadAttention(E, H, **options, config=ALL_SEEN, full_attention_threshold=0)
        ours.load_state_dict(theirs.state_dict())
        ours.to(dtype)
        x = inputs(theirs, 30, None)[0]
        out = ours(x.to(dtype), x.to(dtype), x.to(dtype), need_weights=False, is_causal=True)[0]
        mask = torch.ones(30, 30, dtype=torch.bool).triu(1)
        expected = theirs(x, x, x, need_weights=False, attn_mask=mask)[0]
        assert out.dtype == dtype
        assert_close(out, expected, {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 6e-3}[dtype])


def test_autocast() -> None:
    theirs, ours = pair(torch.float32, add_bias_kv=True, config=ALL_SEEN, full_attention_threshold=0)
    x = inputs(theirs, 30, None, dtype=torch.float32)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(x, x, x, need_weights=False)[0]
        expected = theirs(x, x, x, need_weights=False)[0]
    assert out.dtype == expected.dtype == torch.bfloat16
    assert_close(out, expected, 5e-2)
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("shared_qk", [False, True])
def test_compiles_whole(shared_qk: bool) -> None:
    _, ours = pair(
        torch.float32, batch_first=True, config=SPARSE, full_attention_threshold=9, shared_qk=shared_qk
    )
    ours.eval()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for length in (40, 8):
        x = inputs(ours, length, None, dtype=torch.float32)[0].requires_grad_()
        padding = padding_mask([length, 7, 5], length)
        out = compiled(x, x, x, padding, need_weights=False, is_causal=True)[0]
        expected = ours(x, x, x, padding, need_weights=False, is_causal=True)[0]
        assert_close(out, expected, 1e-5)
        for a, b in zip(gradients([out], [x]), gradients([expected], [x]), strict=True):
            assert_close(a, b, 1e-4)


def test_in_reversible_layers_it_is_rebuilt_on_the_same_buckets() -> None:
    class Attention(nn.Module):
        def __init__(self, shared_qk: bool) -> None:
            super().__init__()
            self.attention = pair(
                config=SPARSE, full_attention_threshold=0, shared_qk=shared_qk, batch_first=True, dropout=0.2
            )[1]

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    x = normal(N, 30, 2 * E)
    layers = [(Attention(False), nn.Linear(E, E).double()), (Attention(True), nn.Linear(E, E).double())]
    found = []
    for reversible in (True, False):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(2)
        if reversible:
            out = ReversibleSequence(layers)(leaf)
        else:
            a, b = leaf.chunk(2, dim=-1)
            for f, g in layers:
                a = a + f(b)
                b = b + g(a)
            out = torch.cat([a, b], dim=-1)
        parameters = [p for block in layers for part in block for p in part.parameters()]
        found.append([out, *gradients([out], [leaf, *parameters])])
    for rebuilt, plain in zip(*found, strict=True):
        assert_close(rebuilt, plain, 1e-6)


# Nested tensors


@pytest.mark.parametrize("threshold", [30, 0])
@pytest.mark.parametrize("training", [True, False])
def test_nested_tensors(threshold: int, training: bool) -> None:
    _, ours = pair(batch_first=True, config=SPARSE, full_attention_threshold=threshold)
    ours.train(training)
    lengths = [30, 21, 1]
    x = inputs(ours, 30, None)[0].requires_grad_()
    nested = torch.nested.as_nested_tensor([row[:length] for row, length in zip(x, lengths, strict=True)])
    torch.manual_seed(1)
    out, weights = ours(nested, nested, nested, need_weights=threshold > 0)
    torch.manual_seed(1)
    padding = padding_mask(lengths, 30)
    expected, expected_weights = ours(x, x, x, padding, need_weights=threshold > 0)
    assert out.is_nested and [row.shape[0] for row in out.unbind()] == lengths
    flat = torch.cat(out.unbind())
    assert_close(flat, expected[~padding])
    if threshold > 0:
        assert_close(weights[~padding], expected_weights[~padding])
    for a, b in zip(gradients([flat], [x]), gradients([expected[~padding]], [x]), strict=True):
        assert_close(a, b)


def test_nested_tensors_that_torch_refuses_are_refused() -> None:
    _, ours = pair(batch_first=True)
    x = normal(2, 5, E)
    nested, other = (torch.nested.as_nested_tensor([x[0], x[1, :3]]) for _ in range(2))
    jagged = torch.nested.as_nested_tensor([x[0], x[1, :3]], layout=torch.jagged)
    for call, message in (
        ((nested, other, other), "self-attention"),
        ((nested, nested, nested, torch.zeros(2, 5, dtype=torch.bool)), "without masks"),
        ((jagged, jagged, jagged), "strided layout"),
        ((x, nested, nested), "self-attention"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(*call)
