"""Builds csrc/cuda/bucket_sort.cu and altered copies of it for the host and runs them: see primitives.h."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from reformer_kernels.ops.sort import reference

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[3] / "csrc"
SOURCE = CSRC / "cuda" / "bucket_sort.cu"
SCHEDULES = ("in order", "reversed", "shuffled")
TSAN_RACE = 66
"""The exit code of a program in which the thread sanitizer has seen a race."""


def altered(source: str, *changes: tuple[str, str]) -> str:
    """`source` with each `old` replaced by its `new`; each must occur exactly once."""
    for old, new in changes:
        assert source.count(old) == 1, f"{source.count(old)} times in the kernel: {old}"
        source = source.replace(old, new)
    return source


def without(source: str, text: str, number: int) -> str:
    """`source` without occurrence number `number` of `text`, counted from 0."""
    parts = source.split(text)
    return text.join(parts[: number + 1]) + text.join(parts[number + 1 :])


class Cases(NamedTuple):
    """Problems in a file, and the results of the reference."""

    path: Path
    expected: bytes


def write_cases(path: Path, problems: Sequence[tuple[Tensor, int, int]]) -> Cases:
    """`problems`: ids (segments, L) int32, n_buckets, starts_size."""
    expected = bytearray()
    with path.open("wb") as file:
        for ids, n, starts_size in problems:
            file.write(struct.pack("4q", *ids.shape, n, starts_size))
            file.write(ids.numpy().tobytes())
            order, starts = reference.bucket_sort(ids, n, starts_size)
            expected += order.numpy().tobytes() + starts.numpy().tobytes()
    return Cases(path, bytes(expected))


class StandIn:
    """A program that holds variants of the kernel by name."""

    def __init__(self, folder: Path, variants: Mapping[str, str], *flags: str) -> None:
        self.folder, self.names = folder, list(variants)
        (folder / "cuda").mkdir(parents=True)
        shutil.copy(CSRC / "kernels.h", folder)
        for header in ("primitives.h", "fibers.h", "threads.h"):
            shutil.copy(HERE / header, folder / "cuda")
        table = []
        for number, source in enumerate(variants.values()):
            name = f"variant_{number}"
            opened = f"namespace {name} {{\nusing namespace reformer;\nusing namespace reformer::cuda;"
            source = altered(source, ("namespace reformer::cuda {", opened))
            (folder / "cuda" / f"{name}.h").write_text(source)
            table.append(f"    {{{name}::bucket_sort_workspace_bytes, {name}::bucket_sort}},\n")
        (folder / "variants.h").write_text(
            "".join(f'#include "cuda/variant_{number}.h"\n' for number in range(len(table)))
            + "struct Variant {\n  size_t (*workspace_bytes)(const reformer::SortParams&);\n"
            + "  const char* (*sort)(const reformer::SortParams&);\n};\n"
            + "const Variant kVariants[] = {\n"
            + "".join(table)
            + "};\n"
        )
        self.program = folder / "stand_in"
        compiler = shutil.which("g++")
        assert compiler is not None
        warnings = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
        command = [compiler, "-std=c++17", "-g1", "-O1", *warnings, *flags, "-pthread", f"-I{folder}"]
        command += [str(HERE / "main.cpp"), "-o", str(self.program)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr[-6000:]

    def fault(self, name: str, schedule: str, cases: Cases, timeout: float = 300) -> str | None:
        """What is wrong with the results of a variant under a schedule, or None if they are right."""
        output = self.folder / "output"
        command = [str(self.program), str(self.names.index(name)), str(SCHEDULES.index(schedule)), "1"]
        try:
            result = subprocess.run(
                [*command, str(cases.path), str(output)],
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
                env={"TSAN_OPTIONS": f"exitcode={TSAN_RACE} halt_on_error=1"},
            )
        except subprocess.TimeoutExpired:
            return f"not done after {timeout} s"
        if result.returncode != 0:
            return f"exit code {result.returncode}: {result.stderr[:3000]}"
        got = output.read_bytes()
        if got == cases.expected:
            return None
        ours = torch.frombuffer(bytearray(got), dtype=torch.int32)
        theirs = torch.frombuffer(bytearray(cases.expected), dtype=torch.int32)
        if ours.shape != theirs.shape:
            return f"{len(ours)} integers instead of {len(theirs)}"
        wrong = (ours != theirs).nonzero().flatten()
        first = int(wrong[0])
        return (
            f"{len(wrong)} of {len(ours)} integers differ, first at {first}: {ours[first]}, {theirs[first]}"
        )
