"""Layers: attention, feed-forward and positions as `nn.Module`s over `reformer_kernels.functional`."""

from reformer_kernels.modules.cross_attention import CrossAttention
from reformer_kernels.modules.feed_forward import ChunkedFeedForward
from reformer_kernels.modules.full_attention import FullSelfAttention
from reformer_kernels.modules.local_attention import LocalSelfAttention
from reformer_kernels.modules.lsh_attention import LSHSelfAttention
from reformer_kernels.modules.multihead_attention import MultiheadAttention
from reformer_kernels.modules.positions import (
    AxialPositionalEmbedding,
    LearnedPositionalEmbedding,
    RotaryPositions,
    SinusoidalPositionalEmbedding,
)
from reformer_kernels.modules.replace import ReplacementReport, replace_attention

__all__ = [
    "AxialPositionalEmbedding",
    "ChunkedFeedForward",
    "CrossAttention",
    "FullSelfAttention",
    "LSHSelfAttention",
    "LearnedPositionalEmbedding",
    "LocalSelfAttention",
    "MultiheadAttention",
    "ReplacementReport",
    "RotaryPositions",
    "SinusoidalPositionalEmbedding",
    "replace_attention",
]
