"""`replace_attention`: LSH attention for the `nn.MultiheadAttention` modules of an existing model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from reformer_kernels.config import LSHConfig
from reformer_kernels.modules.multihead_arguments import Fallback, TorchMultiheadAttention, checked_options
from reformer_kernels.modules.multihead_attention import MultiheadAttention


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
    predicate: Callable[[str, TorchMultiheadAttention], bool] | None = None,
) -> ReplacementReport:
    """Turns every `nn.MultiheadAttention` in `model` into a `MultiheadAttention`, in place.

    Each module stays the same object and only changes its class, so its parameters (and the optimizers that
    hold them), hooks, mode, device and dtype stay as they are, and a module that is used in several places
    stays shared. `model` may itself be an `nn.MultiheadAttention`. The state dict does not change. Call this
    before torch.compile. A second call changes nothing that the first one replaced.

    Some modules are kept as they are, and reported: subclasses of `nn.MultiheadAttention`, which may compute
    something else (torch's quantizable and parametrised modules are subclasses); modules whose `forward` was
    replaced on the object; modules compiled by TorchScript; those with heads of more than 256; those with
    add_bias_kv or add_zero_attn, if shared_qk; and those for which `predicate(name, module)` is False.

    Args:
        model: any module.
        config, full_attention_threshold, shared_qk, seed, backend, fallback: see `MultiheadAttention`.
        predicate: called with the name and the module, says whether to replace it; None means all.

    Returns:
        The names of what was replaced, and of what was kept, with the reasons.

    Raises:
        TypeError, ValueError: the model or an option is not accepted; the model is then as it was.

    >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, batch_first=True), num_layers=2)
    >>> print(replace_attention(encoder, config=LSHConfig(n_hashes=2)))
    replaced 2, kept 0
      layers.0.self_attn: replaced
      layers.1.self_attn: replaced
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    options = checked_options(config, full_attention_threshold, shared_qk, seed, backend, fallback)
    to_replace: dict[str, TorchMultiheadAttention] = {}
    kept: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, TorchMultiheadAttention):
            reason = MultiheadAttention.why_not_adopted(module, options)
            if reason is None and predicate is not None and not predicate(name, module):
                reason = "the predicate left it out"
            if reason is None:
                to_replace[name] = module
            else:
                kept[name] = reason
        elif isinstance(module, torch.jit.ScriptModule) and module.original_name == "MultiheadAttention":
            kept[name] = "compiled by TorchScript"
    for module in to_replace.values():
        MultiheadAttention.adopt(module, options)
    return ReplacementReport(tuple(to_replace), kept)
