"""torch's own database of module calls, run through this package's attention.

Below the threshold `MultiheadAttention` is exact full attention, so every call that torch tests its modules
with gives torch's results, gradients included.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reformer_kernels import MultiheadAttention, replace_attention

pytest.importorskip(
    "expecttest", reason="torch's module database needs expecttest; pip install -e '.[tools]'"
)

with pytest.MonkeyPatch.context() as patch:
    # Importing torch's own tests would forbid all later tests of this process to set torch.backends' flags.
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)
    from torch.testing._internal.common_modules import module_db

CLASSES = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerEncoder,
    nn.TransformerDecoderLayer,
)
ENTRIES = {info.module_cls.__name__: info for info in module_db if info.module_cls in CLASSES}


def calls(name: str, dtype: torch.dtype, training: bool) -> Iterator[Any]:
    info = ENTRIES[name]
    torch.manual_seed(0)
    yield from info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


def ours_of(theirs: nn.Module) -> nn.Module:
    if type(theirs) is nn.MultiheadAttention:
        holder = nn.Sequential(copy.deepcopy(theirs))
        replaced = replace_attention(holder).replaced
        ours: nn.Module = holder[0]
    else:
        ours = copy.deepcopy(theirs)
        replaced = replace_attention(ours).replaced
    assert replaced
    assert any(isinstance(module, MultiheadAttention) for module in ours.modules())
    return ours


def results(module: nn.Module, call: Any) -> list[Tensor]:
    """Outputs and the gradients of all parameters and inputs, with the same random numbers in each."""
    args, kwargs = call.args, call.kwargs
    torch.manual_seed(1)
    out = module(*args, **kwargs)
    outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    leaves = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    loss = torch.stack([x.sin().sum() for x in outputs]).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else ()
    return [*outputs, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ENTRIES)
def test_every_call_gives_torchs_result(name: str, dtype: torch.dtype, training: bool) -> None:
    count = 0
    for example in calls(name, dtype, training):
        constructor = example.constructor_input
        torch.manual_seed(0)
        theirs = ENTRIES[name].module_cls(*constructor.args, **constructor.kwargs).to(dtype).train(training)
        ours = ours_of(theirs)
        torch.testing.assert_close(
            results(ours, example.forward_input), results(theirs, example.forward_input)
        )
        count += 1
    assert count > 1


def test_the_database_has_all_of_these_modules() -> None:
    assert set(ENTRIES) == {each.__name__ for each in CLASSES}
