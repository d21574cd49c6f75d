"""What a float key padding mask means, the same on every back end."""

from __future__ import annotations

import pytest
import torch

from python_tests.helpers import NATIVE, padding_mask, qkv
from reformer_kernels import LSHConfig
from reformer_kernels import functional as F


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_nan_in_a_padding_mask_is_padding(backend: str) -> None:
    q, k, v = qkv(2, 2, 40, 8, dtype=torch.float32)
    config = LSHConfig(n_hashes=2, chunk_length=8)
    hidden = torch.zeros(2, 40).masked_fill(padding_mask([33, 21], 40), float("-inf"))
    with_nan = hidden.masked_fill(hidden == float("-inf"), float("nan"))
    for call in (
        lambda mask: F.lsh_attention(q, v, config, seed=0, key_padding_mask=mask, backend=backend),
        lambda mask: F.lsh_cross_attention(q, k, v, config, seed=0, key_padding_mask=mask, backend=backend),
        lambda mask: F.local_attention(q, k, v, chunk_length=8, key_padding_mask=mask, backend=backend),
        lambda mask: F.lsh_layout(q, config, seed=0, key_padding_mask=mask, backend=backend).order,
    ):
        assert torch.equal(call(with_nan), call(hidden))
