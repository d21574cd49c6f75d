"""What is fuzzed: each target draws cases and checks them, and names what it covers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis.strategies import SearchStrategy

from bench.fuzz import attention, chunked, determinism, hashing, malformed, problems
from bench.fuzz.calls import operator_names
from reformer_kernels import functional


@dataclass(frozen=True)
class Target:
    """One function, operator or property: `check` raises unless a case of `cases` passes.

    `covers` are the public functions and operators that it calls, the latter's gradients included.
    """

    name: str
    cases: SearchStrategy[Any]
    check: Callable[[Any], None]
    covers: tuple[str, ...]

    @property
    def interpreted(self) -> bool:
        """Whether it runs Triton kernels, on the CPU in Triton's interpreter."""
        return self.name.startswith("triton") or self.name == "malformed_operators"


def _attention(name: str) -> tuple[str, str]:
    return name, f"{name}_backward"


_LOSS = ("sum", "rows", "rows_backward", "scale")

TARGETS = {
    target.name: target
    for target in (
        *(
            Target(name, problems.functions(name), attention.check_function, (name,))
            for name in ("attend", "lsh_attention", "lsh_cross_attention", "local_attention")
        ),
        Target(
            "sliding_window_attention", problems.bands(), attention.check_band, ("sliding_window_attention",)
        ),
        Target("lsh_hash", hashing.hashes("lsh_hash"), hashing.check_hash, ("lsh_hash",)),
        Target("bucket_sort", hashing.sorts("bucket_sort"), hashing.check_sort, ("bucket_sort",)),
        Target("lsh_layout", hashing.places(False), hashing.check_places, ("lsh_layout",)),
        Target("lsh_cross_layout", hashing.places(True), hashing.check_places, ("lsh_cross_layout",)),
        Target(
            "chunked_feed_forward",
            chunked.feed_forwards(False),
            chunked.check_feed_forward,
            ("chunked_feed_forward",),
        ),
        Target("linear_cross_entropy", chunked.losses(False), chunked.check_loss, ("linear_cross_entropy",)),
        *(
            Target(name, problems.operators(name), attention.check_operator, _attention(name))
            for name in ("native_attention", "triton_attention")
        ),
        *(
            Target(name, hashing.hashes(name), hashing.check_hash, (name,))
            for name in ("native_lsh_hash", "triton_lsh_hash")
        ),
        *(
            Target(name, hashing.sorts(name), hashing.check_sort, (name,))
            for name in ("native_bucket_sort", "triton_bucket_sort")
        ),
        *(
            Target(name, hashing.residuals(name), hashing.check_residual, (name,))
            for name in ("native_residual_step", "triton_residual_step")
        ),
        *(
            Target(name, hashing.rotations(name), hashing.check_rotations, (name,))
            for name in ("sample_rotations", "native_sample_rotations", "triton_sample_rotations")
        ),
        Target(
            "operator_chunked_feed_forward",
            chunked.feed_forwards(True),
            chunked.check_feed_forward,
            ("operator chunked_feed_forward", "chunked_feed_forward_backward"),
        ),
        Target(
            "operator_linear_cross_entropy",
            chunked.losses(True),
            chunked.check_loss,
            tuple(f"linear_cross_entropy_{part}" for part in _LOSS),
        ),
        Target("malformed_functions", malformed.malformed(False), malformed.check_malformed, ()),
        Target("malformed_operators", malformed.malformed(True), malformed.check_malformed, ()),
        Target("determinism", determinism.repeated(), determinism.check_repeated, ()),
    )
}


def not_covered() -> set[str]:
    """Public functions and operators that no target calls."""
    covered = {name for target in TARGETS.values() for name in target.covers}
    functions = set(functional.__all__)
    operators = {f"operator {name}" if name in functions else name for name in operator_names()}
    return (functions | operators) - covered
