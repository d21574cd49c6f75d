"""The machine, the build, the sanitizer and the GPU tests: steps that run other programs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reformer_kernels import LSHConfig, functional
from reformer_kernels.benchmarks import machine
from validation.context import Context, Row, attempt

ROOT = Path(__file__).parents[2]
SANITIZER_FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")


def environment_steps(context: Context) -> Iterator[Row]:
    """The machine as torch and the driver describe it, and the back ends that run on it."""
    from reformer_kernels.cli.info import gather

    facts = gather()
    live = [f"{b['backend']} on {b['device']}" for b in facts["backends"] if b["available"]]
    yield {
        "check": "machine",
        "ok": context.dry_run or torch.cuda.is_available(),
        **machine.describe(context.device),
        "commit": machine.commit(),
        **{name: version for name, version in machine.versions().items() if version},
        "cuda": torch.version.cuda or torch.version.hip,
        "live": ", ".join(live),
    }
    for name, command in (
        ("driver", ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,memory.total,power.limit"]),
        ("nvcc", ["nvcc", "--version"]),
    ):
        yield attempt(name, lambda command=command: _run_program(command))  # type: ignore[misc]


def _run_program(command: list[str]) -> Row:
    if shutil.which(command[0]) is None:
        return {"skipped": f"{command[0]} is not on PATH"}
    if command[0] == "nvidia-smi":
        command = [*command, "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return {"output": " | ".join(done.stdout.strip().splitlines()[-4:])}


def build_steps(context: Context) -> Iterator[Row]:
    """Builds the native extension, with CUDA where nvcc is."""

    def build() -> Row:
        if context.dry_run:
            from reformer_kernels import _native

            return {"skipped": "a dry run builds nothing", "extension": _native.info()["available"]}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        output = done.stdout + done.stderr
        return {
            "ok": done.returncode == 0,
            "output": output[-400:] if done.returncode else _cuda_line(output),
        }

    yield attempt("build", build)


def _cuda_line(output: str) -> str:
    """The last line that says whether CUDA is in the build."""
    lines = [line.strip() for line in output.splitlines() if "CUDA" in line]
    return lines[-1] if lines else "built"


def sanitizer_steps(context: Context) -> Iterator[Row]:
    """Runs CUDA C++ and Triton kernels under compute-sanitizer: addresses, races, missing barriers."""
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ["PATH"], *SANITIZER_FOLDERS)))
    if tool is None:
        yield {
            "check": "compute-sanitizer",
            "ok": True,
            "skipped": "compute-sanitizer is not on this machine",
        }
        return
    for program in SANITIZED:
        for kind in ("memcheck", "racecheck", "synccheck", "initcheck"):
            yield attempt(f"{program} {kind}", partial(_sanitize, context, tool, kind, program))


def sanitizer_programs_steps(context: Context) -> Iterator[Row]:
    """The programs for the sanitizer, without it: they must run."""
    for name, program in SANITIZED.items():
        if name == "sort" and context.dry_run:
            yield {"check": name, "ok": True, "skipped": "the CUDA sort needs a GPU"}
        else:
            yield attempt(name, lambda program=program: program(context) or {})  # type: ignore[misc]


def _sanitize(context: Context, tool: str, kind: str, name: str) -> Row:
    program = [sys.executable, "-m", "validation.machine_steps", name, json.dumps(vars(context))]
    command = [tool, "--tool", kind, "--error-exitcode", "9", *FILTERS[name], *program]
    done = subprocess.run(
        command, cwd=ROOT / "bench", capture_output=True, text=True, timeout=60, check=False
    )
    summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY.*)", done.stdout)
    ok = done.returncode == 0 and bool(summary)
    return {"ok": ok, "output": summary[-1] if summary else (done.stdout + done.stderr)[-400:]}


def sort_under_the_sanitizer(context: Context) -> None:
    """The program for the sanitizer: sorts of sizes that take each way through the kernels, and copies.

    It runs no kernel of torch's, which the sanitizer would check as well.
    """
    for n_buckets, L in ((2, 100), (129, 5000), (4097, 20_000), (2**20, 70_000)):
        ids = torch.randint(0, n_buckets, (3, L), dtype=torch.int32)
        order, _ = torch.ops.reformer_kernels.native_bucket_sort(ids.cuda(), n_buckets, n_buckets + 1)
        assert torch.equal(order.cpu(), ids.sort(dim=-1, stable=True).indices.int())


def attention_under_the_sanitizer(context: Context) -> None:
    """The program for the sanitizer: each Triton kernel, forward and backward, with all options.

    Kernels of torch's run too; `FILTERS` keeps the sanitizer from them.
    """
    size = context.pick((1, 2, 700, 64), (1, 1, 20, 16))
    dtype = context.pick(torch.bfloat16, torch.float32)
    chunk = context.pick(64, 8)
    mask = (torch.arange(size[2]) % 7 == 0)[None].to(context.device)
    options: dict[str, Any] = {
        "seed": 1,
        "dropout_p": 0.1,
        "key_padding_mask": mask,
        "backend": context.backend,
    }
    q, k, v = (x.to(dtype).requires_grad_() for x in torch.randn(3, *size, device=context.device))
    rules: dict[str, Any] = {"n_hashes": 2, "chunk_length": chunk, "causal": True}
    outs = [
        functional.lsh_attention(q, v, config, **options)
        for config in (
            LSHConfig.paper(**rules),
            *context.pick((LSHConfig.trax(**rules), LSHConfig.paper(**rules, window="bucket")), ()),
        )
    ]
    outs.append(
        functional.lsh_cross_attention(q, k, v, LSHConfig.paper(**rules, bucket_window=chunk), **options)
    )
    torch.autograd.grad(sum(out.float().sum() for out in outs), [q, k, v])
    context.synchronize()


SANITIZED: dict[str, Callable[[Context], None]] = {
    "attention": attention_under_the_sanitizer,
    "sort": sort_under_the_sanitizer,
}
"""The programs that run under the sanitizer."""

FILTERS = {
    "attention": [part for name in ("attention_", "lsh_hash") for part in ("--filter", f"kns={name}")],
    "sort": [],
}
"""The sanitizer's options that name the kernels to check."""


def pytest_steps(context: Context) -> Iterator[Row]:
    """Runs the tests that need a GPU."""

    def run() -> Row:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rs",
            "-p",
            "no:cacheprovider",
            "python_tests/gpu/test_gpu.py",
            *("-k", "not validation"),  # the validation cases are steps of their own
        ]
        # The interpreter of a dry run is no GPU, so that the tests are skipped there and say why.
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            capture_output=True,
            text=True,
            check=False,
        )
        last = [line for line in done.stdout.splitlines() if line.strip()][-12:]
        return {
            "ok": done.returncode == 0,
            "output": last[-1] if last and done.returncode == 0 else "\n".join(last),
        }

    yield attempt("python_tests/gpu/test_gpu.py", run)


if __name__ == "__main__":
    SANITIZED[sys.argv[1]](Context(**json.loads(sys.argv[2])))
