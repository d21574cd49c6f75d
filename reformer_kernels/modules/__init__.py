"""nn.Modules over `reformer_kernels.functional`."""

from reformer_kernels.modules.attention import FullSelfAttention, LocalSelfAttention, LSHSelfAttention
from reformer_kernels.modules.cross_attention import CrossAttention
from reformer_kernels.modules.encoder_decoder import ReformerEncoderDecoder
from reformer_kernels.modules.feed_forward import ChunkedFeedForward
from reformer_kernels.modules.heads import ReformerClassifier, ReformerQuestionAnswering
from reformer_kernels.modules.multihead_attention import MultiheadAttention
from reformer_kernels.modules.positions import (
    AxialPositionalEmbedding,
    LearnedPositionalEmbedding,
    RotaryPositions,
    SinusoidalPositionalEmbedding,
)
from reformer_kernels.modules.reformer import Reformer, ReformerLM
from reformer_kernels.modules.reformer_config import ReformerConfig
from reformer_kernels.modules.replace import AttentionReplacement, replace_attention
from reformer_kernels.modules.reversible import ReversibleBlock, ReversibleSequence

__all__ = [
    "AttentionReplacement",
    "AxialPositionalEmbedding",
    "ChunkedFeedForward",
    "CrossAttention",
    "FullSelfAttention",
    "LSHSelfAttention",
    "LearnedPositionalEmbedding",
    "LocalSelfAttention",
    "MultiheadAttention",
    "Reformer",
    "ReformerClassifier",
    "ReformerConfig",
    "ReformerEncoderDecoder",
    "ReformerLM",
    "ReformerQuestionAnswering",
    "ReversibleBlock",
    "ReversibleSequence",
    "RotaryPositions",
    "SinusoidalPositionalEmbedding",
    "replace_attention",
]
