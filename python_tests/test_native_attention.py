"""The native attention against the reference: random problems, low precision, hostile values and layouts."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from reformer_kernels import Layout, LSHConfig
from reformer_kernels import functional as F

from .attention_cases import (
    EXAMPLES,
    NATIVE_DTYPES,
    SELF_ONLY,
    STRIDES,
    Case,
    assert_agree,
    cases,
    dense,
    errors,
    exact,
    native,
    pair_counts,
    rule_of,
    solve,
)
from .helpers import (
    TOLERANCE,
    assert_close,
    gradients,
    layout_from_buckets,
    normal,
    padding_mask,
    qkv,
    random_layout,
)
from .native_tools import isa, runnable_isas

ISAS = runnable_isas()

property_test = settings(
    deadline=None,
    derandomize=EXAMPLES == 1,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def check(case: Case) -> None:
    """Within 1e-4 of float64; where terms cancel, within four times what the reference loses in float32."""
    expected = solve(case, exact, case.inputs(torch.float64))
    found = errors(solve(case, native, case.inputs(torch.float32)), expected)
    if max(found.values()) > TOLERANCE[torch.float32]:
        allowed = errors(solve(case, exact, case.inputs(torch.float32)), expected)
        worse = {n: (e, allowed[n]) for n, e in found.items() if e > max(1e-4, 4 * allowed[n])}
        assert not worse, f"error, and the reference's in float32: {worse}"


@settings(property_test, max_examples=250 * EXAMPLES)
@given(case=cases())
def test_equals_reference(case: Case) -> None:
    check(case)
