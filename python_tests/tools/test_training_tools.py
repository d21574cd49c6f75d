"""Hugging Face's training tools on our kernels: Trainer on an accelerated model, peft on a converted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from python_tests.helpers import assert_close
from python_tests.hf.test_accelerate import LEARNED, LM, layers_of, make, tokens
from reformer_kernels import hf


def test_the_trainer_fine_tunes_an_accelerated_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate")
    torch.manual_seed(0)
    model = make(LM, is_decoder=True, **LEARNED).float()
    hf.accelerate(model, backend="native")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows: list[Any] = [{"input_ids": row, "labels": row} for row in tokens(4, 48)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed >= {name for name in before if "self_attention" in name}
    assert all(type(layer).__name__.startswith("Accelerated") for layer in layers_of(model))


def test_lora_on_a_converted_model(tmp_path: Path) -> None:
    """Every linear layer that is called as a module; merged weights compute the same."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    make(LM, is_decoder=True, **LEARNED).float().save_pretrained(tmp_path)
    model = hf.from_pretrained(tmp_path)
    names = ["query_key", "query", "key", "value", "output"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, init_lora_weights=False))
    ids = tokens(2, 48)
    adapted(ids, labels=ids).backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    adapted.eval()
    with torch.no_grad():
        expected = adapted(ids)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(ids), expected)
        assert_close(adapted.merge_and_unload()(ids), expected, 1e-4)
