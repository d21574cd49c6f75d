"""Peers beyond torch's `scaled_dot_product_attention`: FlexAttention, flash-attn and CUB's sort."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from reformer_kernels.gpu.cost_model import Shape
from validation.calls import BOTH, FORWARD, Call, differentiated, leaves_of, n_buckets_of, shape_of
from validation.context import Context, Row, attempt
from validation.layers import timed

CUB_PROGRAM = Path(__file__).with_name("cub_sort.cu")


def flex(context: Context, shape: Shape, phase: str) -> Call:
    """Causal FlexAttention, compiled as its users compile it; as it is in a dry run."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    L = shape.length
    mask = create_block_mask(causal, None, None, L, L, device=str(context.device))
    attend: Callable[..., Tensor] = (
        flex_attention if context.dry_run else torch.compile(flex_attention, fullgraph=True)
    )
    leaves = leaves_of(context, shape, 3)
    if context.dry_run:  # on the CPU it takes no tensors that need gradients
        leaves = [x.detach() for x in leaves]
    return differentiated(lambda q, k, v: attend(q, k, v, block_mask=mask), leaves, phase)


def flash_attn(context: Context, shape: Shape, phase: str) -> Call:
    """The flash-attn package's kernel, on its own layout (B, L, H, D)."""
    function = importlib.import_module("flash_attn").flash_attn_func
    rows = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in leaves_of(context, shape, 3)]
    return differentiated(lambda q, k, v: function(q, k, v, causal=True), rows, phase)


def peer_steps(context: Context) -> Iterator[Row]:
    """Times of the peers on the headline shapes."""
    makers = {"FlexAttention": flex, "flash-attn": flash_attn}
    for name, make in makers.items():
        if name == "flash-attn" and importlib.util.find_spec("flash_attn") is None:
            yield {"check": name, "ok": True, "skipped": "flash-attn is not installed"}
            continue
        for phase in context.pick((FORWARD, BOTH), (FORWARD,)):
            for length in context.pick((16384, 4096), (24,)):
                shape = shape_of(context, length=length)
                about = dataclasses.asdict(shape) | {"operation": name, "phase": phase}
                yield attempt(
                    f"{name} {phase} L={length}",
                    partial(timed, context, partial(make, context, shape, phase), **about),
                )
    yield attempt("CUB segmented radix sort", partial(cub_sort, context))


def cub_sort(context: Context) -> Row:
    """Microseconds of CUB's sort of the headline's bucket ids, by a program that nvcc compiles here."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return {"skipped": "nvcc is not on PATH"}
    if context.dry_run:
        return {"skipped": "a dry run compiles and runs no CUDA"}
    shape = shape_of(context)
    bits = (n_buckets_of(shape) - 1).bit_length()
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "cub_sort"
        subprocess.run(
            cub_command(nvcc, f"sm_{major}{minor}", program), check=True, capture_output=True, timeout=120
        )
        sizes = [str(shape.heads * shape.n_hashes), str(shape.length), str(bits)]
        done = subprocess.run([str(program), *sizes], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        return {"ok": False, "reason": done.stderr[-400:]}
    return dataclasses.asdict(shape) | {"operation": "CUB sort", "graph_us": float(done.stdout)}


def cub_command(nvcc: str, architecture: str, program: Path) -> list[str]:
    """The command that compiles the program."""
    return [nvcc, "-O3", f"-arch={architecture}", str(CUB_PROGRAM), "-o", str(program)]
