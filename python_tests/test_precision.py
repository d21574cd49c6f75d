from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from reformer_kernels._precision import tf32_allowed

MATMUL: Any = torch.backends.cuda.matmul
NEWER = hasattr(MATMUL, "fp32_precision")


def older(allowed: bool) -> None:
    MATMUL.allow_tf32 = allowed


def newer(precision: str) -> None:
    MATMUL.fp32_precision = precision


def everywhere(precision: str) -> None:
    torch.backends.fp32_precision = precision


@pytest.fixture(autouse=True)
def switches_put_back() -> Iterator[None]:
    yield
    if NEWER:
        everywhere("none")
    torch.set_float32_matmul_precision("highest")
    if NEWER:
        newer("none")


@pytest.mark.parametrize(
    ("switches", "allowed"),
    [
        ([], False),
        ([lambda: older(True)], True),
        ([lambda: torch.set_float32_matmul_precision("high")], True),
        ([lambda: older(True), lambda: older(False)], False),
    ],
)
def test_older_switches(switches: list[Callable[[], None]], allowed: bool) -> None:
    for switch in switches:
        switch()
    assert tf32_allowed() is allowed


@pytest.mark.skipif(not NEWER, reason="this torch has only the older switches")
@pytest.mark.parametrize(
    ("switches", "allowed"),
    [
        ([lambda: newer("tf32")], True),
        ([lambda: everywhere("tf32")], True),
        ([lambda: older(False), lambda: newer("tf32")], True),
        ([lambda: older(True), lambda: newer("ieee")], False),
    ],
)
def test_newer_switches_do_not_raise(switches: list[Callable[[], None]], allowed: bool) -> None:
    """Reading `allow_tf32` raises where both kinds were set."""
    for switch in switches:
        switch()
    assert tf32_allowed() is allowed
