"""`LSHSelfAttention` and `LocalSelfAttention` as PyTorch modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor

from reformer_kernels import LSHConfig, functional
from reformer_kernels.modules import LocalSelfAttention, LSHSelfAttention

B, L, E, H = 2, 70, 32, 4
CONFIG = LSHConfig(n_hashes=2, chunk_length=16, causal=True)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(B, L, E, generator=torch.Generator().manual_seed(1))


def lsh(**options: object) -> LSHSelfAttention:
    torch.manual_seed(0)
    return LSHSelfAttention(E, H, CONFIG, **options)  # type: ignore[arg-type]


def local(**options: object) -> LocalSelfAttention:
    torch.manual_seed(0)
    return LocalSelfAttention(E, H, chunk_length=16, causal=True, **options)  # type: ignore[arg-type]


BOTH = pytest.mark.parametrize("make", [lsh, local])


def heads(flat: Tensor, size: int) -> Tensor:
    return flat.unflatten(-1, (H, size)).transpose(1, 2)


def test_lsh_is_projections_around_the_function(x: Tensor) -> None:
    layer = lsh(value_dim=12, bias=True, out_bias=True).eval()
    qk = heads(x @ layer.query_key.weight.T + layer.query_key.bias, E // H)
    v = heads(x @ layer.value.weight.T + layer.value.bias, 12)
    attended = functional.lsh_attention(qk, v, CONFIG, seed=0).transpose(1, 2).flatten(2)
    expected = attended @ layer.output.weight.T + layer.output.bias
    assert layer(x).shape == (B, L, E)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_local_is_projections_around_the_function(x: Tensor) -> None:
    layer = local(head_dim=6).eval()
    q, k, v = (heads(projection(x), 6) for projection in (layer.query, layer.key, layer.value))
    attended = functional.local_attention(q, k, v, chunk_length=16, causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.output(attended), rtol=1e-5, atol=1e-6)


def test_training_draws_new_rotations_that_manual_seed_repeats(x: Tensor) -> None:
    layer = lsh().train()
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    again = layer(x)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_evaluation_fixes_rotations_by_the_constructor_seed(x: Tensor) -> None:
    layer = lsh().eval()
    other = lsh(seed=1).eval()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(torch.get_rng_state(), before), "evaluation drew from the global generator"
    assert not torch.equal(layer(x), other(x))


def test_a_given_seed_or_rotations_or_layout_replace_the_modes(x: Tensor) -> None:
    layer = lsh().train()
    seeded = layer(x, seed=3)
    assert torch.equal(seeded, layer(x, seed=torch.tensor(3)))
    rotations = functional.sample_rotations(CONFIG, H, E // H, 3)
    assert torch.equal(seeded, layer(x, rotations=rotations))
    qk = heads(layer.query_key(x), E // H)
    layout = functional.lsh_layout(qk, CONFIG, rotations=rotations)
    assert torch.equal(seeded, layer(x, layout=layout))


def test_rounds_of_one_call(x: Tensor) -> None:
    layer = lsh().eval()
    more = layer(x, n_hashes=4)
    assert not torch.equal(more, layer(x))
    assert layer.config.n_hashes == 2
    four = LSHSelfAttention(E, H, LSHConfig(n_hashes=4, chunk_length=16, causal=True)).eval()
    four.load_state_dict(layer.state_dict())
    assert torch.equal(more, four(x))


def test_state_dict_holds_the_projections_alone() -> None:
    assert set(lsh().state_dict()) == {"query_key.weight", "value.weight", "output.weight"}
    assert set(local().state_dict()) == {"query.weight", "key.weight", "value.weight", "output.weight"}


@pytest.mark.parametrize(("make", "name"), [(lsh, "lsh_attention"), (local, "local_attention")])
def test_heads_are_views_of_the_projections(
    make: object, name: str, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make()  # type: ignore[operator]
    storages = []
    for projection in layer.children():
        projection.register_forward_hook(
            lambda module, inputs, out: storages.append(out.untyped_storage().data_ptr())
        )
    real = getattr(functional, name)
    seen: list[Tensor] = []

    def spy(*args: object, **kwargs: object) -> Tensor:
        seen.extend(argument for argument in args if isinstance(argument, Tensor))
        return real(*args, **kwargs)

    monkeypatch.setattr(functional, name, spy)
    layer(x)
    assert seen
    assert [tensor.untyped_storage().data_ptr() for tensor in seen] == storages[: len(seen)]
    assert all(tensor.shape[:3] == (B, H, L) and tensor.stride(-1) == 1 for tensor in seen)


@pytest.mark.parametrize(
    "layer",
    [
        LSHSelfAttention(E, H, LSHConfig(n_hashes=2, chunk_length=16)),
        LocalSelfAttention(E, H, chunk_length=16, chunks_after=1),
    ],
)
def test_padding_keys_change_nothing(layer: torch.nn.Module, x: Tensor) -> None:
    layer.eval()
    mask = torch.zeros(B, L, dtype=torch.bool)
    mask[:, 50:] = True
    changed = x.clone()
    changed[:, 50:] = 1e3
    assert torch.equal(layer(x, mask)[:, :50], layer(changed, mask)[:, :50])
    # Neither is causal, so without the mask the padding is seen.
    assert not torch.equal(layer(x)[:, :50], layer(changed)[:, :50])


@BOTH
def test_every_parameter_gets_a_gradient(make: object, x: Tensor) -> None:
    layer = make()  # type: ignore[operator]
    x.requires_grad_()
    layer(x).square().sum().backward()
    for name, tensor in [("x", x), *layer.named_parameters()]:
        assert tensor.grad is not None, name
        assert torch.isfinite(tensor.grad).all(), name
        assert tensor.grad.abs().sum() > 0, name


@BOTH
def test_dropout_in_training_only(make: object, x: Tensor) -> None:
    layer = make(dropout=0.5)  # type: ignore[operator]
    without = make()  # type: ignore[operator]
    assert torch.equal(layer.eval()(x), without.eval()(x))
    layer.train()
    kwargs = {"seed": 3}
    assert not torch.equal(layer(x, **kwargs), without.train()(x, **kwargs))
    assert torch.equal(layer(x, **kwargs), layer(x, **kwargs))
    torch.manual_seed(2)
    first = layer(x)
    torch.manual_seed(2)
    assert torch.equal(first, layer(x))


@BOTH
def test_copies_compute_the_same(make: object, x: Tensor) -> None:
    layer = make().eval()  # type: ignore[operator]
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    fresh = make().eval()  # type: ignore[operator]
    for parameter in fresh.parameters():
        torch.nn.init.zeros_(parameter)
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(fresh(x), expected)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_modules(make: object, dtype: torch.dtype, x: Tensor) -> None:
    layer = make().eval()  # type: ignore[operator]
    low = copy.deepcopy(layer).to(dtype)
    out = low(x.to(dtype))
    assert out.dtype == dtype
    # The layout may differ where a hash nearly ties, so most values are compared and not all.
    error = (out.float() - layer(x)).abs()
    assert error.median() < 0.01
    assert error.median() > 0


@BOTH
def test_float64_modules(make: object, x: Tensor) -> None:
    layer = make().eval()  # type: ignore[operator]
    out = copy.deepcopy(layer).double()(x.double())
    assert out.dtype == torch.float64
    assert (out - layer(x)).abs().median() < 1e-5


@BOTH
def test_autocast(make: object, x: Tensor) -> None:
    layer = make()  # type: ignore[operator]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x, seed=0)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


@BOTH
def test_inference_mode_equals_no_grad(make: object, x: Tensor) -> None:
    layer = make().eval()  # type: ignore[operator]
    with torch.inference_mode():
        inferred = layer(x)
    with torch.no_grad():
        assert torch.equal(inferred.clone(), layer(x))


@BOTH
def test_compiles_whole(make: object, x: Tensor) -> None:
    """Both modes compile to one graph. Inductor is left out, as it would test torch and not us."""
    layer = make()  # type: ignore[operator]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        layer.train(training)
        leaf = x.clone().requires_grad_()
        expected_leaf = x.clone().requires_grad_()
        out = compiled(leaf, seed=4)
        expected = layer(expected_leaf, seed=4)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        out.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(leaf.grad, expected_leaf.grad, rtol=1e-4, atol=1e-5)
    layer.train()
    torch.manual_seed(1)
    drawn = compiled(x)
    assert not torch.equal(drawn, compiled(x)) or make is local


@BOTH
def test_repr_names_what_was_chosen(make: object) -> None:
    layer = make(dropout=0.25)  # type: ignore[operator]
    text = repr(layer)
    for part in (
        "embed_dim=32",
        "num_heads=4",
        "head_dim=8",
        "dropout=0.25",
        "chunk_length=16",
        "causal=True",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((30, 4), {}, "embed_dim must be a multiple of num_heads"),
        ((0, 4), {}, "embed_dim must be a positive integer, got 0"),
        ((32, -1), {}, "num_heads must be a positive integer, got -1"),
        ((32, 4), {"head_dim": 257}, "head_dim must be at most 256, got 257"),
        ((32, 4), {"value_dim": 0}, "value_dim must be a positive integer"),
        ((32, 4), {"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ((32, 4), {"dropout": float("nan")}, "dropout must be"),
    ],
)
@pytest.mark.parametrize("kind", [LSHSelfAttention, LocalSelfAttention])
def test_wrong_sizes_are_refused(kind: type, arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(*arguments, **options)


def test_wrong_configurations_are_refused() -> None:
    with pytest.raises(TypeError, match=r"config must be an LSHConfig, .*got dict"):
        LSHSelfAttention(32, 4, {"n_hashes": 2})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_length must be a positive integer"):
        LocalSelfAttention(32, 4, chunk_length=0)
    with pytest.raises(ValueError, match="chunks_before must be an integer of at least 0"):
        LocalSelfAttention(32, 4, chunks_before=-1)


@BOTH
def test_wrong_inputs_are_refused(make: object, x: Tensor) -> None:
    layer = make()  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"x must have shape \(batch, length, 32\), got \(2, 70, 31\)"):
        layer(x[..., :31])
    with pytest.raises(ValueError, match="add a batch dimension"):
        layer(x[0])
    with pytest.raises((ValueError, TypeError)):
        layer(x, torch.zeros(B, L + 1, dtype=torch.bool))


def test_wrong_rounds_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="n_hashes must be a positive integer, got 0"):
        lsh()(x, n_hashes=0)


def test_an_unknown_back_end_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="backend"):
        lsh(backend="fast")(x)


@BOTH
def test_empty_batch_and_length_one(make: object) -> None:
    layer = make()  # type: ignore[operator]
    assert layer(torch.zeros(0, 20, E)).shape == (0, 20, E)
    assert layer(torch.randn(1, 1, E)).shape == (1, 1, E)
