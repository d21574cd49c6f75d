"""Native kernels in a Python process: pointers, forked processes, threads and instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from python_tests.native_tools import isa, runnable_isas, torch_threads
from reformer_kernels import _native

FLOAT = (torch.float32,)
COMPILED = _native.info()["compiled_isas"]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_info() -> None:
    info = _native.info()
    assert info["available"], info["reason"]
    assert info["isa"] in info["compiled_isas"]
    assert info["compiled_isas"][0] == "portable"
    assert info["cuda"]["built"] or info["cuda"]["reason"]


def test_pointer_checks() -> None:
    x = torch.zeros(2, 3, 4, 5)
    assert _native.pointer(x, "x", shape=(2, 3, 4, 5), dtypes=FLOAT) == x.data_ptr()
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got list"):
        _native.pointer([1.0], "x", shape=(1,), dtypes=FLOAT)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x must be torch.float32, got torch.int32"):
        _native.pointer(x.int(), "x", shape=x.shape, dtypes=FLOAT)
    with pytest.raises(ValueError, match=r"x must have shape \(2, 3, 4, 6\), got \(2, 3, 4, 5\)"):
        _native.pointer(x, "x", shape=(2, 3, 4, 6), dtypes=FLOAT)
    with pytest.raises(ValueError, match="contiguous"):
        _native.pointer(x.transpose(1, 2), "x", shape=(2, 4, 3, 5), dtypes=FLOAT)
    with pytest.raises(ValueError, match=r"on the CPU .* got device meta"):
        _native.pointer(x.to("meta"), "x", shape=x.shape, dtypes=FLOAT)
    with pytest.raises(TypeError, match="dense"):
        _native.pointer(x.to_sparse(), "x", shape=x.shape, dtypes=FLOAT)
    rows = _native.rows(x.transpose(1, 2), "x", shape=(2, 4, 3, 5), dtypes=FLOAT)
    assert (rows.batch_stride, rows.head_stride, rows.row_stride) == (60, 5, 20)
    with pytest.raises(ValueError, match="last dimension must be contiguous"):
        _native.rows(x.transpose(2, 3), "x", shape=(2, 3, 5, 4), dtypes=FLOAT)
    _native.rows(torch.zeros(2, 3, 1, 4).transpose(2, 3), "x", shape=(2, 3, 4, 1), dtypes=FLOAT)


def test_tensors_whose_values_are_not_in_memory_as_they_read() -> None:
    """The values of a negative view differ from its memory, which is what a kernel would read.

    For float dtypes the negative bit is the only such laziness in torch.
    """
    x = torch.imag(torch.complex(torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 2, 3)).conj())
    assert x.is_neg()
    with pytest.raises(ValueError, match="resolve_neg"):
        _native.pointer(x, "x", shape=x.shape, dtypes=FLOAT, rows=True)


def test_unknown_field_of_a_parameter_struct_raises() -> None:
    with pytest.raises(AttributeError):
        _native.extension().SortParams(segmnets=1)


def test_select_isa() -> None:
    native = _native.extension()
    best = native.active_isa()
    assert not native.select_isa("sse9")
    assert native.active_isa() == best
    for name in runnable_isas():
        with isa(name):
            assert native.active_isa() == name
    assert native.select_isa("")
    assert native.active_isa() == best


AVX512: dict[str, bool] = {"avx2": True, "avx512": True}


@pytest.mark.skipif("avx512bf16" not in COMPILED, reason="the compiler had no AVX512-BF16 for this build")
@pytest.mark.parametrize(
    ("vendor", "features", "name", "reason"),
    [
        ("GenuineIntel", {}, "portable", "lacks AVX2"),
        ("GenuineIntel", {"avx2": True}, "avx2", "lacks AVX-512"),
        ("AuthenticAMD", {"avx512": True}, "portable", "lacks AVX2"),
        ("GenuineIntel", AVX512, "avx512", "lacks AVX512-BF16"),
        ("GenuineIntel", {**AVX512, "avx512bf16": True}, "avx512", "on Intel's CPUs AVX512-BF16 is slower"),
        ("AuthenticAMD", {**AVX512, "avx512bf16": True}, "avx512bf16", "the fastest"),
        ("CentaurHauls", {**AVX512, "avx512bf16": True}, "avx512", "on AMD's CPUs only"),
    ],
)
def test_best_isa_of_a_cpu(vendor: str, features: dict[str, bool], name: str, reason: str) -> None:
    best, why = _native.extension().best_isa(vendor, **features)
    assert best == name
    assert reason in why


def test_reason_of_the_active_isa() -> None:
    native = _native.extension()
    with isa("portable"):
        assert _native.info()["isa_reason"] == "asked for by name"
        assert native.select_isa("")
        assert _native.info()["isa_reason"] not in ("", "asked for by name")


def test_isa_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    native = _native.extension()
    with isa(native.active_isa()):
        monkeypatch.setenv("REFORMER_ISA", "portable")
        assert _native._load() is native
        assert native.active_isa() == "portable"
        monkeypatch.setenv("REFORMER_ISA", "sse9")
        reason = _native._load()
        assert isinstance(reason, str)
        assert "REFORMER_ISA=sse9 is not available" in reason


def test_forked_child_runs_alone() -> None:
    """A forked child has none of its parent's OpenMP threads, so it must not wait for them."""
    result = run_python(
        """
        import os, signal, torch
        from reformer_kernels import _native
        import reformer_kernels.ops.hash.op, reformer_kernels.ops.sort.op
        torch.set_num_threads(3)
        ops = torch.ops.reformer_kernels
        x, rotations = torch.randn(2, 2, 500, 16), torch.randn(2, 16, 2, 16)
        ids = ops.native_lsh_hash(x, rotations, [32], 0, None)
        order = ops.native_bucket_sort(ids, 32, 33)[0]
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            torch_threads = torch.get_num_threads()
            same = torch.equal(ops.native_lsh_hash(x, rotations, [32], 0, None), ids)
            same = same and torch.equal(ops.native_bucket_sort(ids, 32, 33)[0], order)
            os._exit(0 if same and _native.threads() == 1 else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert _native.threads() == 3
        """
    )
    assert result.returncode == 0, result.stderr


