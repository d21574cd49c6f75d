"""The CUDA bucket sort without a GPU: its source, compiled for the host, against the reference.

`cuda_stand_in` runs each block's threads in three orders between barriers, under the address and
undefined-behaviour sanitizers, and once as real threads under the thread sanitizer. Broken copies of the
kernel show that these checks can fail.
"""

from __future__ import annotations

import copy
import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from python_tests.csrc.test_build import BUILD, output_of
from python_tests.ops.sort.cases import KINDS, distribution
from python_tests.ops.sort.cuda_stand_in import (
    SCHEDULES,
    SOURCE,
    Cases,
    StandIn,
    altered,
    without,
    write_cases,
)
from reformer_kernels import _native
from reformer_kernels._backend import resolve_backend, resolve_sort_backend
from reformer_kernels.gpu import machine_code
from reformer_kernels.ops.sort import native as native_sort

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the stand-in's fibers need Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.skipif(not SOURCE.exists(), reason="needs the source tree"),
]

Problem = tuple[Tensor, int, int]

# Steps of 256 elements, digits of up to 129 values, few tiles: short cases reach every loop.
SMALL = (
    ("kItems = 16;", "kItems = 2;"),
    ("kDigitBits = 12;", "kDigitBits = 7;"),
    ("kPlaceThreads = 512;", "kPlaceThreads = 64;"),
    ("kBatch = 8;", "kBatch = 2;"),
    ("kMaxTiles = 256;", "kMaxTiles = 5;"),
    ("kEnoughBlocks = 1024;", "kEnoughBlocks = 5;"),
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
    problems.append(problem("one huge bucket", 1, 20000, 3))
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
    lengths, counts = (1, 255, 256, 257, 700, 2500), (2, 7, 64, 65, 128, 129, 130, 513, 5000, 20000)
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


def test_the_most_buckets(sanitized: StandIn, tmp_path: Path) -> None:
    """2^20 and one for padding; and more tiles than place_tiles has loads in flight."""
    cases = write_cases(
        tmp_path / "cases", [problem("uniform", 1, 5000, 2**20 + 1), problem("equal", 1, 40000, 2)]
    )
    assert sanitized.fault("as it is", "shuffled", cases) is None


def test_real_threads(tmp_path: Path) -> None:
    """The thread sanitizer sees no race, and sees that of a missing barrier between lanes of a warp."""
    torch.manual_seed(0)
    source = altered(SOURCE.read_text(), *SMALL, ALWAYS_WIDE, ONLY_WIDE)
    racing = {
        f"without barrier {n}": without(source, WARP_BARRIER, n) for n in range(source.count(WARP_BARRIER))
    }
    assert len(racing) == 2
    program = StandIn(tmp_path / "program", {"": source, **racing}, "-fsanitize=thread", "-DSTAND_IN_THREADS")
    problems = [
        problem("uniform", 2, 1400, 7, 2),
        problem("uniform", 1, 700, 200),
        problem("equal", 1, 300, 129),
    ]
    cases = write_cases(tmp_path / "cases", problems)
    assert program.fault("", "in order", cases) is None
    for name in racing:
        assert "data race" in (program.fault(name, "in order", cases) or ""), name


BARRIER, WARP_BARRIER = "__syncthreads();", "__syncwarp();"
# What could go wrong in the kernel, and the change that makes it so.
FAULTS = {
    "a rank counts its own lane": (
        "met + __popc(peers & lanes_below)",
        "met + __popc(peers & (2 * lanes_below + 1))",
    ),
    "a rank forgets what the warp met before": ("ranks[item] = met + ", "ranks[item] = "),
    "a rank counts from above": ("(1u << lane) - 1;", "~((2u << lane) - 1);"),
    "a counter counts lanes as one": ("(met + __popc(peers))", "(met + 1)"),
    "elements of a warp in reverse": ("<uint32_t>(item) * kLanes", "<uint32_t>(kItems - 1 - item) * kLanes"),
    "warps in reverse": (
        "int other = kWarps - 1; other >= 0; --other",
        "int other = 0; other < kWarps; ++other",
    ),
    "counters of the step before": ("counters[i] = 0;", ";"),
    "every step to the same places": ("next[digit] += from_here;", ""),
    "an inclusive scan": ("int32_t before = through - mine;", "int32_t before = through;"),
    "a scan without the other warps": ("before += other < warp ? sums[other] : 0;", "before += 0;"),
    "a scan of half a warp": ("distance < kLanes;", "distance < kLanes / 2;"),
    "a scan that forgets its first rounds": ("done += all;", "done = all;"),
    "places that forget the tile before": ("place += here[i];", "place = here[i];"),
    "a tile one too long": ("first + pass.tile_length;", "first + pass.tile_length + 1;"),
    "a tile one too short": ("first + pass.tile_length;", "first + pass.tile_length - 1;"),
    "a last tile beyond the segment": ("end < pass.L ? end : pass.L", "end"),
    "no short last tile": ("p.L > 0 ? ceil_divide(p.L, tile_length) : 1", "p.L / tile_length + (p.L == 0)"),
    "no clamp below": ("id < 0 ? 0 : ", ""),
    "no clamp above": (": id > last ? last : id", ": id"),
    "starts that end early": ("= static_cast<int32_t>(pass.L);", "= static_cast<int32_t>(pass.L - 1);"),
    "starts one off": ("< bucket;", "<= bucket;"),
    "digits that overlap": ("(key >> digit_bits)", "(key >> (digit_bits - 1))"),
    "words over the words they come from": ("pass % 2 ? plan", "pass % 1 ? plan"),
    "one segment's counts for the next": (
        "{blockIdx.x} * pass.tiles * pass.radix;",
        "{blockIdx.x} * pass.radix;",
    ),
    "one group's order over another's": ("p.order + first * p.L", "p.order"),
    "a workspace too small": ("group * tiles * max_radix", "group * tiles"),
}


def test_faults_are_found(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = altered(SOURCE.read_text(), *SMALL, ALWAYS_WIDE, ONLY_WIDE)
    broken = {name: altered(source, change) for name, change in FAULTS.items()}
    for n in range(source.count(BARRIER)):
        broken[f"without barrier {n}"] = without(source, BARRIER, n)
    broken["without a warp's first barrier"] = without(source, WARP_BARRIER, 0)
    program = StandIn(tmp_path / "program", {"": source, **broken}, "-O0", "-w")
    problems = [
        problem("uniform", 70, 1, 2),
        problem("uniform", 3, 700, 6, 2),
        problem("out of range", 2, 1500, 9),
        problem("sorted", 2, 600, 600, 1),
        problem("reversed", 2, 2500, 129, 1),
        problem("uniform", 3, 1300, 5000),
        problem("uniform", 1, 600, 20000),
    ]
    cases = write_cases(tmp_path / "cases", problems)
    for schedule in SCHEDULES:
        assert program.fault("", schedule, cases) is None
    # A generator: the schedules after the first that finds the fault are not run.
    found = {name: any(program.fault(name, s, cases, timeout=30) for s in SCHEDULES) for name in broken}
    assert [name for name in broken if not found[name]] == []


def test_machine_code_does_not_spill() -> None:
    """Of the object that the ordinary build made, for each of its architectures."""
    cuda = _native.info()["cuda"]
    objects = sorted(BUILD.glob("CMakeFiles/kernels_cuda.dir/**/bucket_sort.cu.o"))
    if not cuda["built"] or not objects:
        pytest.skip(f"no CUDA object of the sort: {cuda['reason'] or 'no build tree'}")
    disassembler = machine_code.disassembler()
    usage, assembly = (
        output_of(str(disassembler), option, str(objects[0])) for option in ("-res-usage", "-sass")
    )
    architectures = re.findall(r"Fatbin elf code:\n=+\narch = sm_(\d+)", usage)
    assert architectures == re.findall(r"(\d+)-real", cuda["architectures"])
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(kernels) == 11 * len(architectures)
    for name, registers, stack, local in kernels:
        assert (stack, local) == ("0", "0"), name
        # 3 blocks of 128 threads fit on a multiprocessor, whose registers are 65536.
        assert int(registers) <= 168, name
    assert not re.findall(r"\b(?:LDL|STL)\b", assembly)
    assert assembly.count("MATCH.ANY") >= 6 * 16 * len(architectures)


# The operator's way to the kernel


def test_operator_prepares_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that only claim to be on a GPU: what the kernel is given, in which stream and device."""
    calls: list[tuple[str, Any]] = []

    def workspace_bytes(params: SimpleNamespace) -> int:
        calls.append(("size", copy.copy(params)))
        return 768

    kernels = SimpleNamespace(
        SortParams=SimpleNamespace,
        cuda_bucket_sort_workspace_bytes=workspace_bytes,
        cuda_bucket_sort=lambda params: calls.append(("sort", params)),
    )

    def pointer(tensor: Tensor, name: str, *, shape: Any, dtypes: Any, device: torch.device) -> str:
        assert tuple(tensor.shape) == tuple(shape) and tensor.dtype in dtypes and tensor.device == device
        assert tensor.is_contiguous()
        return name

    monkeypatch.setattr(_native, "CUDA_MISSING", None)
    monkeypatch.setattr(_native, "extension", lambda: kernels)
    monkeypatch.setattr(_native, "pointer", pointer)
    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77 + device.index)
    )
    with FakeTensorMode():
        ids = torch.empty((2, 3, 40), dtype=torch.int32, device="cuda:1")
        order, starts = native_sort.bucket_sort(ids, 9, 12)
    assert order.shape == (2, 3, 40) and starts.shape == (2, 3, 12)
    assert order.device == starts.device == torch.device("cuda:1")
    assert entered == [torch.device("cuda:1")]
    assert [name for name, _ in calls] == ["size", "sort"]
    given = {"segments": 6, "L": 40, "n_buckets": 9, "starts_size": 12}
    given |= {"buckets": "buckets", "order": "order", "starts": "starts"}
    assert vars(calls[0][1]) == given
    assert vars(calls[1][1]) == {**given, "workspace": "workspace", "device": 1, "stream": 78}

    monkeypatch.setattr(_native, "CUDA_MISSING", "it was built without")
    with (
        FakeTensorMode(),
        pytest.raises(RuntimeError, match="cannot take CUDA tensors: it was built without"),
    ):
        native_sort.bucket_sort(torch.empty((2, 40), dtype=torch.int32, device="cuda:1"), 9, 12)


@pytest.mark.skipif(_native.CUDA_MISSING is not None, reason=f"no CUDA kernels: {_native.CUDA_MISSING}")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_errors_of_cuda_are_raised() -> None:
    native = _native.extension()
    params = native.SortParams(segments=1, L=1, n_buckets=1, starts_size=2)
    with pytest.raises(RuntimeError, match=r"^CUDA: "):
        native.cuda_bucket_sort(params)
    params.segments = 0
    native.cuda_bucket_sort(params)
    assert native.cuda_bucket_sort_workspace_bytes(params) == 0


def test_workspace_grows_with_the_problem() -> None:
    if _native.CUDA_MISSING is not None:
        pytest.skip(f"no CUDA kernels: {_native.CUDA_MISSING}")
    native = _native.extension()

    def size(segments: int, L: int, n: int) -> int:
        params = native.SortParams(segments=segments, L=L, n_buckets=n, starts_size=n + 1)
        return native.cuda_bucket_sort_workspace_bytes(params)

    # Counts of one pass, a byte an id or less; two passes hold a word for each element beside them.
    assert 0 < size(32, 16384, 513) <= 32 * 16384 * 4 / 3
    assert size(4096, 16384, 513) <= 4096 * 16384 * 4 / 12
    assert 4 <= size(8, 2**20, 32769) / (8 * 2**20) <= 4.5
    assert 8 <= size(8, 2**22, 2**20 + 1) / (8 * 2**22) <= 8.5
    # Beyond 2^32 bytes, and 2^31 elements.
    assert size(2**15, 2**20, 32769) > 4 * 2**35
    assert size(1, 2**31 - 2, 2**31 - 2) > 16 * (2**31 - 2)


@pytest.mark.parametrize("missing", [None, "it was built without"])
def test_which_sort_a_cuda_tensor_gets(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "CUDA_MISSING", missing)
    gpu, cpu = torch.device("cuda:1"), torch.device("cpu")
    assert resolve_sort_backend("auto", gpu) == ("native" if missing is None else "triton")
    assert resolve_sort_backend("reference", gpu) == "reference"
    assert resolve_sort_backend("auto", cpu) == resolve_sort_backend("native", cpu) == "native"
    if missing is None:
        assert resolve_sort_backend("native", gpu) == "native"
    else:
        with pytest.raises(
            RuntimeError, match=r"cannot sort CUDA tensors: it was built without; use 'auto' or 'triton'"
        ):
            resolve_sort_backend("native", gpu)
    with pytest.raises(RuntimeError, match="bucket_sort is the one function with a native kernel"):
        resolve_backend("native", gpu, torch.float32)
    with pytest.raises(ValueError, match="backend must be one of"):
        resolve_sort_backend("cuda", gpu)
