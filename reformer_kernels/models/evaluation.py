"""Evaluation mode for one computation, while this thread or another may be training the same model."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from reformer_kernels.reversible.turns import turn

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def evaluation_copy(model: ModuleType) -> ModuleType:
    """`model` in evaluation mode, as new modules that share its parameters, buffers, hooks and other state.

    The mode of the model itself stays as it is, so other threads never see it change. Later changes of the
    parameters' values show in the copy; modules that are added to the model do not.
    """
    copies: dict[nn.Module, Any] = {}
    with turn:  # a reversible block that runs has aliases in the place of its parameters
        for module in model.modules():
            copy = copies[module] = module.__new__(type(module))
            # Past __setattr__, which registers parameters, and past __getstate__, which is for files.
            copy.__dict__.update(module.__dict__)
            for table in ("_parameters", "_buffers"):
                copy.__dict__[table] = dict(module.__dict__[table])
            copy.__dict__["training"] = False
    for module, copy in copies.items():
        children = module.__dict__["_modules"].items()
        copy.__dict__["_modules"] = {
            name: None if child is None else copies[child] for name, child in children
        }
    copied: ModuleType = copies[model]
    return copied
