"""The native attention in PyTorch: operator contract, compile, threads, forks, memory, errors."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.data import DataLoader, Dataset

from python_tests.helpers import assert_close, gradients, padding_mask, qkv
from python_tests.native_tools import torch_threads
from python_tests.ops.attention.cases import Case, arrange, rule_of
from python_tests.ops.attention.test_native import RULES
from reformer_kernels import Layout, LSHConfig, _native
from reformer_kernels import functional as F
from reformer_kernels.benchmarks import memory
from reformer_kernels.modules import LocalSelfAttention, LSHSelfAttention
from reformer_kernels.testing import normal

OPS = torch.ops.reformer_kernels


def arguments(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Of `native_attention`."""
    q, v, *k = (arrange(x, case, case.strides).requires_grad_() for x in case.inputs(dtype))
    layout = case.layout()
    seed = torch.tensor(case.seed) if case.dropout_p else None
    return (
        q, k[0] if k else None, v, layout.order, layout.bucket_starts, case.key_bias(), seed,
        case.rule, case.scale, case.dropout_p,
    )  # fmt: skip


CASES = {
    "plain": Case(rule_of(), B=2, H=2, R=2, L=40, D=8, Dv=5),
    "separate": Case(RULES["local"], B=2, H=2, L=40, D=8, Dv=8, separate=True, strides="projection"),
    "padded, dropped": Case(RULES["trax"], B=2, R=2, L=40, padding="tail", dropout_p=0.3),
    "columns": Case(RULES["bucket causal"], R=2, L=40, strides="columns"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_operator_contract(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(OPS.native_attention.default, arguments(CASES[name], dtype))


@pytest.mark.parametrize("name", CASES)
def test_operator_contract_of_backward(name: str) -> None:
    args = [x.detach() if isinstance(x, Tensor) else x for x in arguments(CASES[name])]
    out, lse = OPS.native_attention(*args)
    for grad_out, grad_lse in ((torch.ones_like(out), None), (None, torch.ones_like(lse)), (out, lse.exp())):
        torch.library.opcheck(OPS.native_attention_backward.default, (grad_out, grad_lse, out, lse, *args))


COMPILED: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "paper": lambda q, k, v, m: F.lsh_attention(
        q, v, LSHConfig.paper(chunk_length=8, causal=True), seed=1, key_padding_mask=m, return_lse=True
    ),
    "trax": lambda q, k, v, m: F.lsh_attention(
        q, v, LSHConfig.trax(chunk_length=8, n_hashes=2), seed=1, dropout_p=0.1, return_lse=True
    ),
    "bucket": lambda q, k, v, m: F.lsh_attention(
        q, v, LSHConfig(window="bucket", bucket_window=9, causal=True), seed=1, return_lse=True
    ),
    "local": lambda q, k, v, m: F.local_attention(
        q, k, v, chunk_length=8, chunks_after=1, key_padding_mask=m, return_lse=True
    ),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_with_a_symbolic_length(name: str, backend: str) -> None:
    """One graph, at most two compilations while L varies, the same numbers forward and backward."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    function = COMPILED[name]

    def call(x: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        out, lse = function(2 * x, k, v, m)  # something to fuse around the operators
        return torch.sin(out), lse

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for L in (40, 57, 100, 333):
        leaves = [x.requires_grad_() for x in qkv(2, 2, L, 8, 6, dtype=torch.float32)]
        mask = padding_mask([L - 5, L], L)
        ours, eager = compiled(*leaves, mask), call(*leaves, mask)
        finite = eager[1].isfinite()
        outputs = [[out, torch.where(finite, lse, 0)] for out, lse in (ours, eager)]
        for a, e in zip(*outputs, strict=True):
            assert_close(a, e, 1e-5)
        for a, e in zip(*(gradients(x, leaves) for x in outputs), strict=True):
            assert_close(a, e, 1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast(cast: torch.dtype) -> None:
    """As calling with inputs cast by hand; gradients arrive in the inputs' float32."""
    config = LSHConfig(chunk_length=8)
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 50, 8, dtype=torch.float32))
    with torch.autocast("cpu", cast):
        out, lse = F.lsh_attention(q, v, config, seed=0, backend="native", return_lse=True)
        local = F.local_attention(q, k, v, chunk_length=8, backend="native")
    assert out.dtype == local.dtype == cast
    assert lse.dtype == torch.float32
    by_hand = F.lsh_attention(q.to(cast), v.to(cast), config, seed=0, backend="native")
    assert torch.equal(out, by_hand)
    ours, theirs = gradients([out], [q, v]), gradients([by_hand], [q, v])
    for a, e in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, e)


