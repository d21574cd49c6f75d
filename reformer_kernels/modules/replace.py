"""`replace_attention`: LSH attention for the `nn.MultiheadAttention` modules of an existing model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from reformer_kernels.config import LSHConfig
from reformer_kernels.modules.multihead_attention import (
    Fallback,
    MultiheadAttention,
    checked_options,
    why_not_adopted,
)


@dataclass(frozen=True)
class ReplacementReport:
    """Which modules of a model were replaced, and which were kept and why; `print` shows it.

    It is true if anything was replaced.

    Attributes:
        replaced: the names of the replaced modules, as `named_modules` gives them ("" is the model itself).
        kept: the names of the modules that stay as they were, each with the reason.
    """

    replaced: tuple[str, ...]
    kept: Mapping[str, str]

    def __bool__(self) -> bool:
        return bool(self.replaced)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)}, kept {len(self.kept)}"]
        lines += [f"  {_shown(name)}: replaced" for name in self.replaced]
        lines += [f"  {_shown(name)}: kept, {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class AttentionReplacement:
    """What `replace_attention` did; `print` shows it.

    Attributes:
        swapped: names of the modules that now are `MultiheadAttention`, as `named_modules` gives them ("" is
            the model itself).
        left: names of those that were left as they are, with the reason.
    """

    swapped: tuple[str, ...]
    left: dict[str, str]

    def __str__(self) -> str:
        if not self.swapped and not self.left:
            return "no nn.MultiheadAttention found"
        lines = [f"replaced {len(self.swapped)} nn.MultiheadAttention"]
        lines += [f"  {_shown(name)}" for name in self.swapped]
        if self.left:
            lines.append(f"left {len(self.left)} as they are")
            lines += [f"  {_shown(name)}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def _shown(name: str) -> str:
    return name or "(the model itself)"


def replace_attention(
    model: nn.Module,
    *,
    config: LSHConfig = LSHConfig(),  # noqa: B008  (frozen, so one shared default is safe)
    full_attention_threshold: int | None = None,
    shared_qk: bool = False,
    seed: int = 0,
    backend: str = "auto",
    fallback: Fallback | None = None,
    predicate: Callable[[str, nn.MultiheadAttention], bool] | None = None,
) -> AttentionReplacement:
    """Turns every `nn.MultiheadAttention` in `model` into a `MultiheadAttention`, in place.

    Each module stays the same object and changes its class: its parameters (so optimizers stay valid),
    hooks, mode, device, dtype and references stay as they are, a module used in several places stays
    shared, and `model` may itself be an `nn.MultiheadAttention`. The state dict does not change. Swap before
    torch.compile. A second call changes nothing that the first one swapped.

    Left as they are, and reported: subclasses of `nn.MultiheadAttention` (they may compute something else;
    torch's quantizable and parametrised modules are subclasses), modules whose `forward` was replaced on the
    object, modules compiled by TorchScript, heads of more than 256, add_bias_kv or add_zero_attn with
    shared_qk, and those for which `predicate(name, module)` is False.

    Args:
        model: any module.
        config, full_attention_threshold, shared_qk, seed, backend, fallback: see `MultiheadAttention`.
        predicate: which modules to swap; None: all.

    Returns:
        `AttentionReplacement`, which names what was swapped, and what was left and why.

    Raises:
        TypeError, ValueError: a wrong model or option; the model is then as it was.

    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, batch_first=True), num_layers=2)
    >>> print(replace_attention(encoder, config=LSHConfig(n_hashes=2)))
    replaced 2 nn.MultiheadAttention
      layers.0.self_attn
      layers.1.self_attn
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    options = checked_options(config, full_attention_threshold, shared_qk, seed, backend, fallback)
    chosen: dict[str, nn.MultiheadAttention] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            reason = why_not_adopted(module, options)
            if reason is None and predicate is not None and not predicate(name, module):
                reason = "the predicate left it out"
            if reason is None:
                chosen[name] = module
            else:
                left[name] = reason
        elif isinstance(module, torch.jit.ScriptModule) and module.original_name == "MultiheadAttention":
            left[name] = "compiled by TorchScript"
    for module in chosen.values():
        MultiheadAttention.adopt(module, options)
    return AttentionReplacement(tuple(chosen), left)
