"""Fast kernels for the Reformer (Kitaev, Kaiser, Levskaya, arXiv 2001.04451) in PyTorch."""

from . import functional
from .config import LSHConfig
from .layout import Layout
from .modules import ChunkedFeedForward, ReversibleBlock, ReversibleSequence

__all__ = [
    "ChunkedFeedForward",
    "LSHConfig",
    "Layout",
    "ReversibleBlock",
    "ReversibleSequence",
    "functional",
]
