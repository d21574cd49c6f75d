"""Tests that need a GPU: every operation against the float64 reference, and how the package behaves there.

`python bench/validate_gpu.py` runs the same checks, in processes side by side, and times everything.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from python_tests.helpers import assert_close
from reformer_kernels import LSHConfig, ReversibleSequence, functional
from reformer_kernels.modules import LSHSelfAttention
from reformer_kernels.testing import TOLERANCE, normal, relative_error

sys.path.append(str(Path(__file__).parents[2] / "bench"))
from validation import correctness, hazards
from validation.context import Context

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")

CONTEXT = Context(dry_run=False, folder="", name="")
CASES = dict(correctness.cases(CONTEXT))
CONFIG = LSHConfig.paper(n_hashes=2, chunk_length=64, causal=True)


@pytest.mark.parametrize("case", CASES)
def test_validation_case(case: str) -> None:
    row = CASES[case]()
    assert row.get("ok", True), row


@pytest.mark.parametrize("steps", [hazards.race_steps, hazards.capture_steps])
def test_validation_hazards(steps: Callable[[Context], Any]) -> None:
    for row in steps(CONTEXT):
        assert row["ok"], row


def inputs(*shape: int, device: str = "cuda", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [normal(*shape, dtype=dtype, seed=n).to(device).requires_grad_() for n in range(2)]


def test_cuda_tensors_take_triton_and_say_what_cannot_run() -> None:
    qk, v = inputs(1, 2, 300, 32)
    chosen, named = (
        functional.lsh_attention(qk, v, CONFIG, seed=1, backend=backend) for backend in ("auto", "triton")
    )
    assert torch.equal(chosen, named)
    with pytest.raises(RuntimeError, match="backend='native'"):
        functional.lsh_attention(qk, v, CONFIG, seed=1, backend="native")
    # float64 takes the reference, as on the CPU.
    exact = functional.lsh_attention(qk.double(), v.double(), CONFIG, seed=1)
    assert exact.dtype == torch.float64


def test_work_goes_to_the_current_stream_and_device() -> None:
    qk, v = (x.detach() for x in inputs(1, 4, 2000, 64))
    rotations = functional.sample_rotations(CONFIG, 4, 64, 0).cuda()
    expected = functional.lsh_attention(qk, v, CONFIG, rotations=rotations)
    torch.cuda.synchronize()
    stream, late = torch.cuda.Stream(), torch.zeros_like(qk)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a few hundredths of a second, in which other streams would overtake
        late.copy_(qk)
        out = functional.lsh_attention(late, v, CONFIG, rotations=rotations)
    stream.synchronize()
    assert torch.equal(out, expected)
    last = torch.cuda.device_count() - 1
    if last > 0:  # the tensors decide, not the current device
        moved = [x.to(f"cuda:{last}") for x in (qk, v, rotations)]
        out = functional.lsh_attention(moved[0], moved[1], CONFIG, rotations=moved[2])
        assert out.device.index == last and torch.equal(out.to(qk.device), expected)


def test_new_lengths_compile_nothing() -> None:
    from reformer_kernels.gpu.architectures import architecture_of
    from reformer_kernels.gpu.specializations import all_specializations

    listed = all_specializations(
        architecture=architecture_of("cuda"), dtype=torch.bfloat16, head_dim=64, options="all"
    )
    kernels = {s.kernel.__name__: s.kernel for s in listed}

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels.values() for cache in kernel.device_caches.values())

    def call(L: int) -> None:
        qk, v = inputs(1, 2, L, 64, dtype=torch.bfloat16)
        functional.lsh_attention(qk, v, CONFIG, seed=0).sum().backward()

    # Lengths that are and are not multiples of 16, long enough for the same number of bucket factors.
    call(20_000), call(20_001)
    before = compiled()
    assert before > 0
    for L in (21_003, 22_016, 30_000, 31_111):
        call(L)
    assert compiled() == before


def test_more_than_2_to_the_31_elements() -> None:
    H, L, D = 33, 2**20, 64  # 1.03 * 2**31 elements in each tensor
    need = 8 * H * L * D * 2 + 3 * H * L * D * 4
    free = torch.cuda.mem_get_info()[0]
    if free < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free")
    qk, v = (torch.randn(1, H, L, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    config = LSHConfig.paper(n_hashes=1, causal=True)
    rotations = functional.sample_rotations(config, 1, D, 0, shared_heads=True).cuda()

    def run(heads: slice) -> list[torch.Tensor]:
        leaves = [x[:, heads].detach().requires_grad_() for x in (qk, v)]
        out = functional.lsh_attention(*leaves, config, rotations=rotations)
        return [out.detach(), *torch.autograd.grad(out, leaves, leaves[1].detach())]

    whole = [x[:, -1:].clone() for x in run(slice(0, H))]
    for ours, alone in zip(whole, run(slice(H - 1, H)), strict=True):
        assert torch.equal(ours, alone)


def test_modules_train_and_compile() -> None:
    torch.manual_seed(0)
    layer = LSHSelfAttention(128, 4, CONFIG).cuda()
    x = normal(2, 500, 128, dtype=torch.float32).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        layer(x).float().square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())
    layer.eval()
    with torch.no_grad():
        plain = layer(x)
        assert torch.equal(layer(x), plain)
        assert_close(torch.compile(layer, fullgraph=True)(x), plain)


@pytest.mark.parametrize("residual", ["float", "exact"])
def test_reversible_layers(residual: str) -> None:
    """Rebuilt activations give the gradients that kept activations give."""
    torch.manual_seed(0)
    pairs = [
        (
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)),
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)),
        )
        for _ in range(4)
    ]
    layers = ReversibleSequence(pairs, residual=residual).cuda()
    x = normal(2, 300, 128, dtype=torch.float32).cuda().requires_grad_()
    out = layers(x)
    (rebuilt,) = torch.autograd.grad(out.square().sum(), x)
    first, second = x.chunk(2, dim=-1)
    for f, g in pairs:
        first = first + f(second)
        second = second + g(first)
    plain = torch.cat([first, second], dim=-1)
    (expected,) = torch.autograd.grad(plain.square().sum(), x)
    assert relative_error(out, plain) < TOLERANCE[torch.float32]
    assert relative_error(rebuilt, expected) < 1e-3
