"""The arguments of a call, or its results, taken apart into tensors and everything else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

TENSOR = object()
"""Stands in a list of leaves for a tensor that is kept apart."""


@dataclass(frozen=True, slots=True)
class TreeWithoutTensors:
    """A nested tuple, list or dict whose tensors are kept apart."""

    structure: Any
    leaves: list[Any]  # TENSOR where a tensor goes

    def fill(self, tensors: Iterable[Tensor]) -> Any:
        """The tree, with `tensors` where they go, in order."""
        remaining = iter(tensors)
        leaves = [next(remaining) if leaf is TENSOR else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.structure)


def take_tensors(tree: Any) -> tuple[TreeWithoutTensors, list[Tensor]]:
    """The tree without its tensors, and the tensors in order."""
    leaves, structure = pytree.tree_flatten(tree)
    without = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return TreeWithoutTensors(structure, without), tensors_of(leaves)


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in a tree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
