"""Cross-attention and encoder-decoder models against attention written out and against plain autograd."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from python_tests.helpers import assert_close, padding_mask
from reformer_kernels import LSHConfig, ReformerConfig, ReformerEncoderDecoder, ReformerLM
from reformer_kernels.functional import lsh_cross_attention
from reformer_kernels.modules import CrossAttention
from reformer_kernels.testing import normal

LSH = LSHConfig(n_hashes=2, chunk_length=4)
ENCODER = ReformerConfig(
    vocab_size=20,
    d_model=12,
    layers=("lsh", "local"),
    num_heads=2,
    d_ff=20,
    lsh=LSH,
    local_chunk_length=8,
    max_length=128,
    init_std=0.4,
)
DECODER = dataclasses.replace(
    ENCODER,
    d_model=16,
    vocab_size=30,
    causal=True,
    cross_attention="full",
    memory_dim=24,
    lsh=dataclasses.replace(LSH, window="bucket"),
)


def model_of(kind: Any = "full", residual: Any = "float", **options: Any) -> ReformerEncoderDecoder:
    torch.manual_seed(0)
    encoder = dataclasses.replace(ENCODER, residual=residual, **options)
    decoder = dataclasses.replace(DECODER, cross_attention=kind, residual=residual, **options)
    return ReformerEncoderDecoder(encoder, decoder).double()


def sides(source: int = 45, target: int = 21) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(20, (2, source), generator=generator),
        torch.randint(30, (2, target), generator=generator),
        padding_mask([source, source - 11], source),
        padding_mask([target - 5, target], target),
    )


def test_cross_attention_is_softmax_over_the_memory() -> None:
    layer = CrossAttention(12, 3, memory_dim=8, head_dim=5, value_dim=6, bias=True, out_bias=True).double()
    x, memory, mask = normal(3, 7, 12), normal(3, 9, 8, seed=1), padding_mask([9, 4, 0], 9)

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (3, -1)).transpose(1, 2)

    q, k, v = heads(layer.query(x)), heads(layer.key(memory)), heads(layer.value(memory))
    for given in (None, mask):
        logits = q @ k.mT * 5**-0.5
        if given is not None:
            logits = logits.masked_fill(mask[:, None, None], -torch.inf)
        weights = logits.softmax(-1).nan_to_num(0)
        expected = layer.output((weights @ v).transpose(1, 2).flatten(2))
        assert_close(layer(x, memory, given), expected)
    memory.requires_grad_()
    layer(x, memory, mask).sum().backward()
    assert memory.grad is not None and memory.grad.isfinite().all()
    assert (memory.grad[mask] == 0).all() and (memory.grad[~mask] != 0).any(-1).all()

    lsh = CrossAttention(12, 3, memory_dim=8, head_dim=5, config=LSH, seed=4).double().eval()
    q, (k, v) = heads(lsh.query(x)), lsh.keys_of(memory)
    for n_hashes in (None, 3):
        config = dataclasses.replace(LSH, n_hashes=n_hashes or 2)
        expected = lsh_cross_attention(q, k, v, config, seed=4, key_padding_mask=mask)
        expected = lsh.output(expected.transpose(1, 2).flatten(2))
        assert_close(lsh(x, memory, mask, n_hashes=n_hashes), expected)
    with pytest.raises(ValueError, match="memory must be"):
        layer(x, normal(3, 9, 7))
    with pytest.raises(ValueError, match="one batch size, got 3 and 1"):
        layer(x, normal(1, 9, 8))


@pytest.mark.parametrize("kind", ["full", "lsh"])
def test_reversible_gradients_are_the_plain_ones(kind: Any) -> None:
    """Of encoder and decoder, through the memory of every layer, with dropout, padding and other hashes."""
    source, target, source_mask, target_mask = sides()
    found = []
    for residual in ("plain", "float", "exact"):
        model = model_of(kind, residual, dropout=0.1, attention_dropout=0.1).train()
        torch.manual_seed(3)
        loss = model(
            source,
            target,
            labels=target,
            source_padding_mask=source_mask,
            target_padding_mask=target_mask,
            n_hashes=3,
        )
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert all(grad.isfinite().all() and grad.any() for grad in grads)
        found.append((loss, torch.cat([grad.flatten() for grad in grads])))
    for (loss, grads), tolerance in zip(found[1:], (1e-10, 1e-4), strict=True):
        assert_close(loss, found[0][0], tolerance)
        assert_close(grads, found[0][1], tolerance)


@pytest.mark.parametrize("kind", ["full", "lsh"])
def test_the_target_sees_the_source_and_no_later_target(kind: Any) -> None:
    source, target, source_mask, _ = sides()
    model = model_of(kind).eval()
    whole = model(source, target, source_padding_mask=source_mask)
    assert whole.shape == (2, 21, 30)
    changed = target.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 30
    other = model(source, changed, source_padding_mask=source_mask)
    assert_close(other[:, :12], whole[:, :12])
    assert not torch.allclose(other[:, 12], whole[:, 12])
    hidden = source.masked_fill(source_mask, 3)
    assert_close(model(hidden, target, source_padding_mask=source_mask), whole)
    moved = source.clone()
    moved[:, 0] = (moved[:, 0] + 1) % 20
    assert not torch.allclose(model(moved, target, source_padding_mask=source_mask), whole)
    for lengths in ((1, 1), (1, 33), (50, 1)):
        source, target, _, _ = sides(50, 33)
        out = model(source[:, : lengths[0]], target[:, : lengths[1]])
        assert out.shape[1] == lengths[1] and out.isfinite().all()


def test_cached_generation_equals_the_model_s_own() -> None:
    source, target, source_mask, _ = sides()
    model = model_of().eval()
    prompt_mask = padding_mask([1, 6], 6)
    found = model.generate(
        source, target[:, :6], 15, key_padding_mask=prompt_mask, source_padding_mask=source_mask
    )
    for row, length in enumerate((1, 6)):
        tokens = torch.cat([target[row, :length], found[row]])[None]
        own = {"source_padding_mask": source_mask[row : row + 1]}
        logits = model(source[row : row + 1], tokens, **own)[0]
        assert torch.equal(logits[length - 1 : -1].argmax(-1), found[row])
    beams = model.generate(source, target[:, :6], 6, beams=2, source_padding_mask=source_mask)
    assert [row.numel() for row in beams] == [6, 6]
    with pytest.raises(ValueError, match='generation needs cross_attention="full"'):
        model_of("lsh").generate(source, target, 3)
    with pytest.raises(ValueError, match="the memory has 2 rows, the prompts 1"):
        model.generate(source, target[:1], 3)


def test_saved_and_loaded_and_checked(tmp_path: Path) -> None:
    source, target, _, _ = sides()
    model = model_of().eval()
    model.save(tmp_path / "model")
    again = ReformerEncoderDecoder.load(tmp_path / "model").eval()
    assert torch.equal(again(source, target), model(source, target))
    for encoder, decoder, message in [
        (dataclasses.replace(ENCODER, causal=True), DECODER, "the encoder must have causal=False"),
        (ENCODER, dataclasses.replace(DECODER, causal=False), "the decoder must have causal=True"),
        (ENCODER, dataclasses.replace(DECODER, memory_dim=None), "give the decoder memory_dim=24"),
    ]:
        with pytest.raises(ValueError, match=message):
            ReformerEncoderDecoder(encoder, decoder)
    with pytest.raises(ValueError, match="a memory belongs to cross-attention: got none"):
        ReformerLM(DECODER)(target)
    memory = model.encoder(source)
    with pytest.raises(ValueError, match="memory_padding_mask must be bool"):
        model.decoder(target, memory=memory, memory_padding_mask=torch.zeros(2, 45))
    with pytest.raises(ValueError, match="one batch size, got 2 and 1"):
        model.decoder(target, memory=memory[:1])
