"""Fast kernels for the Reformer (Kitaev, Kaiser, Levskaya, arXiv 2001.04451) in PyTorch."""

from . import functional
from .config import LSHConfig
from .layout import Layout
from .modules import (
    AxialPositionalEmbedding,
    ChunkedFeedForward,
    LocalSelfAttention,
    LSHSelfAttention,
    Reformer,
    ReformerConfig,
    ReformerLM,
    ReversibleBlock,
    ReversibleSequence,
)

__all__ = [
    "AxialPositionalEmbedding",
    "ChunkedFeedForward",
    "LSHConfig",
    "LSHSelfAttention",
    "Layout",
    "LocalSelfAttention",
    "Reformer",
    "ReformerConfig",
    "ReformerLM",
    "ReversibleBlock",
    "ReversibleSequence",
    "functional",
]
