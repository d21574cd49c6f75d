"""`replace_attention`, and `MultiheadAttention` in torch's Transformer layers: it must run, in every mode."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from python_tests.helpers import assert_close, gradients, padding_mask
from reformer_kernels import LSHConfig, MultiheadAttention, replace_attention

E, H, LAYERS, LENGTH = 16, 2, 2, 40
SPARSE: dict[str, Any] = {"config": LSHConfig(n_hashes=2, chunk_length=4), "full_attention_threshold": 0}
"""LSH attention that is far from full attention at LENGTH."""
ALL_SEEN: dict[str, Any] = {"config": LSHConfig(chunk_length=64), "full_attention_threshold": 0}
"""LSH attention that equals full attention."""
EXACT: dict[str, Any] = {"full_attention_threshold": LENGTH}


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    options = {"batch_first": True, "dropout": 0.0, **options}
    return nn.TransformerEncoderLayer(E, H, 24, dtype=torch.float64, **options)


def encoder(**options: Any) -> nn.TransformerEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors, and of what keeps them from use
        return nn.TransformerEncoder(layer(**options), LAYERS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What our module computed, call for call: "lsh" or "full"."""
    seen: list[str] = []
    for name, kind in (("_lsh_attention", "lsh"), ("_full_attention", "full")):
        real = getattr(MultiheadAttention, name)

        def spy(self: Any, *args: Any, real: Any = real, kind: str = kind, **kwargs: Any) -> Any:
            seen.append(kind)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(MultiheadAttention, name, spy)
    return seen


MODES: dict[str, Any] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": nullcontext,
}


# torch's encoder and decoder layers


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_encoders_never_compute_past_the_module(
    mode: Any, norm_first: bool, padded: bool, calls: list[str]
) -> None:
    """In evaluation torch's encoders would hand the weights to a fused kernel, and pad by nested tensors."""
    plain = encoder(norm_first=norm_first).eval()
    x = torch.randn(3, LENGTH, E, dtype=torch.float64)
    padding = padding_mask([LENGTH, 25, 9], LENGTH) if padded else None
    valid = torch.ones(3, LENGTH, dtype=torch.bool) if padding is None else ~padding
    with mode():
        expected = plain(x, src_key_padding_mask=padding)
        for options, kind, same in ((SPARSE, "lsh", False), (ALL_SEEN, "lsh", True), (EXACT, "full", True)):
            model = copy.deepcopy(plain)
            assert len(replace_attention(model, **options).replaced) == LAYERS
            calls.clear()
            out = model(x, src_key_padding_mask=padding)
            assert calls == [kind] * LAYERS
            assert out.shape == expected.shape
            error = (out - expected)[valid].abs().amax(-1)
            assert error.max() < 1e-10 if same else error.median() > 1e-2
            # What the encoder itself decides, such as zeros at padding, stays.
            assert torch.equal(out[~valid] == 0, expected[~valid] == 0)


@pytest.mark.parametrize("options", [SPARSE, EXACT])
def test_built_in_rather_than_replaced(options: dict[str, Any], calls: list[str]) -> None:
    one = layer()
    one.self_attn = MultiheadAttention(E, H, batch_first=True, dtype=torch.float64, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.TransformerEncoder(one, LAYERS).eval()
    x = torch.randn(3, LENGTH, E, dtype=torch.float64)
    with torch.no_grad():
        out = model(x, src_key_padding_mask=padding_mask([LENGTH, 20, 3], LENGTH))
        one.eval()(x)
    assert len(calls) == LAYERS + 1 and out.shape == x.shape


def test_a_torch_that_would_bypass_the_module_is_stopped() -> None:
    one = layer().eval()
    replace_attention(one, **SPARSE)
    one.self_attn._forward_pre_hooks.clear()  # what makes torch call the module
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"past reformer_kernels\.MultiheadAttention"):
        one(torch.randn(3, LENGTH, E, dtype=torch.float64))


@pytest.mark.parametrize("kdim", [None, 6])
def test_the_flag_of_equal_sizes_is_torchs(kdim: int | None) -> None:
    theirs, ours = (kind(E, H, kdim=kdim) for kind in (nn.MultiheadAttention, MultiheadAttention))
    assert ours._qkv_same_embed_dim == theirs._qkv_same_embed_dim == (kdim is None)
    replace_attention(theirs)
    assert theirs._qkv_same_embed_dim == (kdim is None)


