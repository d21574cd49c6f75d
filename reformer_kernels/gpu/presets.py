"""The kinds of attention that GPU kernels are compiled and judged for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from reformer_kernels.call import cross_attention_rule, self_attention_rule
from reformer_kernels.config import LSHConfig, automatic_factors, local_attention_config
from reformer_kernels.rule import AttentionRule


@dataclass(frozen=True)
class Preset:
    """A kind of attention.

    Attributes:
        about: how users call it.
        config: the configuration. A shape replaces its hash rounds and its chunk length.
        keys: "shared": queries serve as keys; "own": keys are given, in the queries' order; "apart": keys are
            sorted apart from the queries.
        hashed: whether tokens are hashed and sorted. Otherwise there is one round, in order of position.
        one_chunk: whether one chunk holds all tokens.
    """

    about: str
    config: LSHConfig
    keys: Literal["shared", "own", "apart"] = "shared"
    hashed: bool = True
    one_chunk: bool = False

    def rounds(self, n_hashes: int) -> int:
        """The rounds that are attended where `n_hashes` are asked for."""
        return n_hashes if self.hashed else 1

    def sized(self, length: int, chunk_length: int) -> LSHConfig:
        """The configuration for `length` tokens and this chunk length."""
        return dataclasses.replace(self.config, chunk_length=length if self.one_chunk else chunk_length)

    def rule(self, length: int, chunk_length: int) -> AttentionRule:
        """The pair rule for `length` queries and keys and this chunk length."""
        config = self.sized(length, chunk_length)
        if self.keys == "apart":
            return cross_attention_rule(config, length)
        return self_attention_rule(config, length, shared_qk=self.keys == "shared")

    def buckets(self, length: int, chunk_length: int) -> int:
        """The automatic number of buckets for `length` tokens, 1 where they are not hashed."""
        if not self.hashed:
            return 1
        config = self.sized(length, chunk_length)
        return math.prod(
            automatic_factors(length, config.cross_span if self.keys == "apart" else config.span)
        )


PRESETS: Mapping[str, Preset] = {
    "paper": Preset("LSHConfig.paper(causal=True)", LSHConfig.paper(causal=True)),
    "trax": Preset("LSHConfig.trax(causal=True)", LSHConfig.trax(causal=True)),
    "lucidrains": Preset("LSHConfig.lucidrains(causal=True)", LSHConfig.lucidrains(causal=True)),
    "bucket": Preset(
        'LSHConfig.paper(window="bucket", causal=True)', LSHConfig.paper(window="bucket", causal=True)
    ),
    "cross": Preset("lsh_cross_attention", LSHConfig.paper(), keys="apart"),
    "local": Preset(
        "local_attention(causal=True)",
        local_attention_config(64, 1, 0, causal=True, ring=False),
        keys="own",
        hashed=False,
    ),
    "full": Preset(
        "LSHConfig.paper(causal=True), of tokens that fit one chunk",
        LSHConfig.paper(causal=True),
        hashed=False,
        one_chunk=True,
    ),
}
"""The presets by name."""
