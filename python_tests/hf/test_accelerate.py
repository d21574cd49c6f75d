"""`hf.accelerate` on live transformers models: the original in float64 is the oracle.

Ours run in float64 through the reference, compared to rounding, and in float32 through the native kernels.
Both sides hash with the same rotations: drawn in float32 from the same seed, whatever the model's dtype.
"""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import ReformerConfig
from transformers.models.reformer import modeling_reformer as peer

from python_tests.helpers import NATIVE, assert_close, padding_mask
from reformer_kernels import hf
from reformer_kernels.testing import relative_error

D, H = 8, 2
SAME = {"reference": 1e-9, "native": 1e-4}
SAME_AT_PADDING = 1e-6  # of the original in float64, where it rounds logits of -1e9
DTYPE = {"reference": torch.float64, "native": torch.float32}


@pytest.fixture(autouse=True)
def rotations_in_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Normal numbers that do not depend on the dtype asked for; and no chatter."""
    draw = torch.randn
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()

    def randn(*shape: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return draw(*shape, dtype=torch.float32, **options).to(dtype or torch.get_default_dtype())

    monkeypatch.setattr(torch, "randn", randn)
    yield
    transformers.utils.logging.set_verbosity(level)


def config(**options: Any) -> ReformerConfig:
    base: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 12,
        "num_attention_heads": H,
        "attention_head_size": D,
        "feed_forward_size": 20,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "hidden_act": "gelu",  # smooth: rounding may not flip a gradient
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "num_hashes": 2,
        "num_buckets": 8,
        "hash_seed": 1,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "axial_pos_shape": [4, 12],
        "axial_pos_embds_dim": [4, 8],
        "initializer_range": 0.5,
        "pad_token_id": 0,
    }
    return ReformerConfig(**base | options)


def make(kind: str, seed: int = 0, **options: Any) -> Any:
    """A random model in float64, in evaluation mode."""
    torch.manual_seed(seed)
    return getattr(transformers, kind)(config(**options)).double().eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(4))


def layers_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (peer.LSHSelfAttention, peer.LocalSelfAttention))]


LM, MASKED, CLASSIFY, ANSWER, BARE = (
    "ReformerModelWithLMHead",
    "ReformerForMaskedLM",
    "ReformerForSequenceClassification",
    "ReformerForQuestionAnswering",
    "ReformerModel",
)
LEARNED = {"axial_pos_embds": False, "max_position_embeddings": 48}
LEFT_AND_RIGHT = torch.stack([torch.arange(48) >= 19, torch.arange(48) < 29])
WIDE = {"lsh_num_chunks_after": 1, "local_num_chunks_after": 1}


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize(
    ("kind", "options", "length", "call"),
    [
        (LM, {"is_decoder": True, "num_buckets": None}, 48, {}),
        (LM, {"is_decoder": True, "num_buckets": [2, 4], "num_hashes": 1}, 48, {"mask": LEFT_AND_RIGHT}),
        (MASKED, LEARNED | WIDE | {"num_buckets": [4, 4, 2]}, 48, {"mask": LEFT_AND_RIGHT}),
        (MASKED, LEARNED | {"local_num_chunks_before": 2, "lsh_attn_chunk_length": 4}, 16, {"num_hashes": 3}),
        (CLASSIFY, LEARNED | {"attn_layers": ["lsh", "lsh"]}, 8, {"mask": LEFT_AND_RIGHT[:, 20:28]}),
        (ANSWER, LEARNED | {"attn_layers": ["local"], "local_num_chunks_before": 0}, 16, {}),
        (BARE, LEARNED | {"hash_seed": None, "num_buckets": 2}, 43, {"eval": True}),  # padded by the model
    ],
)
def test_models_equal_the_original(
    kind: str, options: dict[str, Any], length: int, call: dict[str, Any], backend: str
) -> None:
    original = make(kind, **options)
    ours = copy.deepcopy(original).to(DTYPE[backend])
    done = hf.accelerate(ours, backend=backend)
    assert len(done.replaced) == len(layers_of(ours)) and not done.kept
    ids, mask = tokens(2, length), call.get("mask")
    inputs: dict[str, Any] = {"attention_mask": None if mask is None else mask.long()}
    hashes, training = call.get("num_hashes"), not call.get("eval")
    results = []
    for model in (original, ours):
        model.train(training)
        if hashes and model is original:
            # Its recomputation knows the layers' own number alone.
            for layer in layers_of(model):
                layer.num_hashes = hashes
        torch.manual_seed(3)
        out = model(ids, num_hashes=hashes, **inputs)[0]
        if training:
            weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
            if mask is not None and out.dim() == 3 and DTYPE[backend] != torch.float64:
                # Where local queries see only padding, the original's rounding differs between dtypes.
                out = out * mask[..., None]
            (out.double() * weights).sum().backward()
        results.append(out)
    limit = SAME[backend] if mask is None and training else max(SAME_AT_PADDING, SAME[backend])
    assert_close(results[1].double(), results[0], limit)
    if mask is not None and original.training and DTYPE[backend] == torch.float64:
        assert results[0].dim() == 2 or results[0][~mask].abs().max() > 0.1  # padding's rows are compared too
    assert ours.config.num_buckets == original.config.num_buckets is not None
    for (name, p), q in zip(original.named_parameters(), ours.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            error = relative_error(q.grad, p.grad)
            assert error < limit, (name, error)


def pairs(cache: Any) -> list[tuple[Tensor | None, Tensor]]:
    """(buckets, states) of each layer; older versions of transformers keep just this list."""
    if isinstance(cache, list):
        return cache
    return list(zip(cache.buckets_cache, cache.states_cache, strict=True))


def test_the_cache_is_filled_and_read_as_before() -> None:
    original = make(LM, is_decoder=True)
    ours = copy.deepcopy(original)
    hf.accelerate(ours, backend="reference")
    ids = tokens(1, 43)
    caches = [model(ids, use_cache=True).past_buckets_states for model in (original, ours)]
    for (their_buckets, their_states), (buckets, states) in zip(*map(pairs, caches), strict=True):
        if their_buckets is not None:
            assert torch.equal(their_buckets, buckets) and their_buckets.dtype == buckets.dtype
        assert_close(states, their_states)
    steps = [
        model(ids[:, -1:], past_buckets_states=cache, use_cache=True).logits
        for model, cache in zip((original, ours), caches, strict=True)
    ]
    assert_close(steps[1], steps[0])
    for options in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}):
        written = [model.generate(ids[:, :10], max_new_tokens=3, **options) for model in (original, ours)]
        assert torch.equal(*written)


class Calls:
    """How often the originals' forward ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for layer in (peer.LSHSelfAttention, peer.LocalSelfAttention):
            monkeypatch.setattr(layer, "forward", self.counting(layer.forward))

    def counting(self, forward: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            self.count += 1
            return forward(*args, **options)

        return run


@pytest.mark.filterwarnings("ignore:.*jit.trace")
def test_what_is_left_to_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    model = make(BARE, attn_layers=["lsh", "local"], **LEARNED)

    def originals(length: int = 16, **call: Any) -> int:
        calls.count = 0
        out = model(tokens(2, length), **call)
        if call.get("output_attentions"):
            assert [tuple(p.shape) for p in out.attentions] == [(2, H, 4, 8, 16), (2, H, 2, 8, 16)]
        return calls.count

    assert originals() == 2
    hf.accelerate(model)
    assert originals() == 2  # float64 has no kernel
    hf.accelerate(model, backend="reference")
    assert originals() == 0
    model.float()
    hf.accelerate(model)
    assert originals() == 0
    assert originals(output_attentions=True) == 2
    assert originals(attention_mask=torch.ones(1, 16)) == 2  # broadcasts
    with torch.autocast("cpu", torch.bfloat16):
        assert originals() == 0
    cache = model(tokens(2, 16), use_cache=True).past_buckets_states
    assert originals(1, past_buckets_states=cache, use_cache=True) == 2

    lsh, local = layers_of(model)
    for layer in (lsh, local):
        with pytest.raises(RuntimeError, match="is invalid for input of size"):  # the original's own error
            layer(torch.zeros(1, 13, 12))
        layer.num_chunks_before = 5  # of 4 chunks in two rounds
    assert originals() == 2
    lsh.num_chunks_before, local.num_chunks_before = 4, 2
    assert originals() == 0
    calls.count = 0
    local.requires_grad_(False)
    torch.jit.trace(lambda x: local(x).hidden_states, torch.ones(1, 16, 12))
    assert calls.count > 0


def test_restore_leaves_nothing_behind() -> None:
    model = make(LM, is_decoder=True).float()
    ids, keys = tokens(2, 48), list(model.state_dict())
    before = [(type(m), dict(vars(m)), list(m.parameters())) for m in layers_of(model)]
    expected = model(ids).logits
    names = hf.accelerate(model).replaced
    assert names == tuple(f"reformer.encoder.layers.{i}.attention.self_attention" for i in range(4))
    for change in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        other = change(model)
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert not torch.equal(other(ids).logits, expected)
        assert hf.restore(other) == names and torch.equal(other(ids).logits, expected)
    assert list(model.state_dict()) == keys
    assert hf.accelerate(model).replaced == names  # again
    assert hf.restore(model) == names and hf.restore(model) == ()
    for layer, (kind, attributes, parameters) in zip(layers_of(model), before, strict=True):
        assert type(layer) is kind and vars(layer) == attributes
        assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    assert torch.equal(model(ids).logits, expected)


def test_the_report_and_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(peer.LSHSelfAttention):
        pass

    whole = nn.ModuleList(
        [
            peer.LSHSelfAttention(config()),
            Own(config()),
            peer.LocalSelfAttention(config(attention_head_size=257)),
            peer.LocalSelfAttention(config()),
            nn.Linear(2, 2),
        ]
    )
    whole[3].forward = whole[3].forward
    done = hf.accelerate(whole)
    assert done.replaced == ("0",) and list(done.kept) == ["1", "2", "3"]
    assert str(done).splitlines()[0] == "replaced 1, kept 3"
    assert (
        "replaced on the object" in done.kept["3"]
        and "Own" in done.kept["1"]
        and "257" in done.kept["2"]
        and type(whole[1]) is Own
    )
    assert hf.accelerate(peer.LocalSelfAttention(config())).replaced == ("",)
    for call in (hf.accelerate, hf.restore):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module, got str"):
            call("model")  # type: ignore[operator]
    with pytest.raises(TypeError, match="got a Linear without one"):
        hf.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="backend must be one of"):
        hf.accelerate(whole, backend="fast")
    monkeypatch.delitem(sys.modules, "reformer_kernels.hf.accelerated_layers")
    monkeypatch.delattr(hf, "accelerated_layers")
    monkeypatch.setitem(sys.modules, "transformers.models.reformer", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        hf.accelerate(whole)


def loss_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    out: Tensor = model(ids, **options)[0]
    return out.square().mean()


def test_hashes_of_one_call_train() -> None:
    """The original forgets them in its backward pass and fails there (`view` of the buckets)."""
    model = make(BARE, **LEARNED).train()
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        loss_of(model, tokens(1, 16), num_hashes=3).backward()
    hf.accelerate(model, backend="reference")
    loss_of(model, tokens(1, 16), num_hashes=3).backward()


def test_dropout_is_recomputed_as_it_was() -> None:
    """Gradients equal those of ordinary autograd with the same masks.

    The original draws rotations in the forward pass alone, so that dropout after them is another one in
    the backward pass: its gradients are off by a good part.
    """
    options = LEARNED | {"attn_layers": ["lsh", "local"], "hash_seed": None, "is_decoder": True}
    options |= {"hidden_dropout_prob": 0.3, "local_attention_probs_dropout_prob": 0.2}
    model = make(BARE, **options, lsh_attention_probs_dropout_prob=0.2).train()
    model.encoder.dropout = 0.0
    ids, mask = tokens(2, 16), torch.ones(2, 16)
    mask[1, :5] = 0
    errors = {}
    for name in ("original", "accelerated"):
        if name == "accelerated":
            hf.accelerate(model, backend="reference")
        torch.manual_seed(1)
        out = model(ids, attention_mask=mask).last_hidden_state
        model.zero_grad()
        out.square().sum().backward()
        reversible = {key: p.grad for key, p in model.named_parameters()}

        torch.manual_seed(1)
        first = second = model.embeddings(ids)
        for layer in model.encoder.layers:
            torch.manual_seed(layer.attention_seed)
            first = first + layer.attention(second, attention_mask=mask).hidden_states
            torch.manual_seed(layer.feed_forward_seed)
            second = second + layer.feed_forward(first)
        expected = model.encoder.layer_norm(torch.cat([first, second], -1))
        assert_close(expected, out)
        model.zero_grad()
        expected.square().sum().backward()
        errors[name] = max(relative_error(reversible[key], p.grad) for key, p in model.named_parameters())
    assert errors["accelerated"] < 1e-9 and errors["original"] > 0.05


@pytest.mark.parametrize("kind", ["lsh", "local"])
def test_dropout_has_the_original_statistics(kind: str) -> None:
    """Mean and variance of every output over many draws, those of queries that see only themselves too.

    (Without neighbours: on the ring such a query may meet itself several times, which is once here.)
    """
    p = 0.4
    options = {"lsh_attention_probs_dropout_prob": p, "local_attention_probs_dropout_prob": p}
    options |= {"lsh_num_chunks_before": 0, "attn_layers": [kind], "is_decoder": True}
    model = make(BARE, **LEARNED, **options).float()
    layer = layers_of(model)[0].train()
    n = 4000
    x = torch.randn(1, 16, 12).expand(n, 16, 12)
    found = []
    for _ in range(2):
        with torch.no_grad():
            found.append(layer(x).hidden_states)
        hf.accelerate(model)
    theirs, ours = found
    spread = theirs.var(0)
    assert spread.min() > 1e-5
    assert ((ours.mean(0) - theirs.mean(0)) / (2 * spread / n).sqrt()).abs().max() < 5
    assert (ours.var(0) / spread - 1).abs().max() < 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("causal", "length"), [(True, 24), (True, 6), (False, 24)])
