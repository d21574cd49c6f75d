"""The native kernels under the thread sanitizer, on an OpenMP runtime that it understands.

`REFORMER_TSAN_ISAS=portable,avx2,avx512 python -m pytest python_tests/csrc/test_thread_sanitizer.py` builds
other instruction sets than `portable` too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).parent / "thread_sanitizer"

BUILD = (ROOT / "CMakeLists.txt").read_text()


def sources(start: str) -> list[str]:
    """The sources that CMakeLists.txt lists after these words."""
    listed = re.search(re.escape(start) + r"\s+([^)]*)\)", BUILD)
    assert listed is not None, start
    return listed[1].split()


KERNELS = sources("set(REFORMER_KERNEL_SOURCES")
CORE = sources("add_library(core OBJECT")

# As CMakeLists.txt has them.
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")] + ["-mfma", "-mf16c"]
VARIANTS = {
    "portable": (4, []),
    "avx2": (8, ["-mavx2", "-mfma", "-mf16c"]),
    "avx512": (16, AVX512),
    "avx512bf16": (16, [*AVX512, "-mavx512bf16", "-DREFORMER_BF16_PAIRS"]),
}
ISAS = os.environ.get("REFORMER_TSAN_ISAS", "portable").split(",")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="needs g++, on Linux"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tsan")
    variants = " ".join(f"VARIANT({isa})" for isa in VARIANTS if isa in ISAS)
    (folder / "isas.h").write_text(f"#define REFORMER_ISAS(VARIANT) {variants}\n")
    common = ["g++", "-std=c++17", "-O1", "-g", "-fopenmp", "-fsanitize=thread", "-Wno-psabi", f"-I{folder}"]
    commands = []
    for isa in ISAS:
        lanes, flags = VARIANTS[isa]
        own = [*flags, "-fno-exceptions", f"-DREFORMER_ISA={isa}", f"-DREFORMER_LANES={lanes}"]
        commands += [
            [*common, *own, "-c", str(ROOT / name), "-o", f"{isa}_{Path(name).stem}.o"] for name in KERNELS
        ]
    for source in (*(ROOT / name for name in CORE), *sorted(SOURCES.glob("*.cpp"))):
        commands.append([*common, "-c", str(source), "-o", f"{source.stem}.o"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: subprocess.run(command, cwd=folder, check=True, timeout=600), commands))
    objects = sorted(str(path) for path in folder.glob("*.o"))
    # Without -fopenmp: the stand-in takes the place of libgomp.
    link = ["g++", "-fsanitize=thread", *objects, "-o", "program", "-lpthread"]
    subprocess.run(link, cwd=folder, check=True, timeout=100)
    return folder / "program"


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # The sanitizer cannot lay out its memory where addresses are random in all their bits.
    command = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*command, str(program), *arguments], capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.parametrize("isa", ISAS)
def test_no_kernel_has_a_race(program: Path, isa: str) -> None:
    done = run(program, isa)
    if done.returncode == 3:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[:3000]
    assert done.stdout.endswith("finished\n")


def test_a_race_is_found(program: Path) -> None:
    done = run(program, "race")
    assert done.returncode == 66 and "ThreadSanitizer: data race" in done.stderr, done.stderr
