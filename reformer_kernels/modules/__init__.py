"""nn.Modules over `reformer_kernels.functional`."""

from reformer_kernels.modules.attention import FullSelfAttention, LocalSelfAttention, LSHSelfAttention
from reformer_kernels.modules.feed_forward import ChunkedFeedForward
from reformer_kernels.modules.positions import (
    AxialPositionalEmbedding,
    LearnedPositionalEmbedding,
    RotaryPositions,
    SinusoidalPositionalEmbedding,
)
from reformer_kernels.modules.reformer import Reformer, ReformerLM
from reformer_kernels.modules.reformer_config import ReformerConfig
from reformer_kernels.modules.reversible import ReversibleBlock, ReversibleSequence

__all__ = [
    "AxialPositionalEmbedding",
    "ChunkedFeedForward",
    "FullSelfAttention",
    "LSHSelfAttention",
    "LearnedPositionalEmbedding",
    "LocalSelfAttention",
    "Reformer",
    "ReformerConfig",
    "ReformerLM",
    "ReversibleBlock",
    "ReversibleSequence",
    "RotaryPositions",
    "SinusoidalPositionalEmbedding",
]
