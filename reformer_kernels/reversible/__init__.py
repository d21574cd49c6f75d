"""Reversible residual layers, whose activations the backward pass rebuilds instead of keeping."""

from reformer_kernels.reversible.blocks import ReversibleBlock, ReversibleSequence

__all__ = ["ReversibleBlock", "ReversibleSequence"]
