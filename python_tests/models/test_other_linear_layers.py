"""Models whose linear layers are plain no more: adapters, hooks, pruning, norms of weights, quantisation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from python_tests.helpers import assert_close
from reformer_kernels import ChunkedFeedForward, LSHConfig, ReformerConfig, ReformerLM
from reformer_kernels.modules.linear import head_loss
from reformer_kernels.reversible import ReversibleSequence

CONFIG = ReformerConfig(
    vocab_size=30,
    d_model=16,
    layers=("local", "lsh", "full"),
    num_heads=2,
    d_ff=24,
    max_length=40,
    causal=True,
    lsh=LSHConfig(n_hashes=2, chunk_length=8, window="bucket"),
    local_chunk_length=8,
    ff_chunk_size=7,
    init_std=0.3,
)
TOKENS = torch.randint(30, (2, 25), generator=torch.Generator().manual_seed(0))


def model_of() -> ReformerLM:
    torch.manual_seed(0)
    return ReformerLM(CONFIG).eval()


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}


def loss_of_logits(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_loss_and_logits_agree(model: Any) -> None:
    """The loss and its gradients are those of the logits."""
    torch.manual_seed(1)
    whole = loss_of_logits(model(TOKENS))
    expected = gradients(whole, model)
    torch.manual_seed(1)
    loss = model(TOKENS, labels=TOKENS)
    found = gradients(loss, model)
    assert_close(loss, whole)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient)


def test_lora_on_every_linear_layer() -> None:
    peft = pytest.importorskip("peft", reason="peft comes with the extra `test`")
    model = model_of()
    names = list(linear_layers(model))
    assert {name.rpartition(".")[2] for name in names} >= {"inner", "outer", "head", "value"}
    plain = model(TOKENS).detach()
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with_lora = adapted(TOKENS)
    assert not torch.allclose(with_lora, plain, atol=1e-2)
    check_loss_and_logits_agree(adapted)
    check_loss_and_logits_agree(adapted.train())
    adapted.eval()
    for name, p in adapted.named_parameters():
        assert ("lora_" in name) == p.requires_grad
        assert not p.requires_grad or (p.grad is not None and p.grad.abs().max() > 0), name
    with torch.no_grad():
        adapted.merge_adapter()
        torch.testing.assert_close(adapted(TOKENS), with_lora.detach(), rtol=1e-3, atol=1e-3)
        loss = adapted(TOKENS, labels=TOKENS)
        assert_close(loss, loss_of_logits(adapted(TOKENS)))
        adapted.unmerge_adapter()
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(TOKENS), plain, rtol=1e-3, atol=1e-3)
        merged = adapted.merge_and_unload()
    assert linear_layers(merged).keys() == set(names)
    torch.testing.assert_close(merged(TOKENS), with_lora, rtol=1e-3, atol=1e-3)


def _pruned(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


CHANGES: dict[str, Callable[[nn.Linear], Any]] = {
    "pruning": _pruned,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "hook": lambda layer: layer.register_forward_hook(lambda module, args, out: 0.5 * out),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_compute_what_they_are(change: str) -> None:
    """The same model with the changed weights in plain layers, or half weights where a hook halves them."""
    model = model_of()
    before = model(TOKENS).detach()
    expected = copy.deepcopy(model)
    for name, layer in linear_layers(model).items():
        CHANGES[change](layer)
        layer(torch.zeros(1, layer.in_features))  # pruning computes its weight in the call
        plain = expected.get_submodule(name)
        factor = 0.5 if change == "hook" else 1.0
        with torch.no_grad():
            plain.weight.copy_(factor * layer.weight)
            if plain.bias is not None:
                plain.bias.mul_(factor)
    if change != "weight norm":
        assert not torch.allclose(model(TOKENS), before, atol=1e-2)
    assert_close(model(TOKENS), expected(TOKENS))
    check_loss_and_logits_agree(model)
    for name, p in model.named_parameters():
        if "head" in name or "feed_forward" in name:
            assert p.grad is not None and p.grad.abs().max() > 0, name


def test_spectral_norm_trains_in_reversible_layers() -> None:
    """Each call changes the norm's buffers, so the recomputation must see them as the first run did."""
    model = model_of().train()
    for layer in linear_layers(model).values():
        parametrizations.spectral_norm(layer)
    plain = copy.deepcopy(model)
    sequence = next(module for module in plain.modules() if isinstance(module, ReversibleSequence))
    sequence.forward = sequence.plain
    gradients = []
    for each in (model, plain):
        torch.manual_seed(0)
        each(TOKENS, labels=TOKENS).backward()
        gradients.append([p.grad for p in each.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_pruned_weights_stay_zero_in_training() -> None:
    model = model_of().train()
    for layer in linear_layers(model).values():
        _pruned(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).backward()
        optimizer.step()
    model(TOKENS)
    for layer in linear_layers(model).values():
        assert (layer.weight == 0).sum() >= layer.weight.numel() // 2 - 1


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization:DeprecationWarning")
def test_dynamic_quantisation() -> None:
    model = model_of()
    plain = model(TOKENS).detach()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert not linear_layers(quantized)
    with torch.no_grad():
        logits = quantized(TOKENS)
        assert 0 < (logits - plain).norm() < 0.2 * plain.norm()
        # The scale of what enters a layer is that of the chunk, so chunks round apart.
        torch.testing.assert_close(
            quantized(TOKENS, labels=TOKENS), loss_of_logits(logits), rtol=1e-2, atol=1e-2
        )
    (generated,) = quantized.generate(TOKENS[:1], 3)
    assert generated.shape[-1] >= 3


@pytest.mark.parametrize("buffers", [False, True])
def test_a_called_head_is_chunked_and_draws_the_same_dropout_again(
    buffers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With buffers, which a call may change, it is called once; gradients are the same either way."""
    monkeypatch.setattr("reformer_kernels.functional.loss.DEFAULT_BUDGET", 16 * 30 * 4)
    sizes: list[int] = []
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 30))
    head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[:-1].numel()))
    if buffers:
        head.register_buffer("calls", torch.zeros(()))
    x, target = torch.randn(2, 25, 32, requires_grad=True), TOKENS.clone()
    target[0, ::3] = -100
    results = []
    for called in (False, True):
        torch.manual_seed(3)
        if called:
            loss = head_loss(head, x, target, 30, -100)
        else:
            logits = torch.cat([head(chunk) for chunk in x.split(8, 1)], 1)
            loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
            sizes.clear()
        results.append([loss, *torch.autograd.grad(loss, [x, *head.parameters()])])
    for found, expected in zip(results[1], results[0], strict=True):
        assert_close(found, expected)
    assert max(sizes) == 16 and sum(sizes) == (50 if buffers else 100)


def test_layers_with_hooks_compile() -> None:
    torch._dynamo.reset()
    layer = ChunkedFeedForward(6, 8, chunk_size=4)
    for part in (layer.inner, layer.outer):
        prune.l1_unstructured(part, "weight", amount=0.5)
    x = torch.randn(2, 9, 6)
    assert_close(torch.compile(layer, backend="aot_eager")(x), layer(x))
    assert layer(x[0, 0]).shape == (6,) and layer(x[:, :0]).shape == (2, 0, 6)