def test_double_backward_says_no() -> None:
    q, _, v = (x.requires_grad_() for x in qkv(1, 1, 30, 4, dtype=torch.float32))
    out = F.lsh_attention(q, v, LSHConfig(chunk_length=8), seed=0, backend="native")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=r'backend="reference" for double backward'):
        grad.sum().backward()


def test_functional_transforms_are_right_or_refused() -> None:
    q, _, v = qkv(1, 1, 30, 4, dtype=torch.float32)
    config = LSHConfig(chunk_length=8)

    def loss(q: Tensor) -> Tensor:
        return F.lsh_attention(q, v, config, seed=0, backend="native").square().sum()

    message = r"native kernels have no gradient by torch\.func\.grad, .* or backend='reference'"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.grad(loss)(q)
    with pytest.raises(NotImplementedError, match=message):
        torch.func.vjp(loss, q)
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative; use backend='reference'"):
        torch.func.jvp(loss, (q,), (torch.ones_like(q),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        loss(forward_ad.make_dual(q, torch.ones_like(q)))
    batch = torch.stack([q, 2 * q])
    assert torch.equal(torch.func.vmap(loss)(batch), torch.stack([loss(x) for x in batch]))


def test_inference_mode_and_no_grad() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 50, 8, dtype=torch.float32))
    config = LSHConfig(chunk_length=8, causal=True)
    expected = F.lsh_attention(q, v, config, seed=0, backend="native")
    assert expected.requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = F.lsh_attention(q, v, config, seed=0, backend="native")
            F.local_attention(q, k, v, chunk_length=8, backend="native")
        assert not out.requires_grad
        assert torch.equal(out, expected)


def test_only_what_is_asked_for_is_differentiated() -> None:
    q, k, v = qkv(1, 2, 50, 8, dtype=torch.float32)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        leaves = [x.clone().requires_grad_(w) for x, w in zip((q, k, v), wanted, strict=True)]
        out = F.local_attention(*leaves, chunk_length=8, backend="native")
        out.sum().backward()
        assert [x.grad is not None for x in leaves] == list(wanted)
    q.requires_grad_()
    _, lse = F.local_attention(q, k, v, chunk_length=8, backend="native", return_lse=True)
    lse.sum().backward()  # out is not used
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_saved_for_backward(dropout_p: float) -> None:
    """q, k, v, out, log-sum-exp, layout, mask and seed: nothing else."""
    saved: list[Tensor] = []
    q, _, v = (x.requires_grad_() for x in qkv(1, 2, 200, 16, dtype=torch.float32))
    config, mask = LSHConfig(chunk_length=16), padding_mask([180], 200)

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        F.lsh_attention(q, v, config, seed=0, key_padding_mask=mask, dropout_p=dropout_p, backend="native")
    size = sum(x.numel() * x.element_size() for x in saved)
    L, R = 200, config.n_hashes
    layout = 2 * R * (L + F.lsh_layout(q, config, seed=0).bucket_starts.shape[-1]) * 4
    assert size <= 4 * (2 * L * (16 + 16 + 16) + 2 * L + L) + layout + 8


class _Attends(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        # Forward only: torch's own autograd refuses to run after a fork.
        q = normal(1, 2, 300, 8, dtype=torch.float32, seed=i)
        return F.lsh_attention(q, q, LSHConfig(chunk_length=16), seed=0, backend="native")


def test_dataloader_workers() -> None:
    with torch_threads(2):
        here = [_Attends()[i] for i in range(4)]
        for got, expected in zip(DataLoader(_Attends(), num_workers=2, batch_size=None), here, strict=True):
            assert torch.equal(got, expected)


def test_forked_child_runs_alone() -> None:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(
            """
            import os, signal, torch
            from reformer_kernels import LSHConfig
            from reformer_kernels import functional as F
            torch.set_num_threads(3)
            config = LSHConfig.trax(chunk_length=16)
            def work():
                torch.manual_seed(0)
                q = torch.randn(2, 2, 500, 16).requires_grad_()
                F.lsh_attention(q, q, config, seed=0, backend="native").sum().backward()
                return q.grad
            expected = work()
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                torch.set_num_threads(1)  # torch's own pool did not survive either
                os._exit(0 if torch.equal(work(), expected) else 1)
            assert os.waitpid(child, 0)[1] == 0
            """
        )],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_several_python_threads_at_once() -> None:
    config = LSHConfig.trax(chunk_length=16, causal=True)
    inputs = [normal(1, 2, 300 + i, 16, dtype=torch.float32, seed=i) for i in range(8)]

    def work(x: Tensor) -> tuple[Tensor, Tensor]:
        q = x.clone().requires_grad_()
        out = F.lsh_attention(q, q, config, seed=0, backend="native")
        return out.detach(), torch.autograd.grad(out.square().sum(), q)[0]

    expected = [work(x) for x in inputs]
    with torch_threads(2), ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, want in zip(pool.map(work, inputs), expected, strict=True):
                assert torch.equal(got[0], want[0])
                assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("make", [
    lambda: LSHSelfAttention(16, 2, config=LSHConfig(chunk_length=8, causal=True)),
    lambda: LocalSelfAttention(16, 2, chunk_length=8),
])  # fmt: skip
def test_deepcopy_of_modules(make: Callable[[], torch.nn.Module]) -> None:
    layer = make().eval()
    x = normal(2, 40, 16, dtype=torch.float32)
    twin = copy.deepcopy(layer)
    assert torch.equal(layer(x), twin(x))


