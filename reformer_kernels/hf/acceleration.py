"""`accelerate` and `restore`: our kernels under the attention layers of a transformers Reformer."""

from __future__ import annotations

from typing import Any, get_args

from torch import nn

from reformer_kernels._backend import Backend
from reformer_kernels._checks import kind_of
from reformer_kernels._limits import MAX_HEAD_DIM
from reformer_kernels.modules.replace import ReplacementReport


def accelerate(model: nn.Module, *, backend: str = "auto") -> ReplacementReport:
    """Let the LSH and local attention layers of a transformers Reformer run our kernels, in place.

    Every `LSHSelfAttention` and `LocalSelfAttention` in `model` (any Reformer class, or a module that holds
    one) becomes a subclass with the same parameters, state dict, configuration, random streams and return
    values. For the same rotations, outputs and gradients equal the original's to rounding, at padding too.
    (Near-ties between two hash directions may fall either way, as in any two ways of multiplying matrices.)
    The rest of the model, whose time goes to matrix products, stays as it is.

    A call runs the original code, whatever that does, in these cases:
    - attention probabilities are asked for (`output_attentions`), or a head mask is given;
    - it decodes from a cache that holds this layer (filling the cache runs our kernels);
    - "auto" finds no kernel for the device and dtype, for example float64;
    - the length is more than one chunk and no multiple of the chunk length (models pad to one before);
    - more neighbouring chunks are configured than exist (the original's ring ends there);
    - the attention mask is not (batch, length), the model is traced or exported, or a layer is called with
      more positional arguments than the hidden states.

    These faults of the original are corrected:
    - training with `num_hashes` given for one call works; the original fails in its backward pass;
    - the recomputation of LSH layers repeats the dropout of the forward pass. The original draws rotations
      only in the forward pass, so all later random numbers differ and its gradients are wrong;
    - the original's masks round in float32 and below: a query that sees only itself is up to 0.4% off over
      several rounds. Here it gets what the original gives in exact arithmetic.

    A query of a local layer that sees only padding gets what the original's rounding gives it: the sum of the
    window's values in float32, their mean in float64.

    Dropout draws other numbers with the same statistics. A query that sees only itself drops its value as one
    key in each round; a query that sees only padding drops nothing.

    transformers' registry of attention functions cannot be used: Reformer's layers never consult it.

    Args:
        model: the module to change. Its classes and other models are not touched.
        backend: "auto", or the back end to use: "native", "triton" or "reference".

    Returns:
        the names of the layers that were replaced, and of those that were kept, each with the reason.

    Raises:
        TypeError: `model` is not a module, or has no Reformer attention layer.
        ValueError: unknown `backend`.
        ImportError: transformers is not installed.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(map(repr, get_args(Backend)))}, got {backend!r}")
    layers = _accelerated_layers()
    replaced: list[str] = []
    kept: dict[str, str] = {}
    for name, module in _modules(model):
        original = layers.ORIGINAL.get(type(module), type(module))
        if original in layers.ACCELERATED:
            reason = _why_not(module)
            if reason is None:
                layers.substitute(module, backend)
                replaced.append(name)
            else:
                kept[name] = reason
        elif isinstance(module, tuple(layers.ACCELERATED)):
            kept[name] = f"its class {type(module).__qualname__} is a subclass that may compute otherwise"
    if not replaced and not kept:
        raise TypeError(
            f"model must hold transformers' Reformer attention layers, got a {kind_of(model)} without one; "
            "give a ReformerModel or one of its heads"
        )
    return ReplacementReport(tuple(replaced), kept)


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo `accelerate`: the layers get their own classes back, and keep their parameters.

    Returns:
        the names of the layers that changed, empty for a model that was not accelerated.

    Raises:
        TypeError: `model` is not a module.
        ImportError: transformers is not installed.
    """
    layers = _accelerated_layers()
    names = tuple(name for name, module in _modules(model) if type(module) in layers.ORIGINAL)
    for name in names:
        layers.withdraw(model.get_submodule(name))
    return names


def _accelerated_layers() -> Any:
    """The module that imports transformers."""
    try:
        from reformer_kernels.hf import accelerated_layers
    except ImportError as error:
        raise ImportError(
            f"transformers with its Reformer is needed here ({error}); install it with: "
            "pip install transformers"
        ) from error
    return accelerated_layers


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {kind_of(model)}")
    return list(model.named_modules())


def _why_not(layer: Any) -> str | None:
    """Why a layer cannot be replaced; None where it can."""
    if layer.attention_head_size > MAX_HEAD_DIM:
        return f"its head size {layer.attention_head_size} is above {MAX_HEAD_DIM}"
    if layer.chunk_length is None:
        return "it has no chunk length"
    if "forward" in vars(layer):
        return "its forward was replaced on the object"
    return None
