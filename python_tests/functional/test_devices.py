"""Random numbers and layouts do not depend on torch's default device, and devices are never mixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from python_tests.helpers import NATIVE, qkv
from reformer_kernels import Layout, LSHConfig
from reformer_kernels import functional as F

CONFIG = LSHConfig(n_hashes=2, chunk_length=8)


def all_functions(seed: Any, backend: str) -> list[torch.Tensor]:
    q, k, v = (x.float() for x in CPU_ROWS)
    options: dict[str, Any] = {"seed": seed, "backend": backend}
    rotations = F.sample_rotations(CONFIG, 2, 8, seed)
    ids = F.lsh_hash(q, rotations, (4, 2), backend=backend)
    return [
        rotations,
        ids,
        F.bucket_sort(ids, 8, backend),
        F.lsh_layout(q, CONFIG, **options).order,
        *(layout.order for layout in F.lsh_cross_layout(q, k, CONFIG, **options)),
        F.lsh_attention(q, v, CONFIG, dropout_p=0.1, **options),
        F.lsh_cross_attention(q, k, v, CONFIG, dropout_p=0.1, **options),
        F.local_attention(q, k, v, chunk_length=8, dropout_p=0.1, **options),
    ]


CPU_ROWS = qkv(1, 2, 40, 8)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("seed", [3, None])
def test_the_default_device_changes_nothing(seed: int | None, backend: str) -> None:
    torch.manual_seed(1)
    expected = all_functions(seed, backend)
    torch.manual_seed(1)
    with torch.device("meta"):
        results = all_functions(seed, backend)
    assert all(x.device.type == "cpu" for x in results)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_a_seed_or_rotations_without_values_are_refused() -> None:
    q = CPU_ROWS[0]
    no_seed = torch.zeros((), dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="seed must hold a number, got a tensor on the meta device"):
        F.sample_rotations(CONFIG, 2, 8, no_seed)
    with pytest.raises(ValueError, match="seed must hold a number"):
        F.lsh_attention(q, q, CONFIG, seed=no_seed)
    with pytest.raises(ValueError, match="rotations must be on the CPU or on cpu, got meta"):
        F.lsh_layout(q, CONFIG, rotations=torch.zeros(2, 8, 2, 128, device="meta"))


def test_each_function_refuses_a_second_device() -> None:
    q, k, v = CPU_ROWS
    far, mask = v.to("meta"), torch.zeros(1, 40, dtype=torch.bool, device="meta")
    layout = F.lsh_layout(q, CONFIG, seed=0)
    far_layout = Layout(layout.order.to("meta"), layout.bucket_starts.to("meta"))
    for call in (
        lambda: F.lsh_attention(q, far, CONFIG, seed=0),
        lambda: F.lsh_attention(q, v, CONFIG, layout=far_layout),
        lambda: F.attend(q, v, far_layout, CONFIG),
        lambda: F.attend(q, v, layout, CONFIG, k=far),
        lambda: F.lsh_cross_attention(q, far, v, CONFIG, seed=0),
        lambda: F.lsh_cross_layout(q, far, CONFIG, seed=0),
        lambda: F.local_attention(q, k, far),
        lambda: F.lsh_layout(q, CONFIG, seed=0, key_padding_mask=mask),
    ):
        with pytest.raises(ValueError, match=r"must be on"):
            call()
