"""Forward calls on CUDA tensors in their default use do nothing for which the host would wait for the device.

Fake tensors stand in for a GPU. What runs is the public functions and modules down to our operators, whose
fake kernels take the place of their launchers; autograd has no CUDA thread here to run a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from reformer_kernels import LSHConfig, LSHSelfAttention
from reformer_kernels import functional as F
from reformer_kernels._backend import triton_missing

pytestmark = pytest.mark.skipif(triton_missing(), reason="Triton is not installed")

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")


class NoWaiting(TorchDispatchMode):
    """Raises for operations whose result the host reads, and for copies between devices."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        assert name not in WAITING, f"{name} waits for the device"
        result = function(*arguments, **(named or {}))
        if name in ("_to_copy", "copy_", "to"):
            places = {x.device for x in (*arguments, result) if isinstance(x, Tensor)}
            assert len(places) == 1, f"{name} copies between {places}"
        return result


CONFIGS = {
    "paper": LSHConfig(causal=True),
    "trax": LSHConfig.trax(),
    "bucket window": LSHConfig(window="bucket", causal=True),
    "factors": LSHConfig(bucket_factors=(16, 8)),
}


def rows(L: int = 1024) -> Tensor:
    return torch.empty(2, 4, L, 64, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("call", ["self", "cross"])
def test_attention(config: LSHConfig, dropout_p: float, seed: int | None, call: str) -> None:
    with FakeTensorMode(), NoWaiting():
        q, k, v = rows(), rows(1500), rows(1500)
        run: Callable[..., Tensor] = F.lsh_attention if call == "self" else F.lsh_cross_attention
        given = (q, rows()) if call == "self" else (q, k, v)
        out = run(*given, config, dropout_p=dropout_p, seed=seed)
        assert out.device == q.device and out.shape == q.shape


@pytest.mark.parametrize("training", [True, False])
def test_lsh_layer(training: bool) -> None:
    """Other layers make ranges, which fake CUDA tensors lack where torch was built without CUDA."""
    layer = LSHSelfAttention(256, 4, LSHConfig(causal=True), dropout=0.1).train(training)
    with FakeTensorMode():
        weights = {name: torch.empty(w.shape, device="cuda") for name, w in layer.named_parameters()}
        x = torch.empty(2, 1024, 256, device="cuda")
        with NoWaiting():
            out = torch.func.functional_call(layer, weights, (x,))
        assert out.device == x.device and out.shape == x.shape


def test_what_waits_is_caught() -> None:
    with FakeTensorMode(), NoWaiting():
        x = rows()
        config = CONFIGS["factors"]
        for wait in (
            lambda: x.sum().item(),
            lambda: bool(x.isnan().any()),
            lambda: x.cpu(),
            lambda: F.lsh_layout(x, config, rotations=F.sample_rotations(config, 4, 64, 0)),  # on the CPU
        ):
            with pytest.raises(AssertionError, match=r"waits for the device|copies between"):
                wait()
