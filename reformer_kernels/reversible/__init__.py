"""Reversible residual layers, whose activations the backward pass rebuilds instead of keeping."""

from reformer_kernels.reversible.blocks import ReversibleBlock, ReversibleSequence
from reformer_kernels.reversible.remembered_values import remember

__all__ = ["ReversibleBlock", "ReversibleSequence", "remember"]
