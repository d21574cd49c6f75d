"""LSH attention under transformers' models, by its registry of attention functions."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

import reformer_kernels.hf.attention_registry as registry
from reformer_kernels import LSHConfig, functional, hf

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 97,
    "max_position_embeddings": 512,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 97,
    "max_position_embeddings": 512,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def modernbert() -> T.PreTrainedModel:
    config = T.ModernBertConfig(**SIZES, **SPECIAL, global_attn_every_n_layers=2, local_attention=32)
    return T.ModernBertModel(config)


def gpt2() -> T.PreTrainedModel:
    config = T.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=512, bos_token_id=1, eos_token_id=2
    )
    return T.GPT2LMHeadModel(config)


def mistral() -> T.PreTrainedModel:
    return T.MistralForCausalLM(T.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=20))


def llama() -> T.PreTrainedModel:
    return T.LlamaForCausalLM(T.LlamaConfig(**SIZES, num_key_value_heads=2))


TEXT_MODELS: dict[str, Callable[[], T.PreTrainedModel]] = {
    "bert": lambda: T.BertModel(T.BertConfig(**SIZES)),
    "roberta": lambda: T.RobertaModel(T.RobertaConfig(**SIZES)),
    "modernbert": modernbert,
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "bart": lambda: T.BartModel(T.BartConfig(**BART)),
}

EVERY_PAIR = hf.AttentionOptions(LSHConfig(n_hashes=1, chunk_length=512), full_attention_threshold=16)
"""A window that holds every key of these tests, above a threshold that none of their lengths is below."""

FEW_PAIRS = hf.AttentionOptions(LSHConfig(n_hashes=2, chunk_length=8), full_attention_threshold=16)


@pytest.fixture(autouse=True)
def registered() -> None:
    torch.manual_seed(0)
    hf.register_attention("lsh", EVERY_PAIR)


@pytest.fixture
def long_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels' functions, in the order in which layers call them."""
    calls: list[str] = []
    for name in ("lsh_cross_attention", "sliding_window_attention"):
        kernel = getattr(functional, name)

        def count(*args: Any, _name: str = name, _kernel: Any = kernel, **kwargs: Any) -> Any:
            calls.append(_name)
            return _kernel(*args, **kwargs)

        monkeypatch.setattr(functional, name, count)
    return calls


