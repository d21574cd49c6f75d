"""The native step of cached generation against its reference: results and caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from python_tests.helpers import assert_close
from reformer_kernels import LSHConfig
from reformer_kernels import functional as F
from reformer_kernels.config import local_attention_config
from reformer_kernels.modules import caches
from reformer_kernels.modules.caches import LocalCache, LSHCache
from reformer_kernels.testing import TOLERANCE, normal

H, R, CHUNK, CAPACITY = 2, 3, 4, 60
RULES: dict[str, LSHConfig] = {
    "paper": LSHConfig.paper(n_hashes=R, chunk_length=CHUNK, causal=True),
    "trax": LSHConfig.trax(n_hashes=R, chunk_length=CHUNK, causal=True),
    "one round": LSHConfig.trax(n_hashes=1, chunk_length=CHUNK, causal=True),
    "lucidrains": LSHConfig.lucidrains(n_hashes=R, chunk_length=CHUNK, causal=True, bucket_factors=(4, 2)),
    "wide ring": LSHConfig.trax(
        n_hashes=R, chunk_length=CHUNK, causal=True, chunks_before=3, chunks_after=2, correct_duplicates=True
    ),
    "masked ring": LSHConfig.trax(
        n_hashes=R, chunk_length=CHUNK, causal=True, attend_across_buckets=False, key_norm="none"
    ),
    "bucket": LSHConfig(n_hashes=R, chunk_length=CHUNK, causal=True, window="bucket", scale=0.5),
    "bucket window": LSHConfig(n_hashes=R, causal=True, window="bucket", bucket_window=2, bucket_factors=2),
}


def rows(dtype: torch.dtype, dim: int, seed: int, batch: int = 2) -> Tensor:
    return normal(batch, H, CAPACITY, dim, seed=seed).to(dtype)


def lsh_caches(config: LSHConfig, hashed: Tensor, qk: Tensor, v: Tensor) -> tuple[LSHCache, LSHCache]:
    """Equal caches, of the native and the reference back end, after prompts of 3 and 17 tokens."""
    config = LSHConfig(**{**vars(config), "bucket_factors": config.factors(CAPACITY)})
    rotations = F.sample_rotations(config, H, qk.shape[-1], 5)
    parts = []
    for row, length in enumerate((3, 17)):
        cache = LSHCache(config, rotations, CAPACITY, "native")
        cache.prompt(*(x[row : row + 1, :, :length] for x in (hashed, qk, v)))
        parts.append(cache)
    ours = LSHCache.joined(parts)
    theirs = copy.deepcopy(ours)
    theirs.backend = "reference"
    return ours, theirs


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lsh_steps_equal_the_reference(
    rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caches, "MERGE_EVERY", 5)
    for dim, value_dim in ((8, 8), (37, 70), (64, 1)):
        # The hashed rows are multiples of 1/8 and small, so that both back ends project them alike.
        hashed = (rows(torch.float32, dim, 1) * 8).round().div(8).to(dtype)
        qk, v = rows(dtype, dim, 2), rows(dtype, value_dim, 3)
        ours, theirs = lsh_caches(RULES[rule], hashed, qk, v)
        for _ in range(CAPACITY - 17):
            at = ours.lengths.clone()
            token = [x[torch.arange(2), :, at][:, :, None] for x in (hashed, qk, v)]
            out, expected = ours.step(*token), theirs.step(*token)
            assert_close(out, expected, TOLERANCE[dtype])
            for name in LSHCache.PER_ROW:
                mine, other = getattr(ours, name), getattr(theirs, name)
                if name == "keys":
                    assert_close(mine, other, TOLERANCE[dtype])
                else:
                    assert torch.equal(mine, other), name
        with pytest.raises(ValueError, match="no room for another token"):
            ours.step(*token)


@pytest.mark.parametrize(
    ("chunk", "before", "after", "ring"),
    [(4, 1, 0, False), (4, 2, 1, True), (3, 5, 0, True), (60, 0, 0, False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_local_steps_equal_the_reference(
    chunk: int, before: int, after: int, ring: bool, dtype: torch.dtype
) -> None:
    config = local_attention_config(chunk, before, after, causal=True, ring=ring)
    q, k, v = rows(dtype, 40, 1), rows(dtype, 40, 2), rows(dtype, 24, 3)
    ours = LocalCache(config, CAPACITY, "native")
    ours.start(k[:, :, :2], v[:, :, :2])
    theirs = copy.deepcopy(ours)
    theirs.backend = "reference"
    for n in range(2, CAPACITY):
        token: Any = (x[:, :, n : n + 1] for x in (q, k, v))
        q_n, k_n, v_n = token
        assert_close(ours.step(q_n, k_n, v_n), theirs.step(q_n, k_n, v_n), TOLERANCE[dtype])
        for name in LocalCache.PER_ROW:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_threads_change_no_bit_and_wrong_tensors_are_refused() -> None:
    config = RULES["trax"]
    qk = normal(8, H, 300, 64).float()
    frozen = LSHConfig(**{**vars(config), "chunk_length": 32, "bucket_factors": (16,)})
    rotations = F.sample_rotations(frozen, H, 64, 5)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            cache = LSHCache(frozen, rotations, 300, "native")
            cache.prompt(*(x[:, :, :290] for x in (qk, qk, qk)))
            token = [x[:, :, 290:291] for x in (qk, qk, qk)]
            results.append(cache.step(*token))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    whole, cache.keys = cache.keys, cache.keys[..., :8]
    with pytest.raises(ValueError, match="keys must be contiguous"):
        cache.step(*token)
    cache.keys = whole
    with pytest.raises(ValueError, match="q must have shape"):
        cache.step(token[0], token[1][..., :8], token[2])
    with pytest.raises(TypeError, match="v must be"):
        cache.step(token[0], token[1], token[2].bfloat16())


def test_a_copy_of_a_cache_goes_its_own_way() -> None:
    """The kernel's kept parameters point to the tensors of one cache alone."""
    qk = normal(2, H, CAPACITY, 8).float()
    ours, _ = lsh_caches(RULES["paper"], qk, qk, qk)
    token = qk[:, :, :1]
    ours.step(token, token, token)
    theirs = copy.deepcopy(ours)
    expected = ours.step(token, token, 2 * token)
    assert theirs.lengths.tolist() == [4, 18] and ours.lengths.tolist() == [5, 19]
    assert torch.equal(theirs.step(token, token, 2 * token), expected)
    ours.select(torch.tensor([1, 1, 0]))
    out = ours.step(*(token[[1, 1, 0]],) * 3)
    assert torch.equal(out[0], out[1]) and ours.lengths.tolist() == [20, 20, 6]


def test_a_query_key_that_is_not_finite_goes_to_bucket_0() -> None:
    config = RULES["bucket"]
    qk = normal(2, H, CAPACITY, 8).float()
    ours, theirs = lsh_caches(config, qk, qk, qk)
    token = torch.full((2, H, 1, 8), float("inf"))
    ours.step(token, token, token)
    theirs.step(token, token, token)
    assert torch.equal(ours.buckets, theirs.buckets)
