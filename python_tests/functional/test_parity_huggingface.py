"""`LSHConfig.trax()` and `local_attention` against transformers' Reformer layers, run live in float64.

Ours run in float64 through the reference, and in float32 through the native kernels on the same layout.

The layers project hidden states; here the projections are the hidden states' own columns, so that both sides
take the same qk and v. In float32 the peer's -1e5 self mask rounds its logits, so float64 it is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LocalSelfAttention, LSHSelfAttention

from python_tests.helpers import NATIVE, assert_close, gradients, padding_mask
from reformer_kernels import LSHConfig
from reformer_kernels import functional as F
from reformer_kernels.testing import TOLERANCE, normal

B, H, D = 2, 3, 4


def peer_config(**options: Any) -> ReformerConfig:
    return ReformerConfig(
        attention_head_size=D,
        num_attention_heads=H,
        hidden_size=H * D,
        lsh_attention_probs_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        max_position_embeddings=1024,
        **options,
    )


def run_peer(layer: torch.nn.Module, names: list[str], inputs: list[Tensor], mask: Tensor | None) -> Tensor:
    """The peer's output (B, H, L, D), its projections `names` replaced by `inputs` (B, H, L, D)."""
    for name, x in zip(names, inputs, strict=True):
        setattr(layer, name, Constant(x.transpose(1, 2).flatten(2)))
    length = inputs[0].shape[2]
    hidden = torch.zeros(B, length, H * D, dtype=torch.float64)
    tokens = None if mask is None else (~mask).long()
    out = layer.double()(hidden, attention_mask=tokens).hidden_states
    return out.view(B, length, H, D).transpose(1, 2)


class Constant(torch.nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: Tensor) -> Tensor:
        return self.value


DTYPE = {"reference": torch.float64, "native": torch.float32}


def compare(ours: Tensor, theirs: Tensor, inputs: list[Tensor], mask: Tensor | None) -> None:
    """Outputs and gradients at tokens; at padding both sides differ by choice."""
    tolerance = TOLERANCE[ours.dtype]
    if mask is not None:
        ours, theirs = (out.masked_fill(mask[:, None, :, None], 0) for out in (ours, theirs))
    assert theirs.abs().max() > 0.1
    assert_close(ours, theirs, tolerance)
    for a, e in zip(gradients([ours], inputs), gradients([theirs], inputs), strict=True):
        assert e.abs().max() > 0.1
        assert_close(a, e, tolerance)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("n_hashes", [1, 2, 4])
@pytest.mark.parametrize(
    ("buckets", "before", "after", "L"),
    [
        (8, 1, 0, 32),
        ([2, 4], 1, 0, 32),
        ([4, 2, 2], 0, 0, 40),
        (4, 1, 1, 24),
        (6, 2, 1, 48),
        (4, 0, 2, 24),
        (4, 1, 1, 16),  # two chunks: keys met twice on the ring
        (8, 2, 2, 16),  # as many neighbours as chunks; of more, the peer's slices no longer wrap
        (8, 1, 1, 8),  # one chunk: no hashing
        (8, 1, 0, 5),
    ],
)
def test_trax_equals_lsh_self_attention(
    backend: str,
    causal: bool,
    padded: bool,
    n_hashes: int,
    buckets: Any,
    before: int,
    after: int,
    L: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = LSHConfig.trax(
        n_hashes=n_hashes,
        chunk_length=8,
        chunks_before=before,
        chunks_after=after,
        bucket_factors=buckets,
        causal=causal,
    )
    rotations = F.sample_rotations(config, H, D, seed=5)
    qk, v = normal(B, H, L, D).requires_grad_(), normal(B, H, L, D, seed=1).requires_grad_()
    mask = padding_mask([L, (2 * L) // 3], L) if padded else None
    layout = F.lsh_layout(qk, config, rotations=rotations, key_padding_mask=mask)
    dtype = DTYPE[backend]
    ours = F.lsh_attention(
        qk.to(dtype), v.to(dtype), config, layout=layout, key_padding_mask=mask, backend=backend
    )

    layer = LSHSelfAttention(
        peer_config(
            lsh_attn_chunk_length=8,
            lsh_num_chunks_before=before,
            lsh_num_chunks_after=after,
            num_hashes=n_hashes,
            num_buckets=buckets,
            is_decoder=causal,
        ),
        layer_idx=0,
    )
    drawn = []

    def randn(shape: tuple[int, ...], **kwargs: Any) -> Tensor:
        drawn.append(shape)
        return rotations.double()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", randn)
        theirs = run_peer(layer, ["query_key", "value"], [qk, v], mask)
    assert drawn == ([tuple(rotations.shape)] if L > 8 else [])
    compare(ours, theirs, [qk, v], mask)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("before", "after", "L"), [(1, 0, 32), (1, 1, 40), (2, 1, 24), (0, 0, 16), (1, 1, 16), (1, 1, 7)]
)
def test_local_attention_equals_local_self_attention(
    backend: str, causal: bool, padded: bool, before: int, after: int, L: int
) -> None:
    q, k, v = (normal(B, H, L, D, seed=s).requires_grad_() for s in range(3))
    mask = padding_mask([L, (2 * L) // 3], L) if padded else None
    ours = F.local_attention(
        *(x.to(DTYPE[backend]) for x in (q, k, v)),
        backend=backend,
        chunk_length=8,
        chunks_before=before,
        chunks_after=after,
        causal=causal,
        ring=True,
        key_padding_mask=mask,
    )
    layer = LocalSelfAttention(
        peer_config(
            local_attn_chunk_length=8,
            local_num_chunks_before=before,
            local_num_chunks_after=after,
            is_decoder=causal,
        )
    )
    theirs = run_peer(layer, ["query", "key", "value"], [q, k, v], mask)
    compare(ours, theirs, [q, k, v], mask)


def test_wrap_matters() -> None:
    q, k, v = (normal(B, H, 24, D, seed=s) for s in range(3))
    wrapped, clipped = (F.local_attention(q, k, v, chunk_length=8, ring=w) for w in (True, False))
    assert torch.equal(wrapped[:, :, 8:], clipped[:, :, 8:])
    assert not torch.isclose(wrapped[:, :, :8], clipped[:, :, :8]).all(-1).any()
