"""One call of attention, resolved: the value that everything below the public functions reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reformer_kernels._backend import resolve_backend, resolve_sort_backend
from reformer_kernels._random import Seed, resolve_seed
from reformer_kernels.config import KEY_NORMS, LSHConfig
from reformer_kernels.rule import AttentionRule


class AttentionCall(NamedTuple):
    """What a public function decided once for a call; nothing below it decides it again.

    Attributes:
        backend: what hashes and attends: "reference", "native" or "triton".
        sort_backend: what sorts.
        hashed: whether tokens are hashed and sorted. Otherwise there is one round, in order of position.
        n_hashes: R, how many rounds are hashed.
        factors: the bucket factors; empty where they are automatic.
        span: tokens for which automatic factors make two buckets.
        key_length: how many keys there are, from which automatic factors come. Symbolic under torch.compile.
        rule: the pair rule.
        scale: the factor of the logits.
        mask: the checked key padding mask (B, keys), bool or a float bias; or None.
        dropout_p: the dropout of the probabilities.
        seed: an int64 tensor of one element where rotations are drawn or probabilities dropped, else None.
    """

    backend: str
    sort_backend: str
    hashed: bool
    n_hashes: int
    factors: tuple[int, ...]
    span: int
    key_length: int
    rule: AttentionRule
    scale: float
    mask: Tensor | None
    dropout_p: float
    seed: Tensor | None

    @property
    def n_buckets(self) -> int:
        """A bound of the number of buckets, from which the sort's tables get their size.

        Automatic factors multiply to this or less. It stays symbolic under torch.compile, so that no length
        needs a compilation of its own.
        """
        if not self.factors:
            return 2 * max(1, self.key_length // self.span)
        product = 1
        for factor in self.factors:
            product *= factor
        return product


def self_attention_call(
    config: LSHConfig,
    q: Tensor,
    *,
    shared_qk: bool = True,
    by_position: bool = False,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Seed = None,
    draws_rotations: bool = False,
    backend: str = "auto",
) -> AttentionCall:
    """The call of `config` for tokens q (B, H, L, D) that attend to themselves.

    `by_position`: they are not hashed, whatever their number, so one call serves all lengths of a program.
    """
    return _call(
        config,
        q,
        key_length=q.shape[2],
        hashed=not (by_position or config.is_short(q.shape[2])),
        span=config.span,
        rule=self_attention_rule(config, q.shape[2], shared_qk=shared_qk),
        scale=config.logit_scale(q.shape[3], shared_qk=shared_qk),
        mask=mask,
        dropout_p=dropout_p,
        seed=seed,
        draws_rotations=draws_rotations,
        backend=backend,
    )


def cross_attention_call(
    config: LSHConfig,
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Seed = None,
    draws_rotations: bool = False,
    backend: str = "auto",
) -> AttentionCall:
    """The call of `config` for queries q (B, H, L_q, D) and keys k (B, H, L_k, D) that are sorted apart."""
    return _call(
        config,
        q,
        key_length=k.shape[2],
        hashed=not config.sees_all_keys(k.shape[2]),
        span=config.cross_span,
        rule=cross_attention_rule(config, k.shape[2]),
        scale=config.logit_scale(q.shape[3], shared_qk=False),
        mask=mask,
        dropout_p=dropout_p,
        seed=seed,
        draws_rotations=draws_rotations,
        backend=backend,
    )


def _call(
    config: LSHConfig,
    q: Tensor,
    *,
    key_length: int,
    hashed: bool,
    span: int,
    rule: AttentionRule,
    scale: float,
    mask: Tensor | None,
    dropout_p: float,
    seed: Seed,
    draws_rotations: bool,
    backend: str,
) -> AttentionCall:
    chosen = resolve_backend(backend, q.device, q.dtype)
    return AttentionCall(
        backend=chosen,
        sort_backend=resolve_sort_backend("auto", q.device) if chosen == "triton" else chosen,
        hashed=hashed,
        n_hashes=config.n_hashes,
        factors=config.bucket_factors or (),
        span=span,
        key_length=key_length,
        rule=rule,
        scale=scale,
        mask=mask,
        dropout_p=float(dropout_p),
        seed=resolve_seed(seed, q.device) if dropout_p > 0 or (draws_rotations and hashed) else None,
    )


def self_attention_rule(config: LSHConfig, length: int, *, shared_qk: bool = True) -> AttentionRule:
    """The rule of `config` for sequences of `length` tokens that attend to themselves.

    Only whether `length` fits one chunk matters (`LSHConfig.is_short`), and only on a ring or where buckets
    are masked. Otherwise it is not read, so a program with a symbolic length has one rule for all lengths.

    Shared query-keys exclude themselves, because a shared query-key always matches itself best. Without
    `shared_qk`, keys are given apart from the queries and a query may see its own position, as in ordinary
    attention.
    """
    by_bucket = config.window == "bucket"
    window = config.window_size if by_bucket else 0
    window_before, window_after = (window, 0) if config.causal else (window // 2, window - window // 2)
    by_chunks = not by_bucket
    return AttentionRule(
        rank_window=by_bucket,
        chunk_length=config.chunk_length,
        chunks_before=config.chunks_before if by_chunks else 0,
        chunks_after=config.chunks_after if by_chunks else 0,
        window_before=window_before,
        window_after=window_after,
        bucket_mask=by_bucket or not (config.attend_across_buckets or config.is_short(length)),
        causal=config.causal,
        exclude_self=shared_qk,
        correct_duplicates=config.correct_duplicates,
        ring=config.ring == "rounds" and by_chunks and not config.is_short(length),
        key_norm=KEY_NORMS.index(config.key_norm),
    )


def cross_attention_rule(config: LSHConfig, key_length: int) -> AttentionRule:
    """The rule of `config` for queries and keys that are sorted apart: windows around cursors.

    Only whether the keys fit one window matters (`LSHConfig.sees_all_keys`), so one rule serves many lengths.
    """
    every, window = config.sees_all_keys(key_length), config.window_size
    if config.causal:
        window_before, window_after = window, 0
    elif every:
        window_before, window_after = window, window
    else:
        window_before, window_after = window // 2, window - window // 2
    return AttentionRule(
        rank_window=True,
        chunk_length=config.chunk_length,
        chunks_before=0,
        chunks_after=0,
        window_before=window_before,
        window_after=window_after,
        bucket_mask=config.window == "bucket" or not (every or config.attend_across_buckets),
        causal=config.causal,
        exclude_self=False,
        correct_duplicates=config.correct_duplicates,
        ring=False,
        key_norm=KEY_NORMS.index("none"),
    )


def is_padding(mask: Tensor) -> Tensor:
    """(B, keys) bool, True = padding, of a key padding mask that is bool or a float bias (-inf or NaN)."""
    return mask if mask.dtype == torch.bool else (mask == float("-inf")) | mask.isnan()
