"""What LSH attention computes: every choice in which the paper and its implementations differ.

Sources: the paper (Kitaev, Kaiser, Levskaya, "Reformer: The Efficient Transformer", arXiv 2001.04451),
trax (the authors' code), Hugging Face transformers (`LSHSelfAttention`) and reformer_pytorch
(`LSHAttention`). `LSHConfig` names each choice, so that each of them can be reproduced.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Window = Literal["chunks", "bucket"]
Ring = Literal["none", "rounds"]
KeyNorm = Literal["none", "rms", "l2"]

# Read here, as torch.compile of older versions cannot trace get_args.
WINDOWS: tuple[Window, ...] = get_args(Window)
RINGS: tuple[Ring, ...] = get_args(Ring)
KEY_NORMS: tuple[KeyNorm, ...] = get_args(KeyNorm)

MAX_AUTOMATIC_FACTOR = 64
"""Automatic buckets are hashed in factors no wider than this, so that hashing stays O(L log L)."""

UNFACTORED_BUCKETS = 128
"""Up to this many automatic buckets are hashed in one factor."""

AUTOMATIC_ROTATION_WIDTH = 128
"""Columns of a rotation table for automatic buckets: four factors of 64, half a factor each."""

MAX_BUCKETS = 2**20
"""Largest product of bucket factors."""

MAX_HASHES = 64
MAX_RING_HASHES = 32
"""Most hash rounds, and most where duplicates are corrected on a ring, whose cost grows with their cube."""

MAX_CHUNK_LENGTH = 2**24
MAX_NEIGHBOURS = 2**16
"""Bounds that keep every product of configuration values far inside a 64-bit integer."""

MAX_SCALE = 2.0**127
"""Kernels multiply the scale by log2(e) in float32, where a larger one would be infinite."""


def automatic_factors(length: int, span: int) -> tuple[int, ...]:
    """Bucket factors for `length` tokens at two buckets for each `span` tokens (each factor even).

    n = 2 * max(1, length // span); above 128, n rounds down to a power of two and
    splits into the fewest factors of at most 64, as even as can be, larger factors first. From 2^24 on, it
    stays at four factors of 64, the most that the rotation table's columns serve.
    """
    n = 2 * max(1, length // span)
    if n <= UNFACTORED_BUCKETS:
        return (n,)
    widest = int(math.log2(MAX_AUTOMATIC_FACTOR))
    most_factors = 2 * AUTOMATIC_ROTATION_WIDTH // MAX_AUTOMATIC_FACTOR
    bits = min(n.bit_length() - 1, most_factors * widest)
    count = -(-bits // widest)
    small, larger = divmod(bits, count)
    return (2 ** (small + 1),) * larger + (2**small,) * (count - larger)


def check_factors(bucket_factors: Any) -> tuple[int, ...]:
    """`bucket_factors` as a tuple of even positive integers whose product is at most `MAX_BUCKETS`.

    A list or tuple of them, or one integer for one factor. Raises ValueError for anything else.
    """
    factors = tuple(bucket_factors) if isinstance(bucket_factors, (list, tuple)) else (bucket_factors,)
    if not factors or not all(_is_integer(f) and f > 0 and f % 2 == 0 for f in factors):
        raise ValueError(
            f"bucket_factors must be even positive integers, got {bucket_factors!r}; "
            "give one (64) or several (32, 32), or None in a configuration for automatic buckets"
        )
    if math.prod(factors) > MAX_BUCKETS:
        raise ValueError(
            f"bucket_factors may multiply to at most {MAX_BUCKETS} buckets, got {bucket_factors!r} "
            f"= {math.prod(factors)}; use fewer or smaller factors"
        )
    return factors


@dataclass(frozen=True)
class LSHConfig:
    """How LSH attention hashes, which keys a query sees, and how rounds merge.

    out_i = sum_j p_ij v_j, p_i = softmax over the keys j that i sees in any round of
    scale * q_i . k_j, where k_j is q_j normalised by `key_norm` (shared query-keys, section 2 of the paper).

    The default is the paper's rule (`LSHConfig.paper()`). Values are checked when the configuration is
    made; a wrong one raises ValueError that says what is accepted.

    Attributes:
        n_hashes: hash rounds R, 1 to 64, or to 32 where window is "chunks", ring "rounds" and
            correct_duplicates True. Each draws its own rotation; rounds merge by softmax over all rounds'
            logits (section 2, "Multi-round LSH attention"). On one CPU thread, a forward pass of one head of
            1,000 tokens with 64 rounds took 0.03 s by each preset; on a ring with duplicates corrected,
            32 rounds took 1.7 s (head dimension 64, float32, one run each).
        chunk_length: tokens of sorted order in a chunk, C. Any positive integer; a round's last chunk may
            be short.
        chunks_before, chunks_after: how many chunks before and after its own a query also sees. The
            paper looks one back.
        window: "chunks" (the paper): a query sees its chunk of the sorted order and its neighbours.
            "bucket": it sees the nearest keys of its own bucket, `bucket_window` before it if causal, else
            floor(w/2) before and ceil(w/2) after; then appending tokens changes no earlier output of a
            causal model (at equal factors and rotations). With "bucket", `chunks_before`,
            `chunks_after`, `attend_across_buckets` and `ring` have no effect on which keys are seen.
        bucket_window: w, in tokens, of window "bucket". None: chunk_length * (1 + chunks_before +
            chunks_after), as many keys as the same chunks hold.
        bucket_factors: numbers of buckets of the hash's factors, each even; ids are
            b0 + f0 * b1 + f0 * f1 * b2 ... An integer is one factor. None: automatic, from the length, see
            `automatic_factors` and `span`. The length is that of the padded rows, as one call has one number
            of buckets: give factors where a padded row must give what the row alone gives.
        causal: a query sees no key at a later position.
        attend_across_buckets: whether a query also sees keys of other buckets in its range. The paper
            masks them (Appendix A); the public implementations do not.
        correct_duplicates: a pair that several rounds meet counts once, so that the result is softmax over
            the union of the rounds' keys (Appendix A): in the first of those rounds, whose dropout it has. On
            a ring it counts in each of them, its weight divided by how often it is met. False: a pair met N
            times counts N times.
        ring: "none": a round's first chunk looks back at nothing, its last chunk ahead at nothing.
            "rounds": all rounds' chunks form a ring, as in the public implementations: a round's first chunk
            looks back at the previous round's last chunk, the first round's at the last round's.
        key_norm: "rms": k = q / sqrt(mean(q^2) + 1e-6) / sqrt(D) (trax, Hugging Face).
            "l2": k = q / max(|q|, 1e-12) (reformer_pytorch). "none": k = q.
        scale: the factor of the logits, in 0..2**127. None takes what goes with the keys, see
            `logit_scale`: 1 for shared query-keys with key_norm "rms" (trax, Hugging Face), else D ** -0.5
            (reformer_pytorch, and ordinary attention over keys of their own).
    """

    n_hashes: int = 4
    chunk_length: int = 64
    chunks_before: int = 1
    chunks_after: int = 0
    window: Window = "chunks"
    bucket_window: int | None = None
    bucket_factors: tuple[int, ...] | None = None
    causal: bool = False
    attend_across_buckets: bool = False
    correct_duplicates: bool = True
    ring: Ring = "none"
    key_norm: KeyNorm = "rms"
    scale: float | None = None

    def __post_init__(self) -> None:
        check_integer("n_hashes", self.n_hashes, 1, MAX_HASHES)
        if self.window == "chunks" and self.ring == "rounds" and self.correct_duplicates is True:
            self._check_ring_hashes()
        check_integer("chunk_length", self.chunk_length, 1, MAX_CHUNK_LENGTH)
        check_integer("chunks_before", self.chunks_before, 0, MAX_NEIGHBOURS)
        check_integer("chunks_after", self.chunks_after, 0, MAX_NEIGHBOURS)
        if self.bucket_window is not None:
            check_integer("bucket_window", self.bucket_window, 1, MAX_CHUNK_LENGTH, or_else="None")
        if self.bucket_factors is not None:
            object.__setattr__(self, "bucket_factors", check_factors(self.bucket_factors))
        for name in ("causal", "attend_across_buckets", "correct_duplicates"):
            check_flag(name, getattr(self, name))
        check_choice("window", self.window, WINDOWS)
        check_choice("ring", self.ring, RINGS)
        check_choice("key_norm", self.key_norm, KEY_NORMS)
        check_scale(self.scale)

    def _check_ring_hashes(self) -> None:
        if self.n_hashes > MAX_RING_HASHES:
            raise ValueError(
                f"n_hashes must be at most {MAX_RING_HASHES} where ring='rounds' and "
                f"correct_duplicates=True, as time grows with their cube, got {self.n_hashes}; use "
                "fewer rounds, ring='none' or correct_duplicates=False"
            )

    @classmethod
    def paper(cls, **overrides: Any) -> LSHConfig:
        """The paper's rule: buckets masked, duplicates corrected, no ring. Any field as a keyword."""
        return cls(**overrides)

    @classmethod
    def trax(cls, **overrides: Any) -> LSHConfig:
        """The rule of trax and of Hugging Face's `LSHSelfAttention`. Any field as a keyword.

        Buckets not masked, duplicates not corrected, one ring over all rounds' chunks.
        """
        preset = cls(attend_across_buckets=True, correct_duplicates=False, ring="rounds")
        return dataclasses.replace(preset, **overrides)

    @classmethod
    def lucidrains(cls, **overrides: Any) -> LSHConfig:
        """The rule of reformer_pytorch's `LSHAttention`. Any field as a keyword.

        As `trax()`, with keys of unit length and logits scaled by D ** -0.5.
        """
        return dataclasses.replace(cls.trax(key_norm="l2"), **overrides)

    @property
    def window_size(self) -> int:
        """w of window "bucket", in keys: `bucket_window`, else as many keys as the chunks would hold."""
        if self.bucket_window is not None:
            return self.bucket_window
        return self.chunk_length * (1 + self.chunks_before + self.chunks_after)

    @property
    def span(self) -> int:
        """Tokens for which automatic factors make two buckets.

        chunk_length for window "chunks" (a mean bucket is half a chunk), 2 * w for window "bucket"
        (a mean bucket is the window).
        """
        return self.chunk_length if self.window == "chunks" else 2 * self.window_size

    def is_short(self, length: int) -> bool:
        """Whether `length` tokens fit one chunk, so that they are neither hashed nor sorted.

        Never for window "bucket", where appending tokens must not change the rule.
        """
        return self.window == "chunks" and length <= self.chunk_length

    def rounds(self, length: int) -> int:
        """Rounds of a layout of `length` tokens: `n_hashes`, or 1 where `is_short`."""
        return 1 if self.is_short(length) else self.n_hashes

    def factors(self, length: int) -> tuple[int, ...]:
        """The bucket factors for `length` tokens: as given, else automatic."""
        if self.bucket_factors is not None:
            return self.bucket_factors
        return automatic_factors(length, self.span)

    def sees_all_keys(self, key_length: int) -> bool:
        """Whether keys that are sorted apart from the queries all fit one window, so that nothing is hashed.

        Never for window "bucket", where appending tokens must not change the rule.
        """
        return self.window == "chunks" and key_length <= self.window_size

    @property
    def cross_span(self) -> int:
        """Keys for which automatic factors make two buckets, where keys are sorted apart from the queries.

        A mean bucket then holds w keys if causal and w / 2 otherwise, where measured recall is best
        (`reformer-kernels recall`): half of a bucket that is as long as the window lies after a causal query.
        """
        return 2 * self.window_size if self.causal else self.window_size

    def logit_scale(self, head_dim: int, *, shared_qk: bool = True) -> float:
        """The factor of the logits: `scale`, or for None what goes with the keys.

        Shared query-keys normalised by "rms" carry head_dim ** -0.5 already, so their factor is 1.
        """
        if self.scale is not None:
            return float(self.scale)
        return 1.0 if shared_qk and self.key_norm == "rms" else float(head_dim) ** -0.5

    @property
    def rotation_width(self) -> int:
        """Columns of a rotation table: half the sum of the factors, 128 where they are automatic."""
        if self.bucket_factors is not None:
            return sum(self.bucket_factors) // 2
        return AUTOMATIC_ROTATION_WIDTH


def local_attention_config(
    chunk_length: int,
    chunks_before: int,
    chunks_after: int,
    *,
    causal: bool,
    ring: bool,
    scale: float | None = None,
) -> LSHConfig:
    """Local attention as a configuration: one round in order of position, see `local_attention`."""
    return LSHConfig(
        n_hashes=1,
        chunk_length=chunk_length,
        chunks_before=chunks_before,
        chunks_after=chunks_after,
        causal=causal,
        attend_across_buckets=True,
        correct_duplicates=False,
        ring="rounds" if ring else "none",
        key_norm="none",
        scale=scale,
    )


def check_integer(name: str, value: Any, low: int, high: int, *, or_else: str = "") -> None:
    """Raises ValueError unless `value` is an int (not a bool) in [low, high]."""
    if not _is_integer(value) or not low <= value <= high:
        accepted = f"an integer in {low}..{high}" + (f" or {or_else}" if or_else else "")
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raises ValueError unless `value` is True or False."""
    if value is not True and value is not False:
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_scale(scale: Any) -> None:
    """Raises ValueError unless `scale` is None or a number in 0..MAX_SCALE."""
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if scale is not None and not (number and 0 <= scale <= MAX_SCALE):
        raise ValueError(
            f"scale must be a finite number >= 0 and at most 2**127 (1.7e38), or None for head_dim ** -0.5, "
            f"got {scale!r}"
        )


def _is_integer(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)
