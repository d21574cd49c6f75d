"""`accelerate` and `restore`: our kernels under the attention layers of a transformers Reformer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from reformer_kernels._backend import Backend
from reformer_kernels._checks import kind_of
from reformer_kernels._limits import MAX_HEAD_DIM


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` did; `str()` tells it in lines.

    Attributes:
        replaced: names of the layers that now run our kernels, as in `model.named_modules()`.
        left: names of the attention layers that stay as they were, each with the reason.
    """

    replaced: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} layers accelerated, {len(self.left)} left"]
        lines += [f"  {name or '(the model itself)'}: accelerated" for name in self.replaced]
        lines += [f"  {name or '(the model itself)'}: left, {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module, *, backend: str = "auto") -> Acceleration:
    """Let the LSH and local attention layers of a transformers Reformer run our kernels, in place.

    Every `LSHSelfAttention` and `LocalSelfAttention` in `model` (any Reformer class, or a module that holds
    one) takes a subclass that keeps its parameters, state dict, configuration, random streams and return
    values. For the same rotations, outputs and gradients equal the original's to rounding, at padding too.
    (Near-ties of two hash directions may fall either way, as in any two ways of multiplying matrices.) Of the
    rest of a model, matrix products take the time, so it stays as it is.

    A call runs the original code, whatever it then does, where
    - attention probabilities are asked for (`output_attentions`), or a head mask is given;
    - it decodes from a cache that holds this layer (filling the cache runs our kernels);
    - "auto" finds no kernel for the device and dtype (float64, say);
    - the length is more than one chunk and no multiple of the chunk length (models pad before that);
    - more neighbouring chunks are configured than there are chunks (the original stops wrapping there);
    - the attention mask is not (batch, length), the model is traced or exported, or a layer is called with
      more than the hidden states by position.

    What differs is mended:
    - training with `num_hashes` given for one call works; the original fails in its backward pass;
    - dropout in the recomputation of LSH layers is the forward pass's. The original draws rotations in the
      forward pass alone, so that all random numbers after them differ and gradients are wrong;
    - in float32 and below the original's masks round: a query that sees only itself is up to 0.4% off over
      several rounds, a query of a local layer that sees padding alone gets the sum of the values. Here both
      are what the original gives in exact arithmetic.

    Dropout draws other numbers with the same statistics; a query that sees only itself, or padding alone,
    drops its value as one key a round, or not at all.

    transformers' registry of attention functions does not serve Reformer, whose layers never ask it.

    Args:
        model: the module to change. Its classes are left alone, other models too.
        backend: "auto", or the one to force: "native", "triton" or "reference".

    Returns:
        What was replaced, and what was left and why.

    Raises:
        TypeError: `model` is no module, or has no Reformer attention layer.
        ValueError: unknown `backend`.
        ImportError: transformers is not installed.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(map(repr, get_args(Backend)))}, got {backend!r}")
    layers = _layers()
    replaced, left = [], {}
    for name, module in _modules(model):
        original = layers.ORIGINAL.get(type(module), type(module))
        if original in layers.ACCELERATED:
            reason = _why_not(module)
            if reason is None:
                layers.substitute(module, backend)
                replaced.append(name)
            else:
                left[name] = reason
        elif isinstance(module, tuple(layers.ACCELERATED)):
            left[name] = f"its class {type(module).__qualname__} is a subclass that may compute otherwise"
    if not replaced and not left:
        raise TypeError(
            f"model must hold transformers' Reformer attention layers, got a {kind_of(model)} without one; "
            "give a ReformerModel or one of its heads"
        )
    return Acceleration(tuple(replaced), left)


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo `accelerate`: the layers get their own classes back. Parameters are not touched.

    Returns the names of the layers that changed; none if the model was not accelerated.

    Raises:
        TypeError: `model` is no module.
        ImportError: transformers is not installed.
    """
    layers = _layers()
    names = tuple(name for name, module in _modules(model) if type(module) in layers.ORIGINAL)
    for name in names:
        layers.withdraw(model.get_submodule(name))
    return names


def _layers() -> Any:
    try:
        from reformer_kernels.hf import layers as _layers
    except ImportError as error:
        raise ImportError(
            f"transformers with its Reformer is needed here ({error}); install it with: "
            "pip install transformers"
        ) from error
    return _layers


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {kind_of(model)}")
    return list(model.named_modules())


def _why_not(layer: Any) -> str | None:
    """Why a layer stays as it is at every call; None where it need not."""
    if layer.attention_head_size > MAX_HEAD_DIM:
        return f"its head size {layer.attention_head_size} is above {MAX_HEAD_DIM}"
    if layer.chunk_length is None:
        return "it has no chunk length"
    if "forward" in vars(layer):
        return "its forward was replaced on the object"
    return None
