"""Fast kernels for the Reformer (Kitaev, Kaiser, Levskaya, arXiv 2001.04451) in PyTorch."""

from reformer_kernels import _command as _command  # first: it says what Ctrl-C does until all is imported
from reformer_kernels import functional
from reformer_kernels.config import LSHConfig
from reformer_kernels.layout import Layout
from reformer_kernels.models import (
    Reformer,
    ReformerClassifier,
    ReformerConfig,
    ReformerEncoderDecoder,
    ReformerLM,
    ReformerQuestionAnswering,
)
from reformer_kernels.modules import (
    AxialPositionalEmbedding,
    ChunkedFeedForward,
    LocalSelfAttention,
    LSHSelfAttention,
    MultiheadAttention,
    ReplacementReport,
    replace_attention,
)
from reformer_kernels.reversible import ReversibleBlock, ReversibleSequence

__all__ = [
    "AxialPositionalEmbedding",
    "ChunkedFeedForward",
    "LSHConfig",
    "LSHSelfAttention",
    "Layout",
    "LocalSelfAttention",
    "MultiheadAttention",
    "Reformer",
    "ReformerClassifier",
    "ReformerConfig",
    "ReformerEncoderDecoder",
    "ReformerLM",
    "ReformerQuestionAnswering",
    "ReplacementReport",
    "ReversibleBlock",
    "ReversibleSequence",
    "functional",
    "replace_attention",
]
