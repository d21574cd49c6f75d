"""Builds reformer_kernels._C with CMake and Ninja. All else is in pyproject.toml and CMakeLists.txt."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# CMake options that are set by environment variables of the same names.
OPTIONS = ("REFORMER_CUDA", "REFORMER_SANITIZE", "REFORMER_TEST_VARIANTS", "REFORMER_WERROR")


def tool(name: str) -> str:
    """The path of a build tool: the one installed with this Python, else the first on PATH."""
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    executable = shutil.which(name, path=path)
    if executable is None:
        raise RuntimeError(f"{name} is needed to build reformer-kernels; install it with: pip install {name}")
    return executable


class CMakeBuild(build_ext):
    """Configures and builds in build/, which stays, so that the next build compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ImportError as error:
            message = "pybind11 is needed to build reformer-kernels; install it with: pip install pybind11"
            raise RuntimeError(message) from error

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        configure = [
            *(tool("cmake"), "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        for option in OPTIONS:
            # Without the variable, the default comes back, whatever an earlier build in this folder used.
            configure.append(f"-D{option}={os.environ[option]}" if option in os.environ else f"-U{option}")
        subprocess.run(configure, check=True)
        subprocess.run([tool("cmake"), "--build", str(build_dir), "--parallel"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file: rewriting the old one would change it under a process that has it mapped.
        target.unlink(missing_ok=True)
        shutil.copy2(build_dir / "_C.so", target)


setup(ext_modules=[Extension("reformer_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
