"""The small byte-level language model that `reformer-kernels train` trains."""

from __future__ import annotations

from typing import Any

from torch import nn

from reformer_kernels.config import LSHConfig
from reformer_kernels.models import ReformerConfig, ReformerLM
from reformer_kernels.models.config import LayerKind

VOCABULARY = 256
CONTEXT = 4
"""A byte's embedding includes the 3 bytes before it: LSH attention finds similar bytes wherever they are, and
this adds the ones just before."""


def byte_config(
    *,
    dim: int,
    layers: int,
    heads: int,
    n_hashes: int,
    chunk_length: int,
    seq_len: int,
    backend: str = "auto",
) -> ReformerConfig:
    """A reversible model of bytes, in which local and LSH layers alternate.

    Its LSH windows lie within the buckets of `seq_len` bytes, which do not move when text is appended, so
    training, evaluation and sampling see the same keys. The loss and the feed-forward layers are chunked, so
    memory grows neither with depth nor with d_ff.
    """
    # Local layers see what is near, LSH layers what is similar; the last layer is an LSH layer.
    kinds: tuple[LayerKind, LayerKind] = ("lsh", "local")
    return ReformerConfig(
        vocab_size=VOCABULARY,
        d_model=dim,
        layers=tuple(kinds[(layers - 1 - layer) % 2] for layer in range(layers)),
        num_heads=heads,
        causal=True,
        lsh=LSHConfig.paper(n_hashes=n_hashes, chunk_length=chunk_length, window="bucket"),
        local_chunk_length=chunk_length,
        positions="none",
        bucket_length=seq_len,
        token_context=CONTEXT,
        init_std=(3 * dim) ** -0.5,
        backend=backend,
    )


def not_finite(model: ReformerLM) -> list[str]:
    """The names of the weights that hold NaN or infinity."""
    return [name for name, value in model.state_dict().items() if not value.isfinite().all()]


def byte_model(config: ReformerConfig) -> ReformerLM:
    """A model of this configuration that gives every byte the same probability: a loss of 8 bits per byte."""
    model = ReformerLM(config)
    nn.init.normal_(model.reformer.embedding.tokens.weight, std=0.02)
    nn.init.zeros_(model.head.weight)
    blocks: Any = model.reformer.layers.blocks
    for block in blocks:  # each layer begins as the identity
        nn.init.zeros_(block.f.attention.output.weight)
        nn.init.zeros_(block.g.feed_forward.outer.weight)
    return model
