"""The models against plain autograd, at any length, with padding, and without the faults of others."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from python_tests.helpers import assert_close, padding_mask
from reformer_kernels import LSHConfig, Reformer, ReformerConfig, ReformerLM, functional
from reformer_kernels.modules import LocalSelfAttention, LSHSelfAttention, RotaryPositions
from reformer_kernels.testing import normal

LSH = LSHConfig(n_hashes=2, chunk_length=8, window="bucket")
SMALL = ReformerConfig(
    vocab_size=30,
    d_model=16,
    layers=("local", "lsh", "full"),
    num_heads=2,
    d_ff=24,
    max_length=200,
    causal=True,
    lsh=LSH,
    local_chunk_length=8,
    init_std=0.3,
)


def small(**options: Any) -> ReformerConfig:
    return dataclasses.replace(SMALL, **options)


def lm(config: ReformerConfig = SMALL, dtype: torch.dtype = torch.float64, seed: int = 0) -> ReformerLM:
    torch.manual_seed(seed)
    return ReformerLM(config).to(dtype)


def tokens_of(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(30, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model: ReformerLM, tokens: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """Of a training step from a fixed random state, by torch.autograd.grad."""
    torch.manual_seed(5)
    loss = model.train()(tokens, labels=tokens, **options)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


DROPOUTS: dict[str, Any] = {"dropout": 0.1, "attention_dropout": 0.2, "local_attention_dropout": 0.3}


@pytest.mark.parametrize(
    "options",
    [
        {},
        DROPOUTS,
        {"positions": "rotary", "activation": "swiglu", "norm": "rms", "token_context": 3},
        {"positions": "rotary", "rotary_hashing": "before", "head_dim": 6, "attention_bias": True},
        {"streams": "mean", "tie_embeddings": True, "positions": "learned", "causal": False},
        {"positions": "sinusoidal", "lsh": LSHConfig.trax(chunk_length=8), "layers": ("lsh",) * 3},
    ],
)
def test_reversible_layers_compute_what_plain_ones_do(options: dict[str, Any]) -> None:
    """Also with the number of hashes changed for one training step, and with padding on both sides."""
    tokens, mask = tokens_of(2, 37), padding_mask([37, 30], 37).roll(-3, 0)
    mask[0] = mask[0].flip(0)
    plain = lm(small(residual="plain", **options))
    for n_hashes in (None, 1, 5):
        call = {"key_padding_mask": mask, "n_hashes": n_hashes}
        loss, grads = loss_and_gradients(plain, tokens, **call)
        assert all(grad.isfinite().all() for grad in grads)
        # Fixed point has 31 bits: its streams agree to about 1e-6 only.
        for residual, tolerance in (("float", 1e-10), ("exact", 3e-4)):
            other = ReformerLM(small(residual=residual, **options)).double()
            other.load_state_dict(plain.state_dict())
            actual, actual_grads = loss_and_gradients(other, tokens, **call)
            assert_close(actual, loss, tolerance)
            largest = max(float(grad.abs().max()) for grad in grads)
            for name, a, e in zip(dict(plain.named_parameters()), actual_grads, grads, strict=True):
                assert (a - e).abs().max() <= tolerance * largest, (residual, name)


def test_a_call_s_hashes_are_those_of_a_model_made_with_them() -> None:
    tokens = tokens_of(1, 60)
    one, three = (lm(small(lsh=dataclasses.replace(LSH, n_hashes=n))) for n in (1, 3))
    expected, grads = loss_and_gradients(three, tokens)
    assert torch.equal(loss_and_gradients(one, tokens, n_hashes=3)[0], expected)
    for a, e in zip(loss_and_gradients(one, tokens, n_hashes=3)[1], grads, strict=True):
        assert torch.equal(a, e)
    assert not torch.equal(loss_and_gradients(one, tokens)[0], expected)


@pytest.mark.parametrize("positions", ["axial", "learned", "sinusoidal", "rotary", "none"])
def test_any_length_trains_and_evaluates(positions: Any) -> None:
    for causal in (True, False):
        options: dict[str, Any] = {"positions": positions, "causal": causal, "max_length": 67}
        if positions == "axial":
            options |= {"axial_shape": (3, 5, 5), "axial_dims": (3, 5, 8)}
        model = lm(small(**options), torch.float32)
        for length in (1, 2, 7, 8, 9, 64, 67):
            tokens = tokens_of(2, length)
            loss = model.train()(tokens, labels=tokens, shift_labels=False)
            loss.backward()
            assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
            logits = model.eval()(tokens)
            assert logits.shape == (2, length, 30) and logits.isfinite().all()
    if positions in ("axial", "learned"):
        with pytest.raises(ValueError, match="make the model with a larger max_length"):
            model(tokens_of(1, 76))


@pytest.mark.parametrize("positions", ["axial", "rotary"])
@pytest.mark.parametrize("causal", [True, False])
def test_padded_rows_equal_rows_alone(positions: Any, causal: bool) -> None:
    """With every kind of layer, whose chunks are cut from the first token on, and padding on both sides."""
    for side in ("right", "left"):
        layers = ("local", "lsh", "full")
        model = lm(small(positions=positions, causal=causal, layers=layers, token_context=2)).eval()
        tokens, lengths = tokens_of(3, 40), (40, 21, 1)
        mask = padding_mask(lengths, 40)
        if side == "left":
            mask = mask.flip(1)
        call = {"bucket_length": 40}
        together = model(tokens, key_padding_mask=mask, **call)
        for row, length in enumerate(lengths):
            one = model(tokens[row][~mask[row]][None], **call)
            assert one.shape[1] == length
            assert_close(together[row][~mask[row]], one[0])
        # The loss counts real targets alone, and nothing that padding holds.
        alone = [model(tokens[row][~mask[row]][None], **call)[0] for row in range(3)]
        if causal:  # each row's last token has nothing to predict
            pairs = [(out[:-1], tokens[row][~mask[row]][1:]) for row, out in enumerate(alone)]
        else:
            pairs = [(out, tokens[row][~mask[row]]) for row, out in enumerate(alone)]
        expected = F.cross_entropy(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))
        assert_close(model(tokens, labels=tokens, key_padding_mask=mask, **call), expected)
        changed = tokens.masked_fill(mask, 29)
        for one, other in ((tokens, changed), (changed, tokens)):
            loss = model(one, labels=other, key_padding_mask=mask, **call)
            assert_close(loss, model(tokens, labels=tokens, key_padding_mask=mask, **call))


def test_position_ids_and_padding_go_together() -> None:
    model = lm().eval()
    tokens, mask = tokens_of(2, 20), padding_mask([20, 13], 20)
    own = torch.arange(20)
    expected = model(tokens, key_padding_mask=mask)
    for ids in (own, own.expand(2, 20)):
        assert_close(model(tokens, key_padding_mask=mask, position_ids=ids)[~mask], expected[~mask])
    moved = model(tokens, position_ids=own + 100)
    assert not torch.allclose(moved, model(tokens))
    with pytest.raises(ValueError, match="position_ids must be"):
        model(tokens, position_ids=own[:5])


@pytest.mark.parametrize("hashing", ["before", "after"])
def test_rotary_positions_turn_what_is_compared_and_by_choice_what_is_hashed(hashing: Any) -> None:
    config = dataclasses.replace(LSH, causal=True)
    rotary = RotaryPositions(8, hashing=hashing)
    layer = LSHSelfAttention(16, 2, config, rotary=rotary, seed=3).double().eval()
    local = LocalSelfAttention(16, 2, chunk_length=8, causal=True, rotary=rotary).double().eval()
    x, positions = normal(2, 60, 16), torch.arange(60) * 3 + 5
    assert rotary.hashing == hashing

    def heads(y: Tensor) -> Tensor:
        return y.unflatten(-1, (2, 8)).transpose(1, 2)

    qk, v = heads(layer.query_key(x)), heads(layer.value(x))
    turned = rotary(qk, positions)
    layout = functional.lsh_layout(turned if hashing == "before" else qk, config, seed=3)
    other = functional.lsh_layout(qk if hashing == "before" else turned, config, seed=3)
    assert not torch.equal(layout.order, other.order)
    expected = functional.attend(turned, v, layout, config).transpose(1, 2).flatten(2)
    assert_close(layer(x, positions=positions), layer.output(expected))
    q, k, v = (heads(part(x)) for part in (local.query, local.key, local.value))
    q, k = rotary(q, positions), rotary(k, positions)
    expected = functional.local_attention(q, k, v, chunk_length=8, causal=True).transpose(1, 2).flatten(2)
    assert_close(local(x, positions=positions), local.output(expected))
    # A model hands its position ids on.
    model, tokens = lm(small(positions="rotary", rotary_hashing=hashing)).eval(), tokens_of(1, 60)
    assert not torch.allclose(model(tokens, position_ids=positions), model(tokens))
    assert_close(model(tokens, position_ids=torch.arange(60)), model(tokens))


def test_embeddings_in_place_of_tokens() -> None:
    model = lm().reformer.eval()
    tokens = tokens_of(2, 20)
    embedded = model.embedding.tokens(tokens)
    assert torch.equal(model(embedded), model(tokens))


def test_the_embedding_holds_the_tokens_before() -> None:
    model = lm(small(token_context=3, positions="none")).reformer
    tokens = torch.tensor([[5, 6, 7, 8], [9, 9, 5, 6]])
    table = model.embedding.tokens.weight
    assert table.shape == (90, 16)
    assert_close(model.embedding(tokens)[0, 3], table[8] + table[30 + 7] + table[60 + 6])
    assert_close(model.embedding(tokens)[0, :2], torch.stack([table[5], table[6] + table[30 + 5]]))
    mask = torch.tensor([[False] * 4, [True, True, False, False]])
    assert_close(model.embedding(tokens, padding=mask)[1, 2:], model.embedding(tokens)[0, :2])
    assert_close(model.embedding(tokens[:1, 3:], before=tokens[:1, 1:3])[0, 0], model.embedding(tokens)[0, 3])


def test_appended_tokens_change_no_earlier_output() -> None:
    tokens = tokens_of(1, 100)
    for bucket_length in (None, 64):
        model = lm(small(layers=("lsh", "local", "lsh"), token_context=2, bucket_length=bucket_length)).eval()
        whole = model(tokens)
        for length in (1, 2, 9, 50, 99):
            assert_close(model(tokens[:, :length]), whole[:, :length], 1e-12)
        assert torch.equal(model(tokens, bucket_length=bucket_length or 200), whole)
        assert not torch.allclose(model(tokens, bucket_length=500), whole)
    # Where later tokens are seen anyway, buckets follow the length.
    model = lm(small(layers=("lsh",), causal=False)).eval()
    assert torch.equal(model(tokens), model(tokens, bucket_length=100))
    assert not torch.allclose(model(tokens), model(tokens, bucket_length=200))


def test_the_loss_is_the_cross_entropy_of_the_logits_and_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_of(2, 33)
    labels = tokens.masked_fill(tokens == 3, -100)
    for causal in (True, False):
        model = lm(small(causal=causal)).eval()
        with torch.no_grad():
            model.head.bias.copy_(normal(30))  # a head's bias counts
        logits = model(tokens)
        shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        aligned = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        assert not torch.allclose(shifted, aligned)
        with monkeypatch.context() as patch:
            patch.setattr(nn.Linear, "forward", refuse_head(model, nn.Linear.forward))
            assert_close(model(tokens, labels=labels), shifted if causal else aligned)
            assert_close(model(tokens, labels=labels, shift_labels=True), shifted)
            assert_close(model(tokens, labels=labels, shift_labels=False), aligned)
    for wrong in (labels[:, 1:], labels.int()):
        with pytest.raises(ValueError, match="labels must be int64"):
            model(tokens, labels=wrong)


def refuse_head(model: ReformerLM, ordinary: Any) -> Any:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        assert self is not model.head, "the loss made whole logits"
        return ordinary(self, x)

    return forward


@pytest.mark.parametrize("length", [1, 9])
def test_a_batch_with_nothing_to_predict_changes_no_parameter(length: int) -> None:
    model, tokens = lm(), tokens_of(2, length)
    labels = tokens if length == 1 else torch.full_like(tokens, -100)  # one token predicts none
    model(tokens, labels=labels).backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    assert model.head.weight.grad is not None


def test_torch_manual_seed_reproduces_training_and_evaluation_draws_nothing() -> None:
    model, tokens = lm(small(**DROPOUTS)), tokens_of(2, 60)
    first, second = (loss_and_gradients(model, tokens) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    torch.manual_seed(6)
    draws = [model(tokens, labels=tokens) for _ in range(3)]  # new rotations and dropout each time
    assert len({draw.item() for draw in draws}) == 3
    model.eval()
    before = torch.get_rng_state()
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "local_attention_dropout"])
def test_every_dropout_drops(name: str) -> None:
    """Changes training and nothing else; residual and output dropout by their own places."""
    tokens = tokens_of(1, 40)
    kind = "local" if name.startswith("local") else "full"
    options: dict[str, Any] = {"layers": (kind,), name: 0.5}
    if name != "local_attention_dropout":
        options["local_attention_dropout"] = 0.0
    model, none = lm(small(**options)), lm(small(layers=(kind,)))
    assert torch.equal(model.eval()(tokens), none.eval()(tokens))
    assert not torch.allclose(model.train()(tokens), none.train()(tokens))
    if name == "dropout":
        reformer = model.reformer
        block = reformer.layers.blocks[0]
        x = torch.ones(1, 500, 16, dtype=torch.float64)
        for part in (block.f, block.g, lambda x: reformer.finish(x, x.flip(-1) * 2)):
            share = float((part(x + normal(1, 500, 16)) == 0).double().mean())
            assert 0.45 < share < 0.55
        embedded = reformer.embedding(tokens)
        assert embedded.unique().numel() > reformer.eval().embedding(tokens).unique().numel() / 4


def saved_bytes(layers: int, residual: Any) -> int:
    """What a training forward keeps for backward, parameters left out."""
    model = lm(small(layers=("local", "lsh") * layers, residual=residual), torch.float32)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    tokens = tokens_of(1, 200)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(tokens, labels=tokens)
    loss.backward()
    return sum(kept.values())


def test_training_keeps_nothing_of_each_layer() -> None:
    for residual in ("float", "exact"):
        assert saved_bytes(6, residual) == saved_bytes(2, residual)
    assert saved_bytes(6, "plain") > 2 * saved_bytes(2, "plain") > 4 * saved_bytes(2, "float")


def test_state_dict_holds_each_parameter_once_and_no_seeds() -> None:
    model = lm()
    state = model.state_dict()
    assert set(state) == set(dict(model.named_parameters()))
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    tied = lm(small(streams="mean", tie_embeddings=True))
    assert tied.head.weight is tied.reformer.embedding.tokens.weight
    tied(tokens_of(1, 9), labels=tokens_of(1, 9)).backward()
    assert tied.head.weight.grad is not None


def test_rotations_can_be_given_for_each_layer() -> None:
    model = lm(small(layers=("lsh", "local", "lsh"))).eval()
    tokens = tokens_of(1, 60)
    drawn = [
        part.attention.seed if isinstance(part.attention, LSHSelfAttention) else None
        for part in (block.f for block in model.reformer.layers.blocks)
    ]
    from reformer_kernels.functional import sample_rotations

    given = [
        None if seed is None else sample_rotations(model.config.lsh_config, 2, 8, seed) for seed in drawn
    ]
    assert drawn == [0, None, 2]
    expected = model(tokens)
    assert torch.equal(model(tokens, rotations=given), expected)
    assert not torch.equal(model(tokens, rotations=given[::-1]), expected)
    with pytest.raises(ValueError, match="one entry"):
        model(tokens, rotations=given[:2])


def test_a_stack_with_16_bit_autocast_rebuilds_under_autocast() -> None:
    """Gradients of the reversible model equal those of the plain one to bfloat16's precision."""
    tokens = tokens_of(2, 60)
    found = []
    for residual in ("plain", "float"):
        model = lm(small(residual=residual, keep_layouts=residual == "float"), torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(5)
            loss = model(tokens, labels=tokens)
        assert loss.dtype == torch.float32
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (found[0] - found[1]).norm() < 2e-2 * found[0].norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be an integer in"),
        ({"layers": ()}, "layers must name the attention of each layer"),
        ({"layers": "lsh"}, "layers must name the attention of each layer"),
        ({"layers": ("lsh", "linear")}, "each of layers must be one of 'lsh', 'local', 'full'"),
        ({"num_heads": 3}, "d_model must be a multiple of num_heads"),
        ({"activation": "tanh"}, "activation must be one of"),
        ({"positions": "rope"}, "positions must be one of"),
        ({"positions": "rotary", "head_dim": 5}, "head_dim must be even for rotary positions"),
        ({"positions": "none", "axial_shape": (4, 4)}, 'axial_shape belongs to positions="axial"'),
        ({"axial_dims": (4, 4)}, "axial_dims must sum to d_model 16"),
        ({"axial_dims": (8, 8), "axial_shape": (2, 2, 2)}, "one size an axis"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"attention_dropout": None}, "attention_dropout must be at least 0"),
        ({"residual": "none"}, "residual must be one of"),
        ({"residual": "exact", "keep_layouts": True}, "keep_layouts is for"),
        ({"tie_embeddings": True}, 'tie_embeddings needs streams="mean"'),
        ({"lsh": {"n_hashes": 2}}, "lsh must be an LSHConfig or None, got dict"),
        ({"local_chunk_length": 0}, "local_chunk_length must be"),
        ({"norm_eps": float("nan")}, "norm_eps must be"),
        ({"token_context": 0}, "token_context must be"),
        ({"causal": 1}, "causal must be True or False"),
    ],
)
def test_configurations_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_configurations_go_through_plain_dictionaries() -> None:
    config = small(
        axial_shape=(10, 20), axial_dims=(4, 12), lsh=dataclasses.replace(LSH, bucket_factors=(4, 8))
    )
    assert ReformerConfig.from_dict(config.to_dict()) == config
    assert config.lsh_config.causal and not small(causal=False).lsh_config.causal
    with pytest.raises(ValueError, match=r"unknown colour, lsh\.colour"):
        ReformerConfig.from_dict({**config.to_dict(), "colour": 1, "lsh": {"colour": 2}})
    with pytest.raises(ValueError, match="no vocab_size"):
        ReformerConfig.from_dict({})
    with pytest.raises(TypeError, match="config must be a ReformerConfig, got dict"):
        Reformer(config.to_dict())  # type: ignore[arg-type]


def test_wrong_input_is_refused() -> None:
    model = lm().eval()
    for wrong, error, message in [
        (torch.zeros(3, dtype=torch.int64), ValueError, "one sequence is"),
        (torch.zeros(1, 0, dtype=torch.int64), ValueError, "at least one token"),
        (torch.zeros(1, 3, dtype=torch.int16), TypeError, r"convert with tokens.long\(\)"),
        (torch.zeros(1, 3, dtype=torch.bool), TypeError, "tokens must be a tensor of integers"),
        (torch.zeros(1, 3, 4), ValueError, r"embeddings must be \(batch, length, 16\)"),
    ]:
        with pytest.raises(error, match=message):
            model(wrong)
    with pytest.raises(ValueError, match="key_padding_mask must be a bool tensor"):
        model(tokens_of(2, 5), key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="n_hashes must be a positive integer"):
        model(tokens_of(2, 5), n_hashes=0)
