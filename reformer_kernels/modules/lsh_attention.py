"""`LSHSelfAttention`: the Reformer's self-attention, in which tokens attend within buckets of a hash."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor, nn

from reformer_kernels import functional
from reformer_kernels._checks import check_config
from reformer_kernels._random import Seed, resolve_seed
from reformer_kernels.config import LSHConfig
from reformer_kernels.layout import Layout
from reformer_kernels.modules.attention_layer import AttentionLayer, with_n_hashes
from reformer_kernels.modules.caches import LSHCache
from reformer_kernels.modules.checks import check_positive
from reformer_kernels.modules.positions import RotaryPositions
from reformer_kernels.reversible.remembered_values import is_remembering, remember


class LSHSelfAttention(AttentionLayer):
    """LSH self-attention with shared queries and keys.

        out = concat_h(lsh_attention(x W_qk, x W_v)) W_o

    The projections are split into heads, `functional.lsh_attention` attends in each head, and the heads'
    results, side by side, are projected back to E.

    In training each call draws new rotations (and dropout) from torch's global CPU generator, so
    `torch.manual_seed` reproduces a run. In evaluation the rotations follow from `seed` alone, so the same
    input gives the same output. Rotations and seed are not part of the state dict.

    Source: Kitaev et al., "Reformer" (arXiv 2001.04451), section 2.

    Args:
        embed_dim: E, the size of hidden states.
        num_heads: H.
        config: how to hash and attend; the default is the paper's rule, not causal.
        head_dim: D, the size of a head's query-keys, at most 256; None means E / H.
        value_dim: D_v, the size of a head's values, at most 256; None means D.
        bias: whether the query-key and value projections have a bias; the Reformer's have none.
        out_bias: whether the output projection has a bias.
        dropout: the probability of dropping an attention weight in training.
        rotary: rotates query-keys by position, before or after they are hashed; None means no rotation.
        seed: the seed of the rotations in evaluation.
        backend: "auto", "reference", "native" or "triton".

    Raises:
        ValueError: sizes or dropout are out of range.
        TypeError: config is not an LSHConfig.

    >>> layer = LSHSelfAttention(64, 4, LSHConfig(n_hashes=2, chunk_length=16, causal=True))
    >>> layer(torch.zeros(1, 50, 64)).shape
    torch.Size([1, 50, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        config: LSHConfig = LSHConfig(),  # noqa: B008  (frozen, so one shared default is safe)
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
        rotary: RotaryPositions | None = None,
        seed: int = 0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_config(config)
        super().__init__(embed_dim, num_heads, head_dim, value_dim, dropout, rotary, backend)
        self.config = config
        self.seed = seed
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query_key = nn.Linear(embed_dim, num_heads * self.head_dim, bias=bias, **factory)
        self.value = nn.Linear(embed_dim, num_heads * self.value_dim, bias=bias, **factory)
        self.output = nn.Linear(num_heads * self.value_dim, embed_dim, bias=out_bias, **factory)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        n_hashes: int | None = None,
        seed: Seed = None,
        rotations: Tensor | None = None,
        layout: Layout | None = None,
        positions: Tensor | None = None,
        bucket_length: int | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: hidden states (B, L, E).
            key_padding_mask: (B, L) bool, True = padding, as in `nn.MultiheadAttention`.
            n_hashes: the number of hash rounds of this call; None means the configuration's.
            seed: the seed of this call's rotations and dropout, an int or an int64 tensor; None means a new
                one in training and the layer's in evaluation.
            rotations: (H or 1, D, n_hashes, config.rotation_width) float32; None draws them from the seed.
            layout: the sorted order to attend in; None hashes and sorts.
            positions: (L,) or (B, L) positions for `rotary`; None means 0..L-1.
            bucket_length: automatic bucket factors are chosen for a sequence of this many tokens; None means
                L. Where it is fixed, with window="bucket" and causal, tokens that are appended later change
                no earlier output.

        Returns:
            (B, L, E), in x's dtype (the autocast dtype under autocast).

        Raises:
            ValueError, TypeError: shapes, dtypes or values that do not fit.
            RuntimeError: the back end cannot run.
        """
        self.check_input(x)
        config = with_n_hashes(self.config, n_hashes)
        if seed is None:
            seed = resolve_seed(None, x.device) if self.training else self.seed
        hashed, qk, v = self._project(x, positions)
        if bucket_length is not None and layout is None:
            config = _with_bucket_length(config, bucket_length)
        if layout is None and (is_remembering() or hashed is not qk):
            make_layout = functools.partial(
                functional.lsh_layout,
                hashed.detach(),
                config,
                rotations=rotations,
                seed=seed,
                key_padding_mask=key_padding_mask,
                backend=self.backend,
            )
            layout, rotations = remember(make_layout), None
        out = functional.lsh_attention(
            qk,
            v,
            config,
            rotations=rotations,
            layout=layout,
            key_padding_mask=key_padding_mask,
            dropout_p=self.dropout_p,
            seed=seed,
            backend=self.backend,
        )
        return self.output(self.merge_heads(out))

    def make_cache(
        self, max_length: int, *, n_hashes: int | None = None, bucket_length: int | None = None
    ) -> LSHCache:
        """An empty cache for `decode`, for rows of up to `max_length` tokens.

        n_hashes and bucket_length are as in `forward`, but for None, which means `max_length` for the latter.
        The rotations are those of evaluation.
        """
        length = max_length if bucket_length is None else bucket_length
        config = _with_bucket_length(with_n_hashes(self.config, n_hashes), length)
        rotations = functional.sample_rotations(
            config, self.num_heads, self.head_dim, self.seed, backend=self.backend
        )
        return LSHCache(config, rotations, max_length, self.backend)

    @torch.no_grad()
    def decode(self, x: Tensor, cache: LSHCache, positions: Tensor | None = None) -> Tensor:
        """The results of `forward` for new tokens, which are added to `cache`; for causal layers only.

        x is first a whole prompt without padding, (B, L, E), then one token for each row, (B, 1, E). The
        prompt's tokens attend to the prompt; each later token attends to the prefix that ends in it, as it
        was sorted when the token arrived. Returns x's shape, without gradient.
        """
        self.check_input(x)
        hashed, qk, v = self._project(x, positions)
        out = cache.step(hashed, qk, v) if cache.started else cache.prompt(hashed, qk, v)
        return self.output(self.merge_heads(out))

    def _project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The vectors to hash and the query-keys (B, H, L, D), and the values (B, H, L, D_v)."""
        hashed = qk = self.split_heads(self.query_key(x), self.head_dim)
        v = self.split_heads(self.value(x), self.value_dim)
        if self.rotary is not None:
            qk = self.rotary(qk, positions)
            hashed = qk if self.rotary.hashing == "before" else hashed
        return hashed, qk, v

    def extra_repr(self) -> str:
        return f"{self.describe_sizes()}, seed={self.seed}, config={self.config}"


def _with_bucket_length(config: LSHConfig, bucket_length: int) -> LSHConfig:
    """The configuration with the bucket factors for `bucket_length` tokens."""
    factors = config.factors(check_positive("bucket_length", bucket_length))
    return dataclasses.replace(config, bucket_factors=factors)
