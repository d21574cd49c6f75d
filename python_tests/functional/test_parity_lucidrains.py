"""`LSHConfig.lucidrains()` against reformer_pytorch's `LSHAttention`, run live in float64.

Ours run in float64 through the reference, and in float32 through the native kernels on the same layout.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reformer_pytorch.reformer_pytorch import LSHAttention  # type: ignore[import-untyped]
from torch import Tensor

from python_tests.helpers import NATIVE, assert_close, gradients, layout_from_buckets, padding_mask
from reformer_kernels import LSHConfig
from reformer_kernels import functional as F
from reformer_kernels.testing import TOLERANCE, normal, relative_error

N, D, CHUNK = 4, 5, 4  # the peer folds heads into the batch; here they are all heads of one batch


def run_peer(
    qk: Tensor,
    v: Tensor,
    rotations: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    input_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The peer's output (1, N, L, D), and its bucket ids (1, N, R, L)."""
    n_hashes, n_buckets = rotations.shape[2], 2 * rotations.shape[3]
    layer = LSHAttention(bucket_size=CHUNK, n_hashes=n_hashes, random_rotations_per_head=True, **options)

    def randn(shape: tuple[int, ...], **kwargs: Any) -> Tensor:
        assert shape == tuple(rotations.shape), shape
        return rotations.double()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", randn)
        out, _, buckets = layer(qk[0], v[0], input_mask=input_mask)
    buckets = buckets.view(1, N, n_hashes, -1) - n_buckets * torch.arange(n_hashes)[:, None]
    return out[None], buckets


def setup(L: int, **fields: Any) -> tuple[LSHConfig, Tensor, Tensor, Tensor]:
    config = LSHConfig.lucidrains(chunk_length=CHUNK, bucket_factors=L // CHUNK, **fields)
    qk, v = normal(1, N, L, D).requires_grad_(), normal(1, N, L, D, seed=1).requires_grad_()
    return config, qk, v, F.sample_rotations(config, N, D, seed=3)


def compare(ours: Tensor, theirs: Tensor, inputs: list[Tensor], tolerance: float = 0.0) -> None:
    tolerance = max(tolerance, TOLERANCE[ours.dtype])
    assert theirs.abs().max() > 0.1
    assert_close(ours, theirs, tolerance)
    for a, e in zip(gradients([ours], inputs), gradients([theirs], inputs), strict=True):
        assert e.abs().max() > 0.1
        assert_close(a, e, tolerance)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("n_hashes", [1, 2, 4])
@pytest.mark.parametrize("L", [8, 16, 40])
def test_lucidrains_equals_lsh_attention(
    backend: str, causal: bool, across: bool, n_hashes: int, L: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, qk, v, rotations = setup(L, n_hashes=n_hashes, causal=causal, attend_across_buckets=across)
    theirs, buckets = run_peer(qk, v, rotations, monkeypatch, causal=causal, attend_across_buckets=across)
    assert torch.equal(F.lsh_hash(qk, rotations, L // CHUNK), buckets.int())
    layout = F.lsh_layout(qk, config, rotations=rotations)
    dtype = torch.float32 if backend == "native" else torch.float64
    compare(F.attend(qk.to(dtype), v.to(dtype), layout, config, backend=backend), theirs, [qk, v])


@pytest.mark.parametrize("causal", [False, True])
def test_padding(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer hashes padding like any token, so the layout is made of its buckets."""
    config, qk, v, rotations = setup(24, n_hashes=2, causal=causal)
    mask = padding_mask([17], 24)
    theirs, buckets = run_peer(qk, v, rotations, monkeypatch, ~mask.expand(N, -1), causal=causal)
    ours = F.attend(qk, v, layout_from_buckets(buckets, 6), config, key_padding_mask=mask)
    compare(ours[:, :, :17], theirs[:, :, :17], [qk, v])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_hashes", [1, 3])
def test_duplicate_correction(causal: bool, n_hashes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside buckets, where the peer's count of a pair is right but for its 1e-9."""
    config, qk, v, rotations = setup(
        40, n_hashes=n_hashes, causal=causal, attend_across_buckets=False, correct_duplicates=True
    )
    theirs, _ = run_peer(
        qk,
        v,
        rotations,
        monkeypatch,
        causal=causal,
        attend_across_buckets=False,
        allow_duplicate_attention=False,
    )
    compare(F.lsh_attention(qk, v, config, rotations=rotations), theirs, [qk, v], 1e-6)


def test_duplicate_correction_across_buckets_differs_from_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its count is 0 for pairs that only the ring joins; log(0 + 1e-9) swamps the rest: not reproduced."""
    config, qk, v, rotations = setup(16, n_hashes=3, correct_duplicates=True)
    theirs, _ = run_peer(qk, v, rotations, monkeypatch, allow_duplicate_attention=False)
    assert relative_error(theirs, F.lsh_attention(qk, v, config, rotations=rotations)) > 0.1
