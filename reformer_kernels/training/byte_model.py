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


def byte_model(
    *,
    dim: int,
    layers: int,
    heads: int,
    n_hashes: int,
    chunk_length: int,
    seq_len: int,
    backend: str = "auto",
) -> ReformerLM:
    """A reversible `ReformerLM` of bytes, in which local and LSH layers alternate.

    It begins by giving every byte the same probability, which is a loss of 8 bits per byte.

    Its LSH windows lie within the buckets of `seq_len` bytes, which do not move when text is appended, so
    training, evaluation and sampling see the same keys. The loss and the feed-forward layers are chunked, so
    memory grows neither with depth nor with d_ff.
    """
    # Local layers see what is near, LSH layers what is similar; the last layer is an LSH layer.
    kinds: tuple[LayerKind, LayerKind] = ("lsh", "local")
    config = ReformerConfig(
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
    model = ReformerLM(config)
    nn.init.normal_(model.reformer.embedding.tokens.weight, std=0.02)
    nn.init.zeros_(model.head.weight)
    blocks: Any = model.reformer.layers.blocks
    for block in blocks:  # each layer begins as the identity
        nn.init.zeros_(block.f.attention.output.weight)
        nn.init.zeros_(block.g.feed_forward.outer.weight)
    return model
