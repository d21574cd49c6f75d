"""A call of a benchmark table, made ready to be timed and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reformer_kernels.benchmarks.sizes import Sizes, Work
from reformer_kernels.benchmarks.timing import Seconds, Timed, between, mark

SEED = 0


class Trained(NamedTuple):
    """What a forward and backward pass gave, and the seconds of its backward part where that is timed."""

    results: Sequence[Tensor]
    """Outputs and gradients that the call made; they do not count as its working memory."""
    backward: Seconds | None = None


@dataclass
class Call:
    """One row's call.

    Attributes:
        name: the row's name in the table.
        sizes: what it runs on.
        forward: one pass without autograd; returns what it made.
        train: one forward and backward pass; None where the call has no gradient.
        train_phase: what the table calls that, "forward+backward" or "training step".
        work: what rates are computed from.
        inputs: the tensors it is called on.
    """

    name: str
    sizes: Sizes
    forward: Callable[[], Sequence[Tensor]]
    train: Callable[[], Trained] | None = None
    train_phase: str = "forward+backward"
    work: Work = field(default_factory=Work)
    inputs: Sequence[Tensor] = ()

    def timed(self, backward: bool) -> list[Timed]:
        """The call for the timing harness: the forward pass, then, if wanted, both passes."""
        device = torch.device(self.sizes.device)

        def run_forward() -> dict[str, Seconds]:
            start = mark(device)
            self.forward()
            return {"forward": between(start, mark(device))}

        result = [Timed(run_forward)]
        if backward and self.train is not None:
            train = self.train

            def run_both() -> dict[str, Seconds]:
                start = mark(device)
                backward_seconds = train().backward
                phases = {self.train_phase: between(start, mark(device))}
                return phases if backward_seconds is None else phases | {"backward": backward_seconds}

            result.append(Timed(run_both, warmed_by=result[0]))
        return result

    def passes(self, backward: bool) -> dict[str, Callable[[], Sequence[Tensor]]]:
        """The passes whose memory is measured, by phase; each returns what it made."""
        result: dict[str, Callable[[], Sequence[Tensor]]] = {"forward": self.forward}
        if backward and self.train is not None:
            train = self.train
            result[self.train_phase] = lambda: train().results
        return result


def function_call(
    name: str,
    sizes: Sizes,
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    work: Work,
    *,
    differentiable: bool = True,
) -> Call:
    """A call of a function of tensors; its output has the shape of the last input where it is
    differentiable, and gradients of all inputs are taken."""
    device = torch.device(sizes.device)

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return [function(*inputs)]

    if not differentiable:
        return Call(name, sizes, forward, work=work, inputs=inputs)
    generator = torch.Generator().manual_seed(SEED)
    grad_out = torch.randn(inputs[-1].shape, generator=generator).to(device, inputs[-1].dtype)

    def train() -> Trained:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        start = mark(device)
        gradients = torch.autograd.grad(out, leaves, grad_out)
        return Trained([out.detach(), *gradients], between(start, mark(device)))

    return Call(name, sizes, forward, train, work=work, inputs=inputs)


def module_call(
    name: str,
    sizes: Sizes,
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    out_width: int | None = None,
    autocast: bool = False,
) -> Call:
    """A call of a module, or a function that runs one, on hidden states x.

    Its output is as wide as x, unless `out_width` says otherwise. With autocast, 16-bit dtypes run on float32
    weights.
    """
    x = x.detach().requires_grad_()
    generator = torch.Generator().manual_seed(SEED)
    shape = (*x.shape[:-1], out_width or x.shape[-1])
    grad_out = torch.randn(shape, generator=generator).to(x.device, x.dtype)
    device = torch.device(sizes.device)

    def context() -> AbstractContextManager[Any]:
        return autocast_to(sizes) if autocast else nullcontext()

    def forward() -> Sequence[Tensor]:
        with torch.no_grad(), context():
            return [function(x)]

    def train() -> Trained:
        with context():
            y = function(x)
        start = mark(device)
        # The peers know no other way than .backward(). The parameters' gradients add to those of earlier
        # calls: if those were deleted, making them anew would count as this call's memory.
        y.backward(grad_out.to(y.dtype))
        seconds = between(start, mark(device))
        assert x.grad is not None
        grad_in, x.grad = x.grad, None
        return Trained([y.detach(), grad_in], seconds)

    return Call(name, sizes, forward, train, inputs=[x])


def autocast_to(sizes: Sizes) -> AbstractContextManager[Any]:
    """torch.autocast for a 16-bit dtype, else a context that changes nothing."""
    if sizes.torch_dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(torch.device(sizes.device).type, sizes.torch_dtype)
    return nullcontext()


def weight_dtype(sizes: Sizes) -> torch.dtype:
    """The dtype of weights that run under `autocast_to`."""
    return torch.float64 if sizes.torch_dtype == torch.float64 else torch.float32


def hidden_states(sizes: Sizes, width: int, dtype: torch.dtype) -> Tensor:
    """Normal (B, L, width), drawn on the CPU so that every device gets the same."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(sizes.batch, sizes.length, width, generator=generator).to(sizes.device, dtype)


@contextmanager
def seeded(seed: int = SEED) -> Iterator[None]:
    """Torch's global generator, seeded inside and put back after: what is built inside is always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
