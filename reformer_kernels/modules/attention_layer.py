"""`AttentionLayer`, the base of the attention layers: sizes, the split into heads, and the merge.

The layers map hidden states (B, L, E) to (B, L, E). The heads are views of the projections' outputs, so the
kernels read them where the matrix products wrote them.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from reformer_kernels.config import LSHConfig
from reformer_kernels.modules.checks import check_dropout, check_head_sizes, check_positive, refuse_tracing
from reformer_kernels.modules.positions import RotaryPositions


class AttentionLayer(nn.Module):
    """What the attention layers share. Subclasses own the projections and the attention.

    Args:
        embed_dim: E, the size of hidden states.
        num_heads: H.
        head_dim: D, the size of a head's queries and keys, at most 256; None means E / H.
        value_dim: D_v, the size of a head's values, at most 256; None means D.
        dropout: the probability of dropping an attention weight in training.
        rotary: rotates queries and keys by their positions; None means no rotation.
        backend: "auto", "reference", "native" or "triton".

    Raises:
        ValueError: sizes or dropout are out of range, or `rotary` is for another head dimension.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int | None,
        value_dim: int | None,
        dropout: float,
        rotary: RotaryPositions | None,
        backend: str,
    ) -> None:
        super().__init__()
        self.head_dim, self.value_dim = check_head_sizes(embed_dim, num_heads, head_dim, value_dim)
        if rotary is not None and rotary.head_dim != self.head_dim:
            raise ValueError(f"rotary must be for head_dim {self.head_dim}, got {rotary.head_dim}")
        self.rotary = rotary
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.dropout = check_dropout(dropout)
        self.backend = backend

    @property
    def dropout_p(self) -> float:
        """The probability of dropping an attention weight in the present mode: 0 in evaluation."""
        return self.dropout if self.training else 0.0

    def check_input(self, x: Tensor) -> None:
        """Raises ValueError unless `x` has shape (B, L, E), and RuntimeError under `torch.jit.trace`."""
        refuse_tracing(type(self).__name__)
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"x must have shape (batch, length, {self.embed_dim}), got {tuple(x.shape)}; "
                f"add a batch dimension of 1 to a single sequence"
            )

    def split_heads(self, projected: Tensor, head_dim: int) -> Tensor:
        """A view (B, H, L, D) of a projection's output (B, L, H * D)."""
        batch, length, _ = projected.shape
        return projected.view(batch, length, self.num_heads, head_dim).transpose(1, 2)

    def merge_heads(self, out: Tensor) -> Tensor:
        """(B, L, H * D_v) from the heads' results (B, H, L, D_v)."""
        return out.transpose(1, 2).flatten(2)

    def describe_sizes(self) -> str:
        """The arguments that all attention layers share, for `extra_repr`."""
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}", f"head_dim={self.head_dim}"]
        if self.value_dim != self.head_dim:
            parts.append(f"value_dim={self.value_dim}")
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)


def with_n_hashes(config: LSHConfig, n_hashes: int | None) -> LSHConfig:
    """`config` with this number of hash rounds; None leaves it as it is."""
    if n_hashes is None:
        return config
    return dataclasses.replace(config, n_hashes=check_positive("n_hashes", n_hashes))
