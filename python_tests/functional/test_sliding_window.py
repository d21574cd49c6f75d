"""The exact sliding window, against torch's attention with the mask written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reformer_kernels.functional import sliding_window_attention


def band(length: int, window: int, causal: bool) -> Tensor:
    difference = torch.arange(length)[:, None] - torch.arange(length)
    seen = difference.abs() < window
    return seen & (difference >= 0) if causal else seen


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "window"), [(1, 1), (7, 3), (130, 1), (300, 65), (257, 64), (200, 500)])
def test_equals_torch(length: int, window: int, causal: bool, backend: str) -> None:
    q, k, v = (torch.randn(2, 3, length, 32, requires_grad=True) for _ in range(3))
    out = sliding_window_attention(q, k, v, window, causal=causal, scale=0.3, backend=backend)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=band(length, window, causal), scale=0.3)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_padding_and_bias() -> None:
    q, k, v = (torch.randn(2, 2, 100, 16) for _ in range(3))
    padding = torch.zeros(2, 100, dtype=torch.bool)
    padding[1, 40:60] = True
    seen = band(100, 30, False) & ~padding[:, None, None]
    out = sliding_window_attention(q, k, v, 30, key_padding_mask=padding)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    real = ~padding[:, None, :, None]
    torch.testing.assert_close(out.where(real, 0), expected.where(real, 0), atol=1e-5, rtol=1e-4)
    padding[1, :] = True
    assert (sliding_window_attention(q, k, v, 30, key_padding_mask=padding)[1] == 0).all()


def test_wrong_arguments() -> None:
    x = torch.randn(1, 1, 10, 8)
    for window in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="window"):
            sliding_window_attention(x, x, x, window)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="causal"):
        sliding_window_attention(x, x, x, 3, causal=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must"):
        sliding_window_attention(x, x[..., :5, :], x, 3)
