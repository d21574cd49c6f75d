"""The native attention's memory: how much it takes, what it keeps between calls, and in which pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from python_tests.helpers import qkv
from python_tests.ops.attention.cases import rule_of
from python_tests.ops.attention.test_native import RULES
from reformer_kernels import LSHConfig, _native
from reformer_kernels import functional as F
from reformer_kernels.benchmarks import memory
from reformer_kernels.ops.attention import native as native_attention
from reformer_kernels.testing import normal

# How much


def test_working_memory() -> None:
    """At most half of qk, v, out and their gradients, by the kernels' own count."""
    B, H, L, D, R = 1, 8, 16384, 64, 4
    q, _, _v = qkv(1, H, 64, D, dtype=torch.float32)
    native = _native.extension()
    tensors = 6 * B * H * L * D * 4
    for rule in (rule_of(chunk_length=64), RULES["trax"]._replace(chunk_length=64)):
        for threads in (1, 2):
            rows = native.Rows(data=q.data_ptr())
            parameters = native.AttentionParams(
                B=B, H=H, L=L, D=D, Dv=D, R=R, q=rows, v=rows, starts_size=2 * L // 64 + 2,
                rule=native.AttentionRule(**rule._asdict()), threads=threads,
            )  # fmt: skip
            forward = native.attention_forward_workspace_bytes(parameters)
            backward = native.attention_backward_workspace_bytes(parameters)
            layout = B * H * R * (L + 2 * L // 64 + 2) * 4
            lse = B * H * L * 4
            assert max(forward, backward) + layout + lse <= 0.5 * tensors


@pytest.mark.skipif(
    not memory.can_measure(torch.device("cpu")), reason="/proc/self/clear_refs is not writable"
)
def test_working_memory_as_the_system_counts_it() -> None:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(
            """
            import torch
            from reformer_kernels import LSHConfig
            from reformer_kernels import functional as F
            from reformer_kernels.benchmarks.memory import peak_of
            torch.set_num_threads(1)
            q, v = (torch.randn(1, 8, 16384, 64).requires_grad_() for _ in range(2))
            config = LSHConfig.trax(causal=True)
            def call():
                out = F.lsh_attention(q, v, config, seed=0, backend="native")
                return [out.detach(), *torch.autograd.grad(out, (q, v), torch.ones_like(out))]
            small = torch.randn(1, 1, 2048, 64).requires_grad_()
            F.lsh_attention(small, small, config, seed=0, backend="native").sum().backward()
            print(peak_of(call, torch.device("cpu")))
            """
        )],
        capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(memory.OWN_MAPPING_ABOVE)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    tensor = 8 * 16384 * 64 * 4
    # ones_like(out) is a tensor of the test's own.
    assert int(result.stdout) - tensor <= 0.5 * 6 * tensor, f"{int(result.stdout) / tensor} tensors"


def test_shared_query_keys_need_no_second_sum() -> None:
    """The gradient as a key is summed where the gradient as a query is, so no (L, D) is in the workspace."""
    native = _native.extension()
    length, dim = 2**20, 64
    q, _, _ = qkv(1, 1, 64, dim, dtype=torch.float32)
    rows = native.Rows(data=q.data_ptr())
    parameters = native.AttentionParams(
        B=1, H=1, L=length, Lk=length, D=dim, Dv=dim, R=2, q=rows, v=rows, starts_size=2 * length // 64 + 2,
        rule=native.AttentionRule(**RULES["trax"]._replace(chunk_length=64)._asdict()), threads=2,
    )  # fmt: skip
    assert native.attention_backward_workspace_bytes(parameters) < length * dim * 4 / 8


# Between calls


def test_a_thread_keeps_its_workspace() -> None:
    first = native_attention._workspace(1000)
    assert native_attention._workspace(100) is first
    larger = native_attention._workspace(first.numel() + 1)
    assert larger is not first and native_attention._workspace(1000) is larger
    others: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: others.append(native_attention._workspace(100)))
    thread.start()
    thread.join()
    assert others[0].data_ptr() != larger.data_ptr()


def test_a_huge_workspace_is_not_kept() -> None:
    size = native_attention.LARGEST_KEPT_WORKSPACE + 1
    first = native_attention._workspace(size)
    assert native_attention._workspace(size) is not first
    assert native_attention._workspace(100).numel() < size


def test_a_kept_workspace_changes_no_bit() -> None:
    """Whatever earlier calls of another shape left in it."""
    config = LSHConfig(chunk_length=16, n_hashes=3, causal=True)
    results = []
    for _ in range(2):
        q, v = (normal(2, 2, 100, 20, dtype=torch.float32, seed=n).requires_grad_() for n in range(2))
        out = F.lsh_attention(q, v, config, seed=0, backend="native")
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (q, v))))
        native_attention._workspace(2**20).fill_(255)  # NaN as float32
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


# Pages


def advised(tensor: torch.Tensor) -> bool:
    """Whether huge pages were asked for in the middle of the tensor's memory."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    return False


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(),
    reason="this system has no transparent huge pages",
)
def test_large_results_ask_for_huge_pages() -> None:
    q, v = (torch.randn(1, 4, 16384, 64).requires_grad_() for _ in range(2))
    out = F.lsh_attention(q, v, LSHConfig(n_hashes=1), seed=0, backend="native")
    grads = torch.autograd.grad(out.sum(), (q, v))
    for tensor in (out, *grads):
        assert tensor.nbytes >= _native.HUGE_PAGES_FROM and advised(tensor)


def test_advice_on_any_range_is_harmless() -> None:
    native = _native.extension()
    for address, size in ((0, 0), (1, 1), (2**21 - 1, 2), (2**63, 2**22), (2**64 - 2**21, 2**21 - 1)):
        native.prefer_huge_pages(address, size)
