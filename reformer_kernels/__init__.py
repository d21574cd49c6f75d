"""Fast kernels for the Reformer (Kitaev, Kaiser, Levskaya, arXiv 2001.04451) in PyTorch."""

from . import functional
from .config import LSHConfig
from .layout import Layout
from .modules import (
    AttentionReplacement,
    AxialPositionalEmbedding,
    ChunkedFeedForward,
    LocalSelfAttention,
    LSHSelfAttention,
    MultiheadAttention,
    Reformer,
    ReformerConfig,
    ReformerEncoderDecoder,
    ReformerLM,
    ReversibleBlock,
    ReversibleSequence,
    replace_attention,
)

__all__ = [
    "AttentionReplacement",
    "AxialPositionalEmbedding",
    "ChunkedFeedForward",
    "LSHConfig",
    "LSHSelfAttention",
    "Layout",
    "LocalSelfAttention",
    "MultiheadAttention",
    "Reformer",
    "ReformerConfig",
    "ReformerEncoderDecoder",
    "ReformerLM",
    "ReversibleBlock",
    "ReversibleSequence",
    "functional",
    "replace_attention",
]
