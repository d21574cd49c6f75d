"""Every operator, called directly with empty sizes: it refuses clearly or returns, and ends no process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from bench.fuzz.calls import SIZES, attention_calls, operator_names, other_calls
from bench.fuzz.malformed import REFUSALS
from reformer_kernels import _native


def all_sizes() -> Iterator[dict[str, int]]:
    yield SIZES
    for name in SIZES:
        yield SIZES | {name: 0}
    yield SIZES | {"L": 0, "K": 0}
    yield dict.fromkeys(SIZES, 0)


def call_kernels_without_checks() -> None:
    """What a C++ caller may do: the kernels themselves refuse to divide by an empty size."""
    native = _native.extension()
    positive: dict[str, int] = dict.fromkeys(("B", "H", "L", "Lk", "D", "Dv", "R", "threads"), 1)
    rule = native.AttentionRule(chunk_length=4)
    for empty in ("L", "Lk", "R", "starts_size"):
        sizes = positive | {"starts_size": 2, empty: 0}
        parameters = native.AttentionParams(**sizes, rule=rule)
        assert native.attention_forward_workspace_bytes(parameters) == 0
        assert native.attention_backward_workspace_bytes(parameters) == 0
        for call in (
            lambda p=parameters: native.attention_forward(p),
            lambda p=parameters: native.attention_backward(p, native.AttentionGradients()),
        ):
            with pytest.raises(ValueError, match="attention needs at least one token"):
                call()


def main() -> None:
    if _native.unavailable_reason() is None:
        call_kernels_without_checks()
    called = set()
    for n in all_sizes():
        for calls in (attention_calls, other_calls):
            for name, arguments in calls(n):
                print(name, [list(x.shape) if isinstance(x, torch.Tensor) else x for x in arguments])
                sys.stdout.flush()
                called.add(name)
                try:
                    getattr(torch.ops.reformer_kernels, name)(*arguments)
                except REFUSALS as refusal:
                    print("  refused:", refusal)
    assert called == operator_names(), called ^ operator_names()
    print("finished")


@pytest.mark.parametrize(
    ("classes", "chunk_size", "message"),
    [(0, 4, "at least one class"), (5, 0, "chunk_size must be a positive number of rows, got 0")],
)
def test_operators_of_the_loss_say_what_is_empty(classes: int, chunk_size: int, message: str) -> None:
    operators, needs = torch.ops.reformer_kernels, [True, True, True]
    weight, target = torch.zeros(classes, 3), torch.zeros(2, dtype=torch.int64)
    loss = (torch.zeros(2, 3), weight, target, None, None, -100, 0.1, 0.0, chunk_size)
    with pytest.raises(ValueError, match=message):
        operators.linear_cross_entropy_sum(*loss, needs)
    with pytest.raises(ValueError, match=message):
        operators.linear_cross_entropy_rows(*loss)
    with pytest.raises(ValueError, match=message):
        operators.linear_cross_entropy_rows_backward(torch.zeros(2), *loss, needs)


def test_no_operator_ends_the_process_on_empty_sizes() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "python_tests.ops.test_empty"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, (run.returncode, run.stdout[-1000:], run.stderr[-2000:])
    assert run.stdout.endswith("finished\n")


if __name__ == "__main__":
    main()