class _Hashes(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        x = torch.full((1, 1, 64, 8), float(i)) + torch.arange(8)
        ids = torch.ops.reformer_kernels.native_lsh_hash(x, torch.eye(8).reshape(1, 8, 1, 8), [16], 0, None)
        return torch.ops.reformer_kernels.native_bucket_sort(ids, 16, 17)[0]


def test_dataloader_workers() -> None:
    with torch_threads(2):
        here = [_Hashes()[i] for i in range(4)]
        for got, expected in zip(DataLoader(_Hashes(), num_workers=2, batch_size=None), here, strict=True):
            assert torch.equal(got, expected)


def test_several_python_threads_at_once() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 400 + i, 16) for i in range(12)]
    rotations = torch.randn(2, 16, 2, 32)

    def work(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.ops.reformer_kernels.native_lsh_hash(x, rotations, [64], 0, None)
        return ids, torch.ops.reformer_kernels.native_bucket_sort(ids, 64, 65)[0]

    expected = [work(x) for x in inputs]
    with torch_threads(2), ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(work, inputs), expected, strict=True):
                assert torch.equal(got[0], want[0])
                assert torch.equal(got[1], want[1])


def test_one_openmp_runtime() -> None:
    """The extension and torch must share one runtime, or their thread pools compete for the cores."""
    result = run_python(
        """
        import torch
        from reformer_kernels import _native
        _native.extension()
        with open("/proc/self/maps") as maps:
            print(len({line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}))
        """
    )
    assert result.stdout.strip() == "1", result.stdout + result.stderr


def test_without_openmp_the_reason_is_given() -> None:
    """Without torch, the extension cannot be loaded, because torch brings the OpenMP runtime."""
    result = run_python(
        f"""
        from importlib.machinery import ExtensionFileLoader
        from importlib.util import module_from_spec, spec_from_loader
        loader = ExtensionFileLoader("_C", {_native.extension().__file__!r})
        try:
            module_from_spec(spec_from_loader("_C", loader))
        except ImportError as error:
            print(error)
        """
    )
    assert "undefined symbol" in result.stdout, result.stdout + result.stderr
    assert "needs GNU OpenMP" in _native._import_failure(ImportError(result.stdout))


def test_without_the_extension_the_reason_is_given() -> None:
    result = run_python(
        """
        import sys
        sys.modules["reformer_kernels._C"] = None
        from reformer_kernels import _native
        assert not _native.info()["available"]
        print(_native.unavailable_reason())
        try:
            _native.extension()
        except RuntimeError as error:
            print(error)
        """
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("pip install -e .") == 2
