"""Helpers shared by the tests of native operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from reformer_kernels import _native


def runnable_isas() -> list[str]:
    """The compiled instruction sets that this machine can run, the active one last."""
    if _native.unavailable_reason() is not None:
        return []
    native = _native.extension()
    before = native.active_isa()
    names = [name for name in native.compiled_isas().split() if native.select_isa(name)]
    native.select_isa(before)
    return names


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Makes native kernels use the instruction set `name` inside the block."""
    native = _native.extension()
    before = native.active_isa()
    assert native.select_isa(name)
    try:
        yield
    finally:
        native.select_isa(before)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Makes torch.empty() fill its memory with NaN or the largest integer, so that unwritten entries show."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