def outputs(model: T.PreTrainedModel, implementation: str, **inputs: Any) -> Tensor:
    model.set_attn_implementation(implementation)
    return model(**inputs)[0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_equals_sdpa_where_every_pair_meets(name: str, padded: bool, long_calls: list[str]) -> None:
    model = TEXT_MODELS[name]().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute in ("dropout", "attention_dropout", "dropout_p"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.0)
    tokens = torch.randint(3, 97, (2, 100))
    real = torch.ones(2, 100, dtype=torch.long)
    if padded:
        real[1, 70:] = 0
    inputs = {"input_ids": tokens, "attention_mask": real if padded else None}
    seen = real.bool()[..., None]
    losses, gradients = [], []
    for implementation in ("sdpa", "lsh"):
        model.zero_grad()
        out = outputs(model, implementation, **inputs)
        out.square().where(seen, 0).sum().backward()
        losses.append(out.detach().where(seen, 0))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert long_calls.count("lsh_cross_attention") > 0 or name == "mistral"
    assert ("sliding_window_attention" in long_calls) == (name in ("modernbert", "mistral"))
    torch.testing.assert_close(losses[1], losses[0], atol=2e-5, rtol=1e-4)
    for ours, theirs in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_equals_sdpa_in_vision_and_speech(long_calls: list[str]) -> None:
    sizes = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
    vit = T.ViTModel(T.ViTConfig(**sizes, image_size=64, patch_size=8)).eval()
    whisper = T.WhisperModel(T.WhisperConfig(**BART, num_mel_bins=8, max_source_positions=100, **SPECIAL))
    encoder = whisper.get_encoder().eval()
    for model, inputs in (
        (vit, {"pixel_values": torch.randn(2, 3, 64, 64)}),
        (encoder, {"input_features": torch.randn(2, 8, 200)}),
    ):
        with torch.no_grad():
            expected = outputs(model, "sdpa", **inputs)
            torch.testing.assert_close(outputs(model, "lsh", **inputs), expected, atol=2e-5, rtol=1e-4)
    assert long_calls == ["lsh_cross_attention"] * 4


def test_a_left_padded_row_equals_the_row_alone(long_calls: list[str]) -> None:
    model = llama().eval()
    model.set_attn_implementation("lsh")
    tokens = torch.randint(3, 97, (1, 300))
    padded = torch.cat([torch.zeros(1, 40, dtype=torch.long), tokens], 1)
    real = (padded > 0).long()
    positions = (real.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        out = model(padded, attention_mask=real, position_ids=positions)[0]
        torch.testing.assert_close(out[:, 40:], model(tokens)[0], atol=2e-5, rtol=1e-4)
    assert long_calls == ["lsh_cross_attention"] * 4


def test_no_quadratic_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    hf.register_attention("lsh", FEW_PAIRS)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, Tensor) and x.numel():
                    largest = max(largest, x.untyped_storage().nbytes())
            return out

    length = 2000
    for build in (llama, mistral, modernbert):
        model = build().eval()
        model.set_attn_implementation("lsh")
        real = torch.ones(1, length, dtype=torch.long)
        real[0, 1500:] = 0
        with torch.no_grad(), Largest():
            model.base_model(input_ids=torch.randint(3, 97, (1, length)), attention_mask=real)
    assert 0 < largest < length * length


def test_grouped_keys_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = functional.lsh_cross_attention
    keys = []

    def record(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys.append((k.untyped_storage().nbytes(), v.untyped_storage().nbytes(), k.shape))
        return kernel(q, k, v, *args, **kwargs)

    monkeypatch.setattr(functional, "lsh_cross_attention", record)
    model = llama().eval()
    model.set_attn_implementation("lsh")
    with torch.no_grad():
        model(torch.randint(3, 97, (3, 50)))
    for k_bytes, v_bytes, shape in keys:
        assert shape == (6, 2, 50, 8)
        assert k_bytes == v_bytes == 3 * 2 * 50 * 8 * 4


def test_up_to_the_threshold_it_is_sdpa(long_calls: list[str]) -> None:
    hf.register_attention("lsh", hf.AttentionOptions(full_attention_threshold=100))
    model = llama().eval()
    tokens, real = torch.randint(3, 97, (2, 100)), torch.ones(2, 100, dtype=torch.long)
    real[0, :30] = 0
    with torch.no_grad():
        for mask in (None, real):
            expected = outputs(model, "sdpa", input_ids=tokens, attention_mask=mask)
            out = outputs(model, "lsh", input_ids=tokens, attention_mask=mask)
            torch.testing.assert_close(out, expected, atol=0, rtol=0)
    assert not long_calls


def test_evaluation_repeats_and_training_redraws() -> None:
    hf.register_attention("lsh", FEW_PAIRS)
    model = llama().eval()
    tokens = torch.randint(3, 97, (1, 200))
    with torch.no_grad():
        first, second = (outputs(model, "lsh", input_ids=tokens) for _ in range(2))
        torch.testing.assert_close(first, second, atol=0, rtol=0)
        model.train()
        assert not torch.equal(
            outputs(model, "lsh", input_ids=tokens), outputs(model, "lsh", input_ids=tokens)
        )


def test_generation_attends_in_full_for_each_new_token() -> None:
    model = llama().eval()
    prompt = torch.randint(3, 97, (2, 60))
    answers = []
    for implementation in ("sdpa", "lsh"):
        model.set_attn_implementation(implementation)
        answers.append(model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert torch.equal(*answers)


def test_gradient_checkpointing_repeats_the_same_rotations() -> None:
    hf.register_attention("lsh", FEW_PAIRS)
    model = llama().train()
    model.set_attn_implementation("lsh")
    tokens = torch.randint(3, 97, (1, 200))
    gradients = []
    for checkpointed in (False, True):
        again = copy.deepcopy(model)
        if checkpointed:
            again.gradient_checkpointing_enable()
        torch.manual_seed(1)
        again(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in again.parameters()])
    for plain, rebuilt in zip(*gradients, strict=True):
        torch.testing.assert_close(rebuilt, plain)


@pytest.mark.parametrize("fallback", ["exact", "raise"])
def test_what_cannot_be_served(fallback: str) -> None:
    hf.register_attention("lsh", hf.AttentionOptions(full_attention_threshold=16, fallback=fallback))
    t5 = T.T5EncoderModel(
        T.T5Config(d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=48, vocab_size=97)
    ).eval()
    model = llama().eval()
    tokens = torch.randint(3, 97, (1, 60))
    packed = torch.cat([torch.arange(20), torch.arange(40)])[None]
    cache = T.DynamicCache()
    with torch.no_grad():
        expected = [
            outputs(t5, "sdpa", input_ids=tokens),
            outputs(model, "sdpa", input_ids=tokens, position_ids=packed, use_cache=False),
            outputs(model, "sdpa", input_ids=tokens)[:, 30:],
        ]
        model(tokens[:, :30], past_key_values=cache)
        calls: list[tuple[str, Callable[[], Tensor]]] = [
            ("position bias", lambda: outputs(t5, "lsh", input_ids=tokens)),
            (
                "its mask is not",
                lambda: outputs(model, "lsh", input_ids=tokens, position_ids=packed, use_cache=False),
            ),
            (
                "its mask is not",
                lambda: outputs(model, "lsh", input_ids=tokens[:, 30:], past_key_values=cache),
            ),
        ]
        for i, ((reason, call), value) in enumerate(zip(calls, expected, strict=True)):
            if fallback == "raise":
                with pytest.raises(RuntimeError, match=reason):
                    call()
            elif i == 2:  # the same reason again
                with warnings.catch_warnings():
                    warnings.simplefilter("error", UserWarning)
                    torch.testing.assert_close(call(), value, atol=2e-5, rtol=1e-4)
            else:
                with pytest.warns(UserWarning, match=reason):
                    torch.testing.assert_close(call(), value, atol=2e-5, rtol=1e-4)


def test_a_written_out_mask_is_the_layers_own() -> None:
    """Where attention weights are asked for, no mask was built, so the fallback builds it."""
    query = torch.randn(2, 4, 40, 8)
    module = torch.nn.Module().eval()
    seen = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    seen[1, ..., 30:] = False
    attend = registry._RegisteredAttention("lsh", EVERY_PAIR)
    for causal in (False, True):
        for window in (None, 5):
            options = {"is_causal": causal, "sliding_window": window}
            with pytest.warns(UserWarning, match="weights are asked for"):
                full, _ = registry._RegisteredAttention("lsh", EVERY_PAIR)(
                    module, query, query, query, seen, output_attentions=True, **options
                )
            ours, _ = attend(module, query, query, query, seen, **options)
            real = seen[:, 0, 0, :, None, None]
            torch.testing.assert_close(ours.where(real, 0), full.where(real, 0), atol=1e-5, rtol=1e-4)


def test_blocks_of_positions_are_not_taken_for_a_sliding_window() -> None:
    config = T.PretrainedConfig(attention_chunk_size=32)
    config._attn_implementation = "lsh"
    mask = T.masking_utils.create_chunked_causal_mask(config, torch.zeros(1, 100, 8), None, None)
    assert mask.shape == (1, 1, 100, 100)


def test_softcap_and_sinks_are_refused() -> None:
    query = torch.randn(1, 2, 40, 8)
    attend = T.AttentionInterface()["lsh"]
    for option in ({"softcap": 30.0}, {"s_aux": torch.zeros(2)}):
        with pytest.raises(ValueError, match="eager"):
            attend(torch.nn.Module(), query, query, query, None, **option)


def test_wrong_registrations() -> None:
    for name in ("sdpa", "eager", "flash_attention_2", "", "a b"):
        with pytest.raises(ValueError, match="name"):
            hf.register_attention(name)
    with pytest.raises(TypeError, match="AttentionOptions"):
        hf.register_attention("lsh", LSHConfig())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="causal"):
        hf.AttentionOptions(LSHConfig(causal=True))
    with pytest.raises(ValueError, match="full_attention_threshold"):
        hf.AttentionOptions(full_attention_threshold=-1)
    with pytest.raises(ValueError, match="fallback"):
        hf.AttentionOptions(fallback="silent")  # type: ignore[arg-type]


def test_two_names_have_options_of_their_own(long_calls: list[str]) -> None:
    hf.register_attention("lsh_long", hf.AttentionOptions(full_attention_threshold=500))
    model = llama().eval()
    tokens = torch.randint(3, 97, (1, 100))
    with torch.no_grad():
        outputs(model, "lsh_long", input_ids=tokens)
        assert not long_calls
        outputs(model, "lsh", input_ids=tokens)
        assert long_calls


def test_loaded_by_name(tmp_path: Any) -> None:
    llama().save_pretrained(tmp_path)
    model = T.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lsh")
    assert model.config._attn_implementation == "lsh"
    assert model(torch.randint(3, 97, (1, 64))).logits.isfinite().all()


def test_compiled_equals_eager(long_calls: list[str]) -> None:
    hf.register_attention("lsh", FEW_PAIRS)
    model = llama().eval()
    model.set_attn_implementation("lsh")
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for length in (64, 80):
            # With a padding mask: without one, transformers takes any compiled batch for a packed one.
            tokens, real = torch.randint(3, 97, (1, length)), torch.ones(1, length, dtype=torch.long)
            options = {"attention_mask": real, "use_cache": False}
            torch.testing.assert_close(compiled(tokens, **options).logits, model(tokens, **options).logits)
    assert len(long_calls) > 4


def test_trainer_and_peft_fine_tune(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    hf.register_attention("lsh", FEW_PAIRS)
    model = llama()
    model.set_attn_implementation("lsh")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    row = torch.randint(3, 97, (200,))
    rows = [{"input_ids": row, "labels": row} for _ in range(8)]
    arguments = T.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = T.Trainer(adapted, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