# Memory


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


# Errors


def test_layouts_that_are_none() -> None:
    config = LSHConfig(chunk_length=8, n_hashes=2, bucket_factors=(4,))
    q, _, v = qkv(2, 2, 40, 4, dtype=torch.float32)
    good = F.lsh_layout(q, config, seed=0, backend="native")
    for place, value in ((0, -1), (0, 40), (7, int(good.order[1, 1, 1, 8])), (39, 2**31 - 1), (3, -(2**31))):
        for b, h, r in ((0, 0, 0), (1, 1, 1)):
            order = good.order.clone()
            order[b, h, r, place] = value
            with pytest.raises(ValueError, match="permutation"):
                F.attend(q, v, Layout(order, good.bucket_starts), config, backend="native")
    for place, value in ((0, 1), (-1, 39), (-1, 41), (2, 41), (2, -1), (1, 2**31 - 1), (3, -(2**31))):
        starts = good.bucket_starts.clone()
        starts[1, 0, 1, place] = value
        with pytest.raises(ValueError, match="rise from 0 to"):
            F.attend(q, v, Layout(good.order, starts), config, backend="native")


@pytest.mark.parametrize("threads", [1, 3])
def test_a_bad_layout_is_found_whatever_the_threads(threads: int) -> None:
    config = LSHConfig(chunk_length=8, n_hashes=3, bucket_factors=(4,))
    q, _, v = qkv(4, 8, 40, 4, dtype=torch.float32)
    good = F.lsh_layout(q, config, seed=0, backend="native")
    with torch_threads(threads):
        for b in range(4):
            order = good.order.clone()
            order[b, 7, 2, 5] = 40
            with pytest.raises(ValueError, match="permutation"):
                F.attend(q, v, Layout(order, good.bucket_starts), config, backend="native")


@pytest.mark.parametrize("window", ["chunks", "bucket"])
def test_unsorted_buckets_are_refused(window: Any) -> None:
    """The causal kernels take ranks in a bucket for positions; others do not mind."""
    config = LSHConfig(chunk_length=16, n_hashes=1, bucket_factors=(2,), window=window, causal=True)
    q, _, v = qkv(1, 1, 40, 4, dtype=torch.float32)
    good = F.lsh_layout(q, config, seed=0)
    layout = Layout(good.order.flip(-1).contiguous(), good.bucket_starts)
    with pytest.raises(ValueError, match="positions must rise within each bucket"):
        F.attend(q, v, layout, config, backend="native")
    config = dataclasses.replace(config, causal=False)
    out = F.attend(q, v, layout, config, backend="native")
    assert_close(out, F.attend(q.double(), v.double(), layout, config))


def test_more_codes_than_duplicates_can_be_counted_in_are_refused() -> None:
    """One large bucket and as many of one token each: window times buckets passes 2^32."""
    size = 66000
    config = LSHConfig(n_hashes=2, window="bucket", bucket_window=size, bucket_factors=(2,), causal=True)
    q, _, v = qkv(1, 1, 2 * size, 1, dtype=torch.float32)
    order = torch.arange(2 * size, dtype=torch.int32).expand(1, 1, 2, -1).contiguous()
    starts = torch.cat(
        [torch.zeros(1, dtype=torch.int32), order[0, 0, 0, size:], order.new_tensor([2 * size])]
    )
    layout = Layout(order, starts.expand(1, 1, 2, -1).contiguous())
    with pytest.raises(ValueError, match="fewer buckets, a smaller window, or backend='reference'"):
        F.attend(q, v, layout, config, backend="native")
    narrow = dataclasses.replace(config, bucket_window=64)
    assert F.attend(q, v, layout, narrow, backend="native").isfinite().all()


