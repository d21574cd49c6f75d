"""The arguments of every attention operator: the one place that lists them.

The operators' schema, their checks, their fake kernels and their calls all derive from `Arguments`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from reformer_kernels._limits import MAX_HEAD_DIM
from reformer_kernels.config import KEY_NORMS, MAX_CHUNK_LENGTH, MAX_NEIGHBOURS, MAX_SCALE
from reformer_kernels.rule import AttentionRule

_MAX_WINDOW = 4 * MAX_CHUNK_LENGTH * MAX_NEIGHBOURS
_BOUNDS = {
    "chunk_length": (1, MAX_CHUNK_LENGTH),
    "chunks_before": (0, MAX_NEIGHBOURS),
    "chunks_after": (0, MAX_NEIGHBOURS),
    "window_before": (0, _MAX_WINDOW),
    "window_after": (0, _MAX_WINDOW),
    "key_norm": (0, len(KEY_NORMS) - 1),
}
"""What a rule may hold, far inside 64-bit integers when the kernels multiply."""


class Arguments(NamedTuple):
    """Attention of queries over sorted orders, as the operators take it.

    Attributes:
        q: (B, H, L, D). v: (B, H, L_k, D_v).
        k: (B, H, L_k, D), or None for shared query-keys, whose keys are q normalised by rule.key_norm.
        order, bucket_starts: (B, H, R, L) and (B, H, R, S) int32, the queries' `Layout`.
        key_bias: (B, L_k) float32 (float64 in the reference) that is added to the logits, -inf for padding.
        seed: an int64 tensor of one element, read where dropout_p is not 0.
        rule, scale, dropout_p: see `AttentionRule` and `AttentionCall`.
        key_order, key_bucket_starts: (B, H, R, L_k) and (B, H, R, S) int32, the keys' `Layout` where keys are
            sorted apart from the queries. Otherwise None, and L_k = L.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor
    order: Tensor
    bucket_starts: Tensor
    key_bias: Tensor | None
    seed: Tensor | None
    rule: AttentionRule
    scale: float
    dropout_p: float
    key_order: Tensor | None = None
    key_bucket_starts: Tensor | None = None

    @classmethod
    def of(cls, *flat: Any) -> Arguments:
        """The arguments as an operator receives them, where the rule has become a list of integers."""
        place = cls._fields.index("rule")
        rule = flat[place]
        if len(rule) != len(AttentionRule._fields):
            raise ValueError(
                f"rule must be an AttentionRule, {len(AttentionRule._fields)} integers, got {rule}"
            )
        values: list[Any] = list(flat)
        values[place] = AttentionRule(*rule)
        return cls(*values)

    @property
    def separate(self) -> bool:
        """Whether keys are sorted apart from the queries."""
        return self.key_order is not None

    def with_contiguous_rows(self) -> Arguments:
        """The same values as kernels read them: contiguous rows, the rest contiguous throughout."""
        return Arguments(
            contiguous_rows(self.q),
            None if self.k is None else contiguous_rows(self.k),
            contiguous_rows(self.v),
            self.order.contiguous(),
            self.bucket_starts.contiguous(),
            None if self.key_bias is None else self.key_bias.contiguous(),
            self.seed,
            self.rule,
            self.scale,
            self.dropout_p,
            None if self.key_order is None else self.key_order.contiguous(),
            None if self.key_bucket_starts is None else self.key_bucket_starts.contiguous(),
        )

    def check(self) -> None:
        """Raises ValueError or TypeError unless all that decides which addresses a kernel uses holds.

        The public functions check the same for people; this is for whoever calls an operator directly.
        """
        for name in ("q", "v", "order", "bucket_starts"):
            x = getattr(self, name)
            if x.dim() != 4:
                raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(x.shape)}")
        for name in ("q", "v"):
            width = getattr(self, name).size(-1)
            if not 1 <= width <= MAX_HEAD_DIM:
                raise ValueError(f"{name}'s last dimension must be in 1..{MAX_HEAD_DIM}, got {width}")
        if self.q.size(2) < 1 or self.v.size(2) < 1:
            raise ValueError(
                f"q and v must have at least one token, got shapes {tuple(self.q.shape)} and "
                f"{tuple(self.v.shape)}"
            )
        if self.order.size(2) < 1 or self.bucket_starts.size(3) < 2:
            raise ValueError(
                "order must have at least one round, and bucket_starts at least two entries, got shapes "
                f"{tuple(self.order.shape)} and {tuple(self.bucket_starts.shape)}"
            )
        if self.separate != (self.key_bucket_starts is not None) or (self.separate and self.k is None):
            raise ValueError("key_order, key_bucket_starts and k come together where keys are sorted apart")
        for name, (low, high) in _BOUNDS.items():
            if not low <= getattr(self.rule, name) <= high:
                raise ValueError(f"rule.{name} must be in {low}..{high}, got {getattr(self.rule, name)}")
        if self.separate and (not self.rule.rank_window or self.rule.ring or self.rule.exclude_self):
            raise ValueError(
                "a rule for keys sorted apart must have rank_window, no ring and no exclude_self, "
                f"got {self.rule}"
            )
        if not abs(self.scale) <= MAX_SCALE or not 0 <= self.dropout_p < 1:
            raise ValueError(
                f"scale must be finite, within +-2**127, and dropout_p in [0, 1), got scale {self.scale} and "
                f"dropout_p {self.dropout_p}"
            )
        if self.dropout_p > 0 and (
            self.seed is None or self.seed.dtype != torch.int64 or self.seed.numel() != 1
        ):
            raise ValueError("dropout needs a seed, an int64 tensor of one element")

    def expected(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and dtype that each tensor must have, given q's, for arguments that passed `check`."""
        batch, heads, length, dim = self.q.shape
        keys = self.v.size(2) if self.separate else length
        rounds, starts = self.order.size(2), self.bucket_starts.size(3)
        return {
            "q": ((batch, heads, length, dim), self.q.dtype),
            "k": ((batch, heads, keys, dim), self.q.dtype),
            "v": ((batch, heads, keys, self.v.size(3)), self.q.dtype),
            "order": ((batch, heads, rounds, length), torch.int32),
            "bucket_starts": ((batch, heads, rounds, starts), torch.int32),
            "key_bias": ((batch, keys), torch.float32),
            "key_order": ((batch, heads, rounds, keys), torch.int32),
            "key_bucket_starts": ((batch, heads, rounds, starts), torch.int32),
        }

    def empty_out(self) -> Tensor:
        """Uninitialised memory for the result (B, H, L, D_v), laid out as v is, its rows contiguous."""
        if not self.separate:
            return empty_rows_like(self.v)
        batch, heads, length = self.q.shape[:3]
        if self.v.stride(1) < self.v.stride(2):  # heads lie inside rows
            return self.v.new_empty((batch, length, heads, self.v.size(3))).transpose(1, 2)
        return self.v.new_empty((batch, heads, length, self.v.size(3)))

    def empty_lse(self) -> Tensor:
        """Uninitialised memory for the log-sum-exp (B, H, L), float32."""
        return torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device)

    def empty_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Uninitialised memory for the gradients of q, k and v; k's is empty for shared query-keys."""
        grad_k = self.q.new_empty(0) if self.k is None else empty_rows_like(self.k)
        return empty_rows_like(self.q), grad_k, empty_rows_like(self.v)


_SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", AttentionRule: "int[]", float: "float"}

SCHEMA = ", ".join(
    f"{_SCHEMA_TYPES[kind]} {name}" + ("=None" if name in Arguments._field_defaults else "")
    for name, kind in get_type_hints(Arguments).items()
)
"""The arguments in the language of torch's operator schemas."""


def contiguous_rows(x: Tensor) -> Tensor:
    """`x` itself where its rows are contiguous, whatever its other strides."""
    return x if x.size(-1) == 1 or x.stride(-1) == 1 else x.contiguous()


def empty_rows_like(x: Tensor) -> Tensor:
    """Uninitialised memory laid out as `x` is, its rows contiguous in any case.

    A transposed view of a projection's output so gets a result that transposes back for free.
    """
    result = torch.empty_like(x)
    if result.stride(-1) == 1 or result.size(-1) == 1:
        return result
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
