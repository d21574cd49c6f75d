"""Poisons uninitialised memory: a result that reads it becomes NaN (floats) or absurd (integers)."""

from __future__ import annotations

import os

# Read when torch loads OpenMP: test processes share the cores, so waiting threads must not spin on them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils.deterministic

deterministic: Any = torch.utils.deterministic  # its attribute is hidden from type checkers

# Read when cuBLAS starts; deterministic algorithms need it on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its kin hand out NaN and the largest integers, as torch's deterministic mode does."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test starts from the same random state, in whatever order tests run."""
    torch.manual_seed(0)