WRONG: dict[str, tuple[dict[str, Any], type[Exception] | tuple[type[Exception], ...]]] = {
    "rank of q": ({"q": torch.zeros(2, 40, 8)}, ValueError),
    "double": ({"q": torch.zeros(2, 2, 40, 8).double()}, TypeError),
    "v dtype": ({"v": torch.zeros(2, 2, 40, 5).half()}, TypeError),
    "v length": ({"v": torch.zeros(2, 2, 41, 5)}, ValueError),
    "v heads": ({"v": torch.zeros(2, 1, 40, 5)}, ValueError),
    "v rank": ({"v": torch.zeros(2, 40, 5)}, ValueError),
    "k shape": ({"k": torch.zeros(2, 2, 40, 7)}, ValueError),
    "order dtype": ({"order": torch.zeros(2, 2, 2, 40, dtype=torch.int64)}, TypeError),
    "order shape": ({"order": torch.zeros(2, 2, 2, 39, dtype=torch.int32)}, ValueError),
    "order rank": ({"order": torch.zeros(2, 2, 40, dtype=torch.int32)}, (ValueError, IndexError)),
    "no rounds": (
        {
            "order": torch.zeros(2, 2, 0, 40, dtype=torch.int32),
            "bucket_starts": torch.zeros(2, 2, 0, 6, dtype=torch.int32),
        },
        ValueError,
    ),
    "order strides": (
        {"order": torch.zeros(2, 2, 40, 2, dtype=torch.int32).transpose(2, 3)},
        ValueError,
    ),
    "starts shape": ({"bucket_starts": torch.zeros(2, 2, 1, 6, dtype=torch.int32)}, ValueError),
    "no starts": ({"bucket_starts": torch.zeros(2, 2, 2, 0, dtype=torch.int32)}, ValueError),
    "one start": ({"bucket_starts": torch.zeros(2, 2, 2, 1, dtype=torch.int32)}, ValueError),
    "bias dtype": ({"key_bias": torch.zeros(2, 40).double()}, TypeError),
    "bias shape": ({"key_bias": torch.zeros(40, 2)}, ValueError),
    "wide q": ({"q": torch.zeros(2, 2, 40, 300)}, ValueError),
    "wide v": ({"v": torch.zeros(2, 2, 40, 300)}, ValueError),
    "short rule": ({"rule": [0, 16]}, ValueError),
    "no chunk": ({"rule": rule_of(chunk_length=0)}, ValueError),
    "negative chunk": ({"rule": rule_of(chunk_length=-5)}, ValueError),
    "negative reach": ({"rule": rule_of(chunks_before=-2)}, ValueError),
    "endless reach": ({"rule": rule_of(chunks_before=2**60)}, ValueError),
    "endless window": ({"rule": rule_of(rank_window=True, window_before=2**62)}, ValueError),
    "norm": ({"rule": rule_of(key_norm=7)}, ValueError),
    "dropout": ({"dropout_p": 1.5}, ValueError),
    "negative dropout": ({"dropout_p": -0.5}, ValueError),
    "scale": ({"scale": math.nan}, ValueError),
    "infinite scale": ({"scale": 1e39}, ValueError),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_operator_refuses_what_it_cannot_do(name: str) -> None:
    """Called by hand, past the public functions' checks: an error, not a crash."""
    changes, kind = WRONG[name]
    names = [
        "q", "k", "v", "order", "bucket_starts", "key_bias", "seed", "rule", "scale", "dropout_p",
    ]  # fmt: skip
    values = dict(zip(names, arguments(CASES["plain"]), strict=True)) | changes
    with pytest.raises(kind), torch.no_grad():
        OPS.native_attention(*values.values())


def test_the_backward_operator_refuses_what_it_cannot_do() -> None:
    args = [x.detach() if isinstance(x, Tensor) else x for x in arguments(CASES["plain"])]
    out, lse = OPS.native_attention(*args)
    for place, wrong in (
        (0, out[:, :1]),
        (1, lse[..., 1:]),
        (2, out[..., 1:]),
        (3, lse.double()),
        (0, out.half()),
    ):
        values = [out, lse, out, lse]
        values[place] = wrong
        with pytest.raises((ValueError, TypeError)):
            OPS.native_attention_backward(*values, *args)
    order = args[3].clone()
    order[..., 5] = 1000
    with pytest.raises(ValueError, match="permutation"):
        OPS.native_attention_backward(out, None, out, lse, *args[:3], order, *args[4:])
