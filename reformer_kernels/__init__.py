"""Fast kernels for the Reformer (Kitaev, Kaiser, Levskaya, arXiv 2001.04451) in PyTorch."""

from . import functional
from .config import LSHConfig
from .layout import Layout

__all__ = ["LSHConfig", "Layout", "functional"]
