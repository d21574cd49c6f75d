from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from reformer_kernels import LSHConfig
from reformer_kernels.call import self_attention_rule
from reformer_kernels.config import (
    AUTOMATIC_ROTATION_WIDTH,
    automatic_factors,
)
from reformer_kernels.rule import AttentionRule


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_hashes", 0),
        ("n_hashes", -1),
        ("n_hashes", 2.0),
        ("n_hashes", True),
        ("n_hashes", "4"),
        ("n_hashes", None),
        ("n_hashes", 10**9),
        ("chunk_length", 0),
        ("chunk_length", 64.0),
        ("chunk_length", True),
        ("chunk_length", 2**40),
        ("chunks_before", -1),
        ("chunks_before", 0.5),
        ("chunks_before", 2**30),
        ("chunks_after", -1),
        ("chunks_after", False),
        ("window", "chunk"),
        ("window", None),
        ("window", ["bucket"]),
        ("bucket_window", 0),
        ("bucket_window", 1.5),
        ("bucket_window", True),
        ("bucket_factors", 3),
        ("bucket_factors", 0),
        ("bucket_factors", -2),
        ("bucket_factors", ()),
        ("bucket_factors", (3,)),
        ("bucket_factors", (4, 0)),
        ("bucket_factors", (4.0,)),
        ("bucket_factors", (True, 2)),
        ("bucket_factors", "64"),
        ("bucket_factors", 4.0),
        ("bucket_factors", (1024, 1024, 1024)),
        ("causal", 1),
        ("causal", None),
        ("attend_across_buckets", "no"),
        ("correct_duplicates", 0),
        ("ring", True),
        ("ring", "round"),
        ("key_norm", "L2"),
        ("scale", math.nan),
        ("scale", math.inf),
        ("scale", -1.0),
        ("scale", 1e39),  # infinite in float32
        ("scale", 10**400),
        ("scale", True),
        ("scale", "1"),
    ],
)
def test_wrong_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field) as error:
        LSHConfig(**{field: value})
    message = str(error.value)
    assert message.startswith(field) and repr(value) in message, message


def test_message_says_what_is_accepted() -> None:
    with pytest.raises(ValueError, match=r"bucket_factors must be even positive integers, got \(3,\)"):
        LSHConfig(bucket_factors=(3,))
    with pytest.raises(ValueError, match=r"n_hashes must be an integer in 1\.\.64, got 0"):
        LSHConfig(n_hashes=0)
    with pytest.raises(ValueError, match="window must be one of 'chunks', 'bucket', got 'chunk'"):
        LSHConfig(window="chunk")  # type: ignore[arg-type]


@pytest.mark.parametrize(("given", "kept"), [([4, 8], (4, 8)), (16, (16,)), ((2, 2), (2, 2)), (None, None)])
def test_bucket_factors_become_a_tuple(given: Any, kept: tuple[int, ...] | None) -> None:
    config = LSHConfig(bucket_factors=given)
    assert config.bucket_factors == kept
    assert hash(config) == hash(LSHConfig(bucket_factors=kept))


def test_presets() -> None:
    assert LSHConfig.paper() == LSHConfig()
    assert LSHConfig.trax(causal=True) == LSHConfig(
        attend_across_buckets=True, correct_duplicates=False, ring="rounds", causal=True
    )
    assert LSHConfig.lucidrains() == LSHConfig.trax(key_norm="l2", scale=None)
    for preset in (LSHConfig.paper, LSHConfig.trax, LSHConfig.lucidrains):
        values = {
            "n_hashes": 2,
            "chunk_length": 8,
            "chunks_before": 0,
            "chunks_after": 3,
            "window": "bucket",
            "bucket_window": 5,
            "bucket_factors": (2, 4),
            "causal": True,
            "attend_across_buckets": False,
            "correct_duplicates": True,
            "ring": "none",
            "key_norm": "none",
            "scale": 0.5,
        }
        assert values.keys() == {f.name for f in dataclasses.fields(LSHConfig)}
        assert dataclasses.asdict(preset(**values)) == values
        with pytest.raises(ValueError, match="chunk_length"):
            preset(chunk_length=0)
        with pytest.raises(TypeError, match="chunk_len"):
            preset(chunk_len=8)


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LSHConfig().causal = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("length", "span", "factors"),
    [
        (1, 64, (2,)),
        (127, 64, (2,)),
        (128, 64, (4,)),
        (200, 64, (6,)),
        (4096, 64, (128,)),
        (4160, 64, (16, 8)),  # 130 rounds down to 128
        (16384, 64, (32, 16)),
        (2**20, 64, (32, 32, 32)),
        (2**23, 64, (64, 64, 64)),
        (2**24, 64, (32, 32, 32, 16)),
        (2**31 - 1, 1, (64, 64, 64, 64)),
    ],
)
def test_automatic_factors(length: int, span: int, factors: tuple[int, ...]) -> None:
    assert automatic_factors(length, span) == factors
    assert sum(factors) // 2 <= AUTOMATIC_ROTATION_WIDTH


