from __future__ import annotations

import pytest
import torch

from reformer_kernels.ops.sort.reference import bucket_sort


@pytest.mark.parametrize("kind", ["random", "equal", "distinct", "reversed", "one huge"])
@pytest.mark.parametrize("L", [1, 2, 7, 65])
def test_definition(kind: str, L: int) -> None:
    n = 70
    ids = {
        "random": torch.randint(0, n, (2, 3, 2, L)),
        "equal": torch.full((2, 3, 2, L), 5),
        "distinct": torch.arange(L).expand(2, 3, 2, L),
        "reversed": torch.arange(L).flip(0).expand(2, 3, 2, L),
        "one huge": torch.randint(0, n, (2, 3, 2, L)) * (torch.rand(2, 3, 2, L) < 0.1),
    }[kind]
    order, starts = bucket_sort(ids.int(), n, n + 3)
    assert order.dtype == starts.dtype == torch.int32
    assert order.shape == ids.shape and starts.shape == (2, 3, 2, n + 3)
    for row, o, s in zip(ids.flatten(0, 2), order.flatten(0, 2), starts.flatten(0, 2), strict=True):
        values = row.tolist()
        assert o.tolist() == sorted(range(L), key=lambda p: (values[p], p))
        assert s.tolist() == [sum(value < x for value in values) for x in range(n + 3)]


def test_ids_out_of_range_count_as_the_nearest() -> None:
    order, starts = bucket_sort(torch.tensor([3, -1, 2**31 - 1, 0, -(2**31), 1], dtype=torch.int32), 3, 4)
    assert order.tolist() == [1, 3, 4, 5, 0, 2]
    assert starts.tolist() == [0, 3, 4, 6]


def test_empty_batch() -> None:
    order, starts = bucket_sort(torch.empty((0, 1, 2, 5), dtype=torch.int32), 4, 6)
    assert order.shape == (0, 1, 2, 5) and starts.shape == (0, 1, 2, 6)
