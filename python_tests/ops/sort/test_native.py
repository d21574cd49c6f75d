"""The native bucket sort against the reference, over shapes, adversarial ids and thread counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from python_tests.native_tools import poisoned_memory, torch_threads
from python_tests.ops.sort.cases import KINDS, distribution
from reformer_kernels.ops.sort import op, reference


def native_sort(buckets: Tensor, n_buckets: int, starts_size: int | None = None) -> tuple[Tensor, Tensor]:
    with poisoned_memory():
        size = n_buckets + 1 if starts_size is None else starts_size
        return torch.ops.reformer_kernels.native_bucket_sort(buckets, n_buckets, size)


def assert_sorted(buckets: Tensor, n_buckets: int, starts_size: int | None = None) -> None:
    size = n_buckets + 1 if starts_size is None else starts_size
    order, starts = native_sort(buckets, n_buckets, size)
    expected_order, expected_starts = reference.bucket_sort(buckets, n_buckets, size)
    assert order.dtype == starts.dtype == torch.int32
    assert torch.equal(order, expected_order)
    assert torch.equal(starts, expected_starts)


@settings(max_examples=120, deadline=None)
@given(
    batch=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    L=st.integers(0, 300),
    n=st.one_of(st.integers(1, 40), st.integers(1, 400)),
    extra=st.integers(0, 3),
    kind=st.sampled_from(KINDS),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_equals_reference(batch, L, n, extra, kind, threads, seed) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    with torch_threads(threads):
        assert_sorted(distribution(kind, (*batch, L), n), n, n + 1 + extra)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 515, 40000])
def test_long_segments_shared_by_threads(kind: str, n: int) -> None:
    torch.manual_seed(0)
    ids = distribution(kind, (100003,), n)
    results = []
    for threads in (1, 2, 3, 5):
        with torch_threads(threads):
            results.append(native_sort(ids, n))
    assert_sorted(ids, n)
    for order, starts in results:
        assert torch.equal(order, results[0][0])
        assert torch.equal(starts, results[0][1])


@pytest.mark.parametrize("n", [32768, 2**20])
def test_a_million_tokens(n: int) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, n, (2, 1_000_000), dtype=torch.int32)
    order, starts = native_sort(ids, n)
    expected = torch.sort(ids, dim=-1, stable=True)
    assert torch.equal(order.long(), expected.indices)
    assert torch.equal(starts.diff(), torch.stack([torch.bincount(row, minlength=n) for row in ids]).int())
    assert (starts[:, 0] == 0).all()


def test_strided_ids() -> None:
    ids = torch.randint(0, 9, (3, 50, 4), dtype=torch.int32).transpose(1, 2)
    assert_sorted(ids, 9)
    assert_sorted(ids[:, 1:3, ::7], 9)
    assert_sorted(torch.zeros(1, dtype=torch.int32).expand(4, 30), 9)


def test_wrong_input_raises() -> None:
    ids = torch.zeros(2, 5, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"torch.int32, got torch.int64"):
        native_sort(ids.long(), 3)
    with pytest.raises(ValueError, match="n_buckets must be positive, got 0"):
        native_sort(ids, 0)
    with pytest.raises(ValueError, match="n_buckets must be positive"):
        native_sort(ids, -3)
    with pytest.raises(ValueError, match="starts_size must be at least n_buckets \\+ 1 = 4, got 3"):
        native_sort(ids, 3, 3)
    with pytest.raises(ValueError, match="scalar"):
        native_sort(torch.tensor(1, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match="below 2\\*\\*31"):
        native_sort(ids, 2**31)


def test_operator_contract() -> None:
    ids = torch.randint(0, 9, (2, 3, 40), dtype=torch.int32)
    torch.library.opcheck(torch.ops.reformer_kernels.native_bucket_sort.default, (ids, 9, 11))
    torch.library.opcheck(torch.ops.reformer_kernels.native_bucket_sort.default, (ids[:, :, ::2], 9, 10))


def test_compiles_with_a_symbolic_length() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def sort(ids: Tensor) -> tuple[Tensor, Tensor]:
        n = 2 * (ids.shape[-1] // 16)
        return torch.ops.reformer_kernels.native_bucket_sort(ids, n, n + 2)

    for L in (40, 100, 333, 7000):
        n = 2 * (L // 16)
        ids = torch.randint(0, n, (2, L), dtype=torch.int32)
        for got, expected in zip(sort(ids), op.bucket_sort(ids, n, n + 2, "native"), strict=True):
            assert torch.equal(got, expected)
    assert counter.frame_count <= 2