def test_span_and_window() -> None:
    config = LSHConfig(chunk_length=32, chunks_before=2, chunks_after=1)
    assert config.span == 32
    by_bucket = dataclasses.replace(config, window="bucket")
    assert (by_bucket.window_size, by_bucket.span) == (128, 256)
    assert dataclasses.replace(by_bucket, bucket_window=10).span == 20
    assert config.factors(320) == (20,) and by_bucket.factors(2560) == (20,)
    assert config.rotation_width == 128
    explicit = dataclasses.replace(config, bucket_factors=(4, 6))
    assert explicit.factors(10**6) == (4, 6) and explicit.rotation_width == 5


def test_short_sequences_have_one_round_in_chunks_only() -> None:
    config = LSHConfig(chunk_length=8, n_hashes=3)
    assert [config.rounds(L) for L in (1, 8, 9)] == [1, 1, 3]
    assert LSHConfig(chunk_length=8, n_hashes=3, window="bucket").rounds(1) == 3


def test_rule_of_chunks() -> None:
    config = LSHConfig(chunk_length=8, chunks_before=2, chunks_after=1, causal=True)
    assert self_attention_rule(config, 9) == AttentionRule(
        rank_window=False,
        chunk_length=8,
        chunks_before=2,
        chunks_after=1,
        window_before=0,
        window_after=0,
        bucket_mask=True,
        causal=True,
        exclude_self=True,
        correct_duplicates=True,
        ring=False,
        key_norm=1,
    )
    trax = self_attention_rule(LSHConfig.trax(chunk_length=8), 9)
    assert (trax.bucket_mask, trax.correct_duplicates, trax.ring) == (False, False, True)
    assert self_attention_rule(LSHConfig.lucidrains(chunk_length=8), 9).key_norm == 2
    short = self_attention_rule(LSHConfig.trax(chunk_length=8, chunks_after=1), 8)
    # One chunk has no neighbours, however many there may be.
    assert (short.chunks_before, short.chunks_after, short.ring, short.bucket_mask) == (1, 1, False, False)
    assert not self_attention_rule(config, 8).bucket_mask
    assert not self_attention_rule(config, 9, shared_qk=False).exclude_self


@pytest.mark.parametrize(("causal", "before", "after"), [(True, 7, 0), (False, 3, 4)])
def test_rule_of_bucket_windows(causal: bool, before: int, after: int) -> None:
    config = LSHConfig.trax(window="bucket", bucket_window=7, causal=causal)
    rule = self_attention_rule(config, 3)
    assert rule.rank_window and rule.bucket_mask and not rule.ring
    assert (rule.window_before, rule.window_after) == (before, after)


def test_a_rule_is_the_tuple_that_operators_take() -> None:
    rule = AttentionRule(True, 2, 3, 4, 5, 6, False, True, False, True, False, 2)
    assert list(map(int, rule)) == [1, 2, 3, 4, 5, 6, 0, 1, 0, 1, 0, 2]
    declared = re.findall(r"(\w+) = (?:false|0|KeyNorm::kNone)", _struct("AttentionRule"))
    assert declared == list(AttentionRule._fields), "csrc/kernels.h lists other fields, or in another order"


def _struct(name: str) -> str:
    header = (Path(__file__).parents[1] / "csrc" / "kernels.h").read_text()
    return header.partition(f"struct {name} {{")[2].partition("};")[0]


@pytest.mark.parametrize(("scale", "shared", "separate"), [(None, 1.0, 0.25), (2, 2.0, 2.0), (0.5, 0.5, 0.5)])
def test_scale(scale: float | None, shared: float, separate: float) -> None:
    config = LSHConfig(scale=scale)
    assert config.logit_scale(16) == shared
    assert config.logit_scale(16, shared_qk=False) == separate
    for norm in ("l2", "none"):
        assert dataclasses.replace(config, key_norm=norm).logit_scale(16) == separate


def test_rounds_are_bounded_where_their_cost_is() -> None:
    ring = {"ring": "rounds", "correct_duplicates": True}
    assert LSHConfig(n_hashes=64).n_hashes == 64 and LSHConfig(n_hashes=32, **ring).n_hashes == 32
    assert LSHConfig.trax(n_hashes=64).n_hashes == 64
    with pytest.raises(ValueError, match=r"n_hashes must be an integer in 1\.\.64, got 65"):
        LSHConfig(n_hashes=65)
    with pytest.raises(ValueError, match="n_hashes must be at most 32 where ring='rounds'"):
        LSHConfig(n_hashes=33, **ring)
