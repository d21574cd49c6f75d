"""nn.Modules over `reformer_kernels.functional`."""

from reformer_kernels.modules.attention import LocalSelfAttention, LSHSelfAttention
from reformer_kernels.modules.feed_forward import ChunkedFeedForward
from reformer_kernels.modules.reversible import ReversibleBlock, ReversibleSequence

__all__ = [
    "ChunkedFeedForward",
    "LSHSelfAttention",
    "LocalSelfAttention",
    "ReversibleBlock",
    "ReversibleSequence",
]
