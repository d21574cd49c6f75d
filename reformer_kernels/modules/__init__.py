"""nn.Modules over `reformer_kernels.functional`."""

from reformer_kernels.modules.attention import LocalSelfAttention, LSHSelfAttention

__all__ = ["LSHSelfAttention", "LocalSelfAttention"]
