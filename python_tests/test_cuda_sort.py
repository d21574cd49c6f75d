"""The CUDA bucket sort without a GPU: its source, compiled for the host, against the reference.

python_tests/cuda_stand_in runs each block's threads in three orders between barriers, under the address and
undefined-behaviour sanitizers.
"""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from torch import Tensor

from python_tests.cuda_stand_in import SCHEDULES, SOURCE, Cases, StandIn, altered, write_cases
from python_tests.sort_cases import KINDS, distribution

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the stand-in's fibers need Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.skipif(not SOURCE.exists(), reason="needs the source tree"),
]

Problem = tuple[Tensor, int, int]

# Steps of 256 elements, digits of up to 9 values, segments in groups: more of everything in short segments.
SMALL = (
    ("kItems = 16;", "kItems = 2;"),
    ("kDigitBits = 12;", "kDigitBits = 3;"),
    ("kMaxTiles = 256;", "kMaxTiles = 20;"),
    ("kMaxBlocks = 2147483647;", "kMaxBlocks = 60;"),
)
ALWAYS_WIDE = ("bits - digit_bits + position_bits > 32", "true")
# Halves what there is to compile.
ONLY_WIDE = ("plan.wide ? run_passes<uint64_t>() : run_passes<uint32_t>()", "run_passes<uint64_t>()")


def problem(kind: str, segments: int, L: int, n: int, extra: int = 0) -> Problem:
    return distribution(kind, (segments, L), n), n, n + 1 + extra


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    source = SOURCE.read_text()
    small = altered(source, *SMALL)
    variants = {"as it is": source, "small": small, "small, wide words": altered(small, ALWAYS_WIDE)}
    folder = tmp_path_factory.mktemp("sanitized") / "program"
    return StandIn(folder, variants, "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def long_cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    torch.manual_seed(0)
    problems = [problem("uniform", *shape) for shape in ((0, 5, 3), (2, 0, 3), (1, 0, 5000), (7, 1, 1))]
    lengths = (1, 2, 33, 511, 512, 513, 2047, 2048, 2049, 4096, 6145)
    counts = (2, 3, 65, 513, 2047, 4096, 4097, 4098, 70000)
    for number in range(2 * len(KINDS) + 8):
        L, n = lengths[5 * number % len(lengths)], counts[number % len(counts)]
        problems.append(problem(KINDS[number % len(KINDS)], 1 + number % 2, L, n, number % 4))
    return write_cases(tmp_path_factory.mktemp("long") / "cases", problems)


@pytest.fixture(scope="module")
def short_cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    torch.manual_seed(0)
    problems = [problem("uniform", *shape) for shape in ((0, 5, 3), (2, 0, 3), (1, 0, 500), (70, 1, 1))]
    lengths, counts = (1, 255, 256, 257, 700, 1500), (2, 7, 8, 9, 10, 64, 65, 511, 513, 5000)
    for number in range(3 * len(KINDS)):
        L, n = lengths[5 * number % len(lengths)], counts[number % len(counts)]
        problems.append(problem(KINDS[number % len(KINDS)], 1 + number % 3, L, n, number % 4))
    return write_cases(tmp_path_factory.mktemp("short") / "cases", problems)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variant", ["as it is", "small", "small, wide words"])
def test_equals_reference(
    variant: str, schedule: str, sanitized: StandIn, long_cases: Cases, short_cases: Cases
) -> None:
    cases = long_cases if variant == "as it is" else short_cases
    assert sanitized.fault(variant, schedule, cases) is None
