"""Fuzzes under the address and undefined-behaviour sanitizers, in a build of its own.

    python -m bench.fuzz.sanitized                                  # malformed calls, 2,000 cases
    python -m bench.fuzz.sanitized --functions native_attention,native_lsh_hash --cases 200

Copies the sources to a folder, builds them there with REFORMER_SANITIZE=address,undefined, and runs
`python -m bench.fuzz` there with these arguments. The ordinary build stays as it is. Needs GCC on Linux.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitized"


def main() -> int:
    if any(argument in ("-h", "--help") for argument in sys.argv[1:]):
        print(__doc__)
        return 0
    arguments = sys.argv[1:] or ["--functions", "malformed_operators,malformed_functions", "--cases", "2000"]
    for name in ("bench", "csrc", "reformer_kernels"):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        unneeded = shutil.ignore_patterns("*.so", "__pycache__", "results")
        shutil.copytree(ROOT / name, FOLDER / name, ignore=unneeded)
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, FOLDER / name)
    environment = os.environ | {"REFORMER_SANITIZE": "address,undefined", "REFORMER_CUDA": "OFF"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(build, cwd=FOLDER, env=environment, check=True)
    libraries = [_library(name) for name in ("libasan.so", "libubsan.so")]
    environment |= {
        "LD_PRELOAD": " ".join(libraries),
        # Python and torch keep memory to the end. Sizes that are too large are torch's to refuse.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=8192",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    run = [sys.executable, "-m", "bench.fuzz", *arguments]
    return subprocess.run(run, cwd=FOLDER, env=environment, check=False).returncode


def _library(name: str) -> str:
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