def test_a_local_query_that_sees_only_padding(dtype: torch.dtype, causal: bool, length: int) -> None:
    """Its output is the original's in every dtype: the sum of the window's values or their mean."""
    mask = torch.ones(2, length)
    mask[0, : length - 2] = 0  # padding on the left
    mask[1, 1:] = 0
    options = {"attn_layers": ["local"], "is_decoder": causal, "local_num_chunks_after": 0 if causal else 1}
    layer = layers_of(make(BARE, **options, **LEARNED))[0].to(dtype)
    x = torch.randn(2, length, 12).to(dtype)
    with torch.no_grad():
        theirs = layer(x, attention_mask=mask).hidden_states
        hf.accelerate(layer, backend="reference" if dtype == torch.float64 else "native")
        ours = layer(x, attention_mask=mask).hidden_states
    assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
def test_low_precision_is_no_worse(dtype: Any) -> None:
    """On given buckets, made without the mask: only their order counts."""
    mask = (~padding_mask([48, 30], 48)).long()
    for exact in layers_of(make(BARE, attn_layers=["lsh", "local"], is_decoder=True, **LEARNED)):
        x = torch.randn(2, 48, 12).to(torch.float16 if dtype == torch.float16 else torch.bfloat16)
        call: dict[str, Any] = {"attention_mask": mask}
        if isinstance(exact, peer.LSHSelfAttention):
            call["buckets"] = exact(x.double()).buckets
        layer = copy.deepcopy(exact).to(torch.float32 if dtype == "autocast" else dtype)
        errors = []
        for _ in range(2):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
                out = layer(x, **call).hidden_states.double()
                errors.append(
                    relative_error(*(y * mask[..., None] for y in (out, exact(x.double(), **call)[0])))
                )
            hf.accelerate(layer)
        theirs, ours = errors
        assert ours < min(theirs, 2e-2), (ours, theirs)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_lora_on_every_linear_layer(backend: str) -> None:
    peft = pytest.importorskip("peft", reason="peft comes with the extra `test`")
    original = make(LM, is_decoder=True)
    names = [name for name, layer in original.named_modules() if type(layer) is nn.Linear]
    torch.manual_seed(2)
    original = peft.get_peft_model(
        original, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    ).eval()
    # Else nothing that enters transformers' reversible layers needs a gradient, and they give none.
    original.enable_input_require_grads()
    ours = copy.deepcopy(original).to(DTYPE[backend])
    assert len(hf.accelerate(ours, backend=backend).replaced) == 4
    ids = tokens(2, 48)
    expected = original(ids).logits
    assert relative_error(ours(ids).logits, expected) < SAME[backend]
    for model in (original, ours):
        model.train()
        loss_of(model, ids).backward()
    gradients = {name: p.grad for name, p in original.named_parameters() if p.requires_grad}
    for name, p in ours.named_parameters():
        assert ("lora_" in name) == p.requires_grad
        if p.requires_grad:
            assert relative_error(p.grad, gradients[name]) < 10 * SAME[backend], name
    with torch.no_grad():
        ours.eval().merge_adapter()
        assert relative_error(ours(ids).logits, expected) < 10 * SAME[backend]
