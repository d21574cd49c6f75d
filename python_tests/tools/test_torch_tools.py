"""Tools of torch on whole models: weight averaging, and modules in child processes."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from python_tests.helpers import assert_close
from reformer_kernels import LSHConfig, ReformerConfig, ReformerLM

CONFIG = ReformerConfig(
    vocab_size=11,
    d_model=16,
    layers=("lsh", "local"),
    num_heads=2,
    d_ff=24,
    causal=True,
    lsh=LSHConfig(n_hashes=2, chunk_length=4, window="bucket"),
    local_chunk_length=4,
    max_length=32,
)
TOKENS = torch.arange(20).view(2, 10) % 11


@pytest.mark.parametrize("residual", ["float", "exact", "plain"])
def test_averaged_model(residual: Any) -> None:
    torch.manual_seed(0)
    model = ReformerLM(dataclasses.replace(CONFIG, residual=residual))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = []
    for _ in range(3):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).backward()
        optimizer.step()
        averaged.update_parameters(model)
        states.append(copy.deepcopy(model.state_dict()))
    mean = {name: sum(state[name] for state in states) / 3 for name in states[0]}
    expected = copy.deepcopy(model)
    expected.load_state_dict(mean)
    assert_close(averaged.eval()(TOKENS), expected.eval()(TOKENS), 1e-5)
    assert_close(model.eval()(TOKENS), copy.deepcopy(model)(TOKENS), 0)
    averaged(TOKENS, labels=TOKENS).backward()
    assert all(parameter.grad is not None for parameter in averaged.module.parameters())


class Gradients(Dataset[Tensor]):
    """Each item is computed by a forward and a backward pass of a model, in whichever process reads it."""

    def __init__(self, model: ReformerLM) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        loss = self.model(TOKENS[index : index + 1], labels=TOKENS[index : index + 1])
        return torch.autograd.grad(loss, self.model.head.weight)[0]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_modules_in_workers_of_a_data_loader(method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    torch.manual_seed(0)
    data = Gradients(ReformerLM(CONFIG).eval())
    expected = [data[index] for index in range(2)]  # the parent has started its threads before the fork
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=method, timeout=60)
    for found, alone in zip(loader, expected, strict=True):
        assert_close(found, alone, 1e-5)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork")
def test_modules_in_a_forked_child_with_one_thread() -> None:
    torch.manual_seed(0)
    data = Gradients(ReformerLM(CONFIG).eval())
    expected = data[0]
    context = multiprocessing.get_context("fork")
    with context.Pool(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = pool.apply_async(numbers, (data,)).get(60)
    assert_close(torch.tensor(found), expected, 1e-5)


def numbers(data: Gradients) -> list[list[float]]:
    """The first item as plain numbers, which need no shared memory on their way back."""
    values: list[list[float]] = data[0].tolist()
    return values
