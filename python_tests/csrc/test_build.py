"""The build: what the binary exports and needs, what CMake says without nvcc, what the archives contain.

Tests of object files read the build tree that `pip install -e .` keeps in build/.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from reformer_kernels import _native, _version

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists() or sys.platform != "linux", reason="needs the source tree, on Linux"
)
needs_build_tree = pytest.mark.skipif(
    not (BUILD / "build.ninja").exists(), reason=f"no build tree at {BUILD}; pip install -e . makes it"
)


def tool(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout


@needs_build_tree
@pytest.mark.parametrize("isa", _native.info()["compiled_isas"])
def test_objects_of_an_instruction_set_share_nothing(isa: str) -> None:
    """Every symbol that the linker sees is in the namespace of the instruction set.

    Any other weak symbol, such as a template of the standard library, could replace its twin in the other
    variants, and a machine without AVX-512 would run AVX-512 code.
    """
    objects = sorted((BUILD / "CMakeFiles" / f"kernels_{isa}.dir").rglob("*.o"))
    assert objects
    # A mangled name inside reformer::<isa>, or its guard variable, vtable or type information.
    own = re.compile(rf"_Z(GV|T[VTIS])?NK?8reformer{len(isa)}{isa}")
    for path in objects:
        for line in output_of(tool("nm"), str(path)).splitlines():
            match = re.match(r"^[0-9a-f]*\s+(\S) (\S+)$", line)
            assert match, line
            kind, symbol = match.groups()
            visible = (kind.isupper() and kind != "U") or kind == "u"
            assert not visible or own.match(symbol), f"{path.name} shares {symbol}"


@needs_build_tree
def test_library_exports_only_its_entry_and_needs_no_openmp_torch_or_cuda() -> None:
    library = _native.extension().__file__
    exported = output_of(tool("nm"), "-D", "--defined-only", library).split()[2::3]
    assert exported == ["PyInit__C"]
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output_of(tool("readelf"), "-d", library))
    assert not [name for name in needed if re.search("gomp|omp|torch|c10|cudart|python", name)]


def _configure(folder: Path, *options: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    import pybind11

    environment = {k: v for k, v in os.environ.items() if k not in ("CUDACXX", "CUDA_HOME", "CUDA_PATH")}
    environment["PATH"] = os.environ["PATH"] if path is None else path
    return subprocess.run(
        [
            *(tool("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *options,
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def _path_without_nvcc() -> str:
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(folder for folder in folders if not (Path(folder) / "nvcc").exists())


def test_cuda_on_without_nvcc_fails_and_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    result = _configure(tmp_path, "-DREFORMER_CUDA=ON", path=_path_without_nvcc())
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert "REFORMER_CUDA=ON, but nvcc was not found" in message
    assert "CUDACXX" in message
    assert "REFORMER_CUDA=OFF" in message


def test_cuda_auto_without_nvcc_is_skipped_and_other_values_fail(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    result = _configure(tmp_path / "auto", path=_path_without_nvcc())
    assert result.returncode == 0, result.stderr
    assert "No CUDA kernels: nvcc was not found" in result.stdout
    result = _configure(tmp_path / "maybe", "-DREFORMER_CUDA=MAYBE")
    assert result.returncode != 0
    assert "must be AUTO, ON or OFF, got 'MAYBE'" in result.stderr


def test_cuda_auto_passes_over_an_nvcc_that_cannot_compile(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho unsupported host compiler >&2\nexit 1\n")
    nvcc.chmod(0o755)
    path = os.pathsep.join([str(nvcc.parent), _path_without_nvcc()])
    result = _configure(tmp_path / "auto", path=path)
    assert result.returncode == 0, result.stderr
    assert f"No CUDA kernels: {nvcc} could not compile" in result.stdout
    result = _configure(tmp_path / "on", "-DREFORMER_CUDA=ON", path=path)
    assert result.returncode != 0
    assert "CUDA" in result.stderr


@needs_build_tree
def test_a_changed_source_rebuilds_only_what_depends_on_it() -> None:
    source = ROOT / "csrc" / "cpu" / "hash.cpp"
    before = source.stat()
    try:
        os.utime(source)
        # With -n, ninja only says what it would run.
        plan = output_of(tool("ninja"), "-n", "-v", "-C", str(BUILD))
    finally:
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    compiled = re.findall(r" -c (\S+)", plan)
    if "--regenerate-during-build" in plan:
        pytest.skip("the build tree is older than CMakeLists.txt: build first")
    isas = _native.info()["compiled_isas"]
    assert sorted(Path(path).name for path in compiled) == ["hash.cpp"] * len(isas)


def test_source_archive_has_what_a_build_needs(tmp_path: Path) -> None:
    command = ["setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True, timeout=100
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert f"-{_version.__version__}.tar.gz" in archive.name
    sources = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "reformer_kernels", "python_tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".cpp", ".h", ".cu", ".cuh", ".py", ".pyi"}
    }
    needed = {"CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    assert not (sources | needed) - names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_version_is_stated_once() -> None:
    pattern = re.compile(rf"(?<![\d.]){re.escape(_version.__version__)}(?![\d.])")
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    files += [path for path in (ROOT / "reformer_kernels").rglob("*.py") if path.name != "_version.py"]
    assert not [str(path) for path in files if pattern.search(path.read_text())]