def test_torchs_name_may_be_set_to_this_class() -> None:
    """In a process of its own, as it changes torch for all that follows."""
    program = """
import torch, reformer_kernels
theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
torch.nn.MultiheadAttention = reformer_kernels.MultiheadAttention
ours = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
ours.load_state_dict(theirs.state_dict())
x = torch.randn(1, 5, 8)
for need_weights in (True, False):
    with torch.no_grad():
        torch.testing.assert_close(ours(x, x, x, need_weights=need_weights)[0], theirs(x, x, x)[0])
assert reformer_kernels.replace_attention(theirs).replaced == ("",)
assert not reformer_kernels.replace_attention(ours)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", ["mask", "hint", "both", "none"])
def test_causal_encoders(given: str, training: bool, calls: list[str]) -> None:
    plain = encoder().train(training)
    model = copy.deepcopy(plain)
    replace_attention(model, **ALL_SEEN, fallback="raise")
    x = torch.randn(3, LENGTH, E, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.float64)
    out = model(x, mask=mask if given in ("mask", "both") else None, is_causal=given in ("hint", "both"))
    assert calls == ["lsh"] * LAYERS
    assert_close(out, plain(x, mask=None if given == "none" else mask))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_encoder_decoder_models(batch_first: bool, training: bool, calls: list[str]) -> None:
    plain = nn.Transformer(E, H, 1, 2, 24, dropout=0.0, batch_first=batch_first, dtype=torch.float64)
    model = copy.deepcopy(plain.train(training))
    report = replace_attention(model, **ALL_SEEN, fallback="raise")
    assert len(report.replaced) == 5 and not report.kept
    source, target = (torch.randn(3, n, E, dtype=torch.float64) for n in (30, 20))
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    mask = nn.Transformer.generate_square_subsequent_mask(20, dtype=torch.float64)
    padding = padding_mask([30, 11, 4], 30)
    call = {"tgt_mask": mask, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    out, expected = model(source, target, **call), plain(source, target, **call)
    assert calls == ["lsh"] * 5
    assert_close(out, expected)
    found, wanted = ([*m.parameters()] for m in (model, plain))
    for a, b in zip(gradients([out], found), gradients([expected], wanted), strict=True):
        assert_close(a, b)


def test_autocast_encoders_in_evaluation(calls: list[str]) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 24, batch_first=True), LAYERS).eval()
    replace_attention(model, **SPARSE)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(3, LENGTH, E)).isfinite().all()
    assert calls == ["lsh"] * LAYERS


# replace_attention


class Zoo(nn.Module):
    """A model with a shared module, a subclass, an odd one out and nesting."""

    def __init__(self) -> None:
        super().__init__()

        class Special(nn.MultiheadAttention):
            pass

        self.first = nn.MultiheadAttention(E, H, batch_first=True)
        self.again = self.first
        self.special = Special(E, H)
        self.parametrised = weight_norm(nn.MultiheadAttention(E, H), "in_proj_weight")
        self.patched = nn.MultiheadAttention(E, H)
        self.patched.forward = lambda *args, **kwargs: (args[0], None)
        self.large = nn.MultiheadAttention(514, 1)
        self.inner = nn.ModuleDict({"a": nn.Sequential(nn.Linear(E, E), nn.MultiheadAttention(E, H))})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.scripted = torch.jit.script(nn.MultiheadAttention(E, H))


def test_what_is_replaced_and_what_is_kept() -> None:
    model = Zoo()
    report = replace_attention(model, **SPARSE)
    assert report and report.replaced == ("first", "inner.a.1")
    reasons = {
        "special": "a subclass, .*Special, which may compute something else",
        "parametrised": "a subclass, .*Parametrized",
        "patched": "its forward was replaced on the object",
        "large": "at most 256, not 514",
        "scripted": "compiled by TorchScript",
    }
    assert list(report.kept) == list(reasons)
    for name, reason in reasons.items():
        assert re.search(reason, report.kept[name])
        assert f"  {name}: kept, {report.kept[name]}" in str(report)
    assert str(report).startswith(
        "replaced 2, kept 5\n  first: replaced\n  inner.a.1: replaced\n  special: kept, "
    )
    assert model.first is model.again and type(model.first) is MultiheadAttention
    assert type(model.special) is not MultiheadAttention and type(model.large) is nn.MultiheadAttention
    again = replace_attention(model, full_attention_threshold=7)
    assert (
        not again
        and again.replaced == ()
        and again.kept["first"] == "already a reformer_kernels.MultiheadAttention"
    )
    assert model.first.full_attention_threshold == 0
    assert str(replace_attention(nn.Linear(2, 2))) == "replaced 0, kept 0"


def test_the_objects_stay_the_same() -> None:
    model = encoder().eval()
    model.layers[1].train()
    model.layers[0].self_attn.note = "kept"
    before = dict(model.named_modules())
    parameters, state = dict(model.named_parameters()), model.state_dict()
    held = [model.layers[0].self_attn]  # a reference that no module knows of
    fired: list[str] = []
    handles = [
        model.layers[0].self_attn.register_forward_hook(lambda *_: fired.append("forward")),
        model.layers[1].self_attn.register_forward_pre_hook(lambda *_: fired.append("pre")),
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replace_attention(model, **SPARSE)
    assert all(module is before[name] for name, module in model.named_modules())
    assert type(held[0]) is MultiheadAttention and held[0].note == "kept"
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert [name for name, module in model.named_modules() if module.training] == [
        name for name, _ in model.named_modules() if name.startswith("layers.1")
    ]
    assert list(model.state_dict()) == list(state)
    encoder().load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(3, LENGTH, E, dtype=torch.float64)
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    model(x).square().sum().backward()
    optimizer.step()
    assert sorted(fired) == ["forward", "pre"]
    assert all(not torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())
    for handle in handles:  # they still know their hooks
        handle.remove()
    model(x)
    assert len(fired) == 2
    file = io.BytesIO()
    torch.save(model.eval(), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


def test_the_root_itself_dtype_and_device() -> None:
    for dtype, device in ((torch.bfloat16, "cpu"), (torch.float64, "meta")):
        root = nn.MultiheadAttention(E, H, dtype=dtype, device=device)
        report = replace_attention(root, shared_qk=True, seed=3)
        assert report.replaced == ("",) and "(the model itself)" in str(report)
        assert type(root) is MultiheadAttention and root.shared_qk and root.seed == 3
        assert root.full_attention_threshold == 0 and root.fallback == "raise"
        assert root.in_proj_weight.dtype == dtype and root.in_proj_weight.device.type == device


def test_a_predicate_chooses() -> None:
    model = encoder()
    seen: list[tuple[str, type]] = []

    def choose(name: str, module: nn.MultiheadAttention) -> bool:
        seen.append((name, type(module)))
        return name.startswith("layers.1")

    report = replace_attention(model, predicate=choose)
    assert report.replaced == ("layers.1.self_attn",)
    assert report.kept == {"layers.0.self_attn": "the predicate left it out"}
    assert seen == [(f"layers.{n}.self_attn", nn.MultiheadAttention) for n in range(2)]
    # Half replaced, the encoder's own nested tensors reach both kinds.
    x = torch.randn(3, LENGTH, E, dtype=torch.float64)
    padding = padding_mask([LENGTH, 25, 9], LENGTH)
    with torch.no_grad():
        model.eval()
        expected = encoder().eval()
        expected.load_state_dict(model.state_dict())
        assert_close(model(x, src_key_padding_mask=padding), expected(x, src_key_padding_mask=padding))


def test_extra_keys_have_no_shared_form() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(E, H, add_bias_kv=True), nn.MultiheadAttention(E, H)])
    report = replace_attention(model, shared_qk=True)
    assert report.replaced == ("1",) and "shared_qk has no form of add_bias_kv" in report.kept["0"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"config": LSHConfig(causal=True)}, ValueError, "each call says whether it is causal"),
        ({"config": 3}, TypeError, "config must be an LSHConfig"),
        ({"full_attention_threshold": 1.5}, ValueError, "full_attention_threshold must be"),
        ({"fallback": "drop"}, ValueError, "fallback must be"),
        ({"predicate": lambda name, _: 1 / (name != "layers.1.self_attn")}, ZeroDivisionError, "division"),
    ],
)
def test_errors_leave_the_model_as_it_was(options: Any, error: type[Exception], message: str) -> None:
    model = encoder()
    with pytest.raises(error, match=message):
        replace_attention(model, **options)
    assert all(type(one.self_attn) is nn.MultiheadAttention for one in model.layers)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        replace_attention([model])  # type: ignore[arg-type]


def test_a_compiled_model_is_compiled_anew(calls: list[str]) -> None:
    model = encoder().eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, LENGTH, E, dtype=torch.float64)
    with torch.no_grad():
        before = compiled(x)
        replace_attention(compiled, **SPARSE)
        assert not torch.allclose(compiled(x), before)
        assert_close(compiled(x), model(x))


def test_long_sequences_beside_full_attention() -> None:
    """With enough rounds on tokens in clusters, the replaced encoder keeps what the weights learnt."""
    torch.manual_seed(0)
    centres = 3 * torch.randn(8, E, dtype=torch.float64)
    x = centres[torch.randint(8, (1, 512))] + 0.1 * torch.randn(1, 512, E, dtype=torch.float64)
    plain = layer().eval()
    with torch.no_grad():
        plain.self_attn.in_proj_weight[: 2 * E] = torch.eye(E, dtype=torch.float64).repeat(2, 1)
        expected: Tensor = plain(x)
        errors = []
        for n_hashes in (1, 8):
            model = copy.deepcopy(plain)
            replace_attention(
                model, config=LSHConfig(n_hashes=n_hashes, chunk_length=32), full_attention_threshold=0
            )
            errors.append(float((model(x) - expected).norm() / expected.norm()))
    assert errors[1] < errors[0] and errors[1] < 0.1
