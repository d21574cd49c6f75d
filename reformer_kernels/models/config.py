"""The configuration of a Reformer model: one frozen value, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from reformer_kernels.config import (
    MAX_CHUNK_LENGTH,
    MAX_NEIGHBOURS,
    LSHConfig,
    check_choice,
    check_flag,
    check_integer,
)
from reformer_kernels.ops.feed_forward.activations import ACTIVATIONS

LayerKind = Literal["lsh", "local", "full"]
Positions = Literal["axial", "learned", "sinusoidal", "rotary", "none"]
Residual = Literal["float", "exact", "plain"]
Streams = Literal["concat", "mean"]
CrossAttentionKind = Literal["full", "lsh"]

MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class ReformerConfig:
    """The sizes and choices of a `Reformer`, a `ReformerLM` or one side of a `ReformerEncoderDecoder`.

    Attributes:
        vocab_size: V, the number of different tokens.
        d_model: d, the width of hidden states.
        layers: the attention of each layer, first to last: "lsh", "local" or "full". For example
            ("local", "lsh") * 3 makes six layers.
        num_heads: H, the number of attention heads.
        head_dim: D, the width of a head; None means d / H.
        d_ff: the hidden width of the feed-forward layer; None means 4 d.
        activation: the feed-forward layer's activation, GLU variants included: see `chunked_feed_forward`.
        causal: whether no token sees a later one.
        lsh: how LSH layers hash and attend; its `causal` is replaced by this configuration's. None means
            `LSHConfig()`, with window="bucket" for causal models, so that training, evaluation and generation
            token by token see the same keys.
        local_chunk_length, local_chunks_before, local_chunks_after, local_ring: the chunks of local layers;
            see `LocalSelfAttention`.
        positions: "axial", "learned" or "sinusoidal" positions are added to the embedding, "rotary" ones act
            in the attention layers; or "none".
        max_length: the longest sequence that axial and learned positions hold; the others have no bound.
        bucket_length: the length that automatic bucket factors of LSH layers are for, in every call. None
            means `max_length` for causal models, so that a token has the same buckets whatever comes after
            it, in training, evaluation and generation; for other models it means the length of each call.
        axial_shape, axial_dims: the grid of `AxialPositionalEmbedding`; None derives it from max_length and
            d_model.
        rotary_hashing: whether LSH layers rotate "before" or "after" hashing; see `RotaryPositions`.
        rotary_base: the base of the rotary frequencies.
        token_context: n, the number of tokens in an embedding: the token itself and the n - 1 before it, each
            with a table of its own, are summed. 1 gives ordinary embeddings.
        norm: "layer" or "rms", before each attention and feed-forward layer and at the end.
        norm_eps: the epsilon of the norms.
        attention_bias: whether the query, key and value projections have a bias.
        attention_out_bias: whether the output projection of attention has a bias.
        dropout: probability of dropping elements of the embedding, of both residuals of a layer, of the
            feed-forward layer's hidden states and of the output.
        attention_dropout: probability of dropping attention weights in LSH and full layers.
        local_attention_dropout: the same in local layers; None means attention_dropout.
        residual: "float" or "exact" for reversible layers, see `ReversibleSequence`. "plain" computes the
            same function with ordinary autograd, whose memory grows with depth.
        keep_layouts: whether the backward pass keeps layouts; see `ReversibleSequence`. Needs residual
            "float".
        streams: how the two residual streams end: "concat" (2 d wide, as in trax and Hugging Face) or "mean"
            (d wide, as in reformer_pytorch).
        tie_embeddings: whether a language model's head shares the embedding's weights; needs streams "mean"
            and token_context 1.
        head_bias: whether a language model's head has a bias.
        cross_attention: the cross-attention of a decoder, "full" or "lsh"; None has no memory to attend to.
        memory_dim: the width of that memory, an encoder's d_out; None means this configuration's own d_out.
        init_std: standard deviation of the normal distribution of initial weights; biases start at 0.
        ff_chunk_size: rows in a chunk of the feed-forward layer; None chooses them by memory.
        seed: the seed of the rotations in evaluation mode and in generation.
        backend: "auto", "reference", "native" or "triton".

    Raises:
        ValueError: a value that is not accepted; the message says which ones are.

    >>> ReformerConfig(vocab_size=256, layers=("local", "lsh") * 2, causal=True).lsh.window
    'bucket'
    """

    vocab_size: int
    d_model: int = 256
    layers: tuple[LayerKind, ...] = ("lsh",) * 6
    num_heads: int = 4
    head_dim: int | None = None
    d_ff: int | None = None
    activation: str = "gelu"
    causal: bool = False
    lsh: LSHConfig | None = None
    local_chunk_length: int = 64
    local_chunks_before: int = 1
    local_chunks_after: int = 0
    local_ring: bool = False
    positions: Positions = "axial"
    max_length: int = 4096
    bucket_length: int | None = None
    axial_shape: tuple[int, ...] | None = None
    axial_dims: tuple[int, ...] | None = None
    rotary_hashing: Literal["before", "after"] = "after"
    rotary_base: float = 10000.0
    token_context: int = 1
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    attention_bias: bool = False
    attention_out_bias: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    local_attention_dropout: float | None = None
    residual: Residual = "float"
    keep_layouts: bool = False
    streams: Streams = "concat"
    tie_embeddings: bool = False
    head_bias: bool = True
    cross_attention: CrossAttentionKind | None = None
    memory_dim: int | None = None
    init_std: float = 0.02
    ff_chunk_size: int | None = None
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "num_heads", "max_length"):
            check_integer(name, getattr(self, name), 1, MAX_SIZE)
        for name in ("head_dim", "d_ff", "ff_chunk_size", "bucket_length", "memory_dim"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1, MAX_SIZE, or_else="None")
        check_integer("token_context", self.token_context, 1, 64)
        check_integer("local_chunk_length", self.local_chunk_length, 1, MAX_CHUNK_LENGTH)
        check_integer("local_chunks_before", self.local_chunks_before, 0, MAX_NEIGHBOURS)
        check_integer("local_chunks_after", self.local_chunks_after, 0, MAX_NEIGHBOURS)
        check_integer("seed", self.seed, 0, 2**62)
        for name in ("causal", "local_ring", "attention_bias", "attention_out_bias", "keep_layouts"):
            check_flag(name, getattr(self, name))
        for name in ("tie_embeddings", "head_bias"):
            check_flag(name, getattr(self, name))
        self._check_layers()
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        check_choice("positions", self.positions, get_args(Positions))
        check_choice("rotary_hashing", self.rotary_hashing, ("before", "after"))
        check_choice("norm", self.norm, ("layer", "rms"))
        check_choice("residual", self.residual, get_args(Residual))
        check_choice("streams", self.streams, get_args(Streams))
        check_choice("backend", self.backend, ("auto", "reference", "native", "triton"))
        if self.cross_attention is not None:
            check_choice("cross_attention", self.cross_attention, get_args(CrossAttentionKind))
        for name in ("dropout", "attention_dropout", "local_attention_dropout"):
            p = getattr(self, name)
            if not (name.startswith("local") and p is None) and not _is_number(p, 0.0, 1.0):
                raise ValueError(f"{name} must be at least 0 and below 1, got {p!r}")
        for name in ("norm_eps", "init_std", "rotary_base"):
            if not _is_number(getattr(self, name), 0.0, float("inf")):
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)!r}")
        self._check_sizes()
        if self.lsh is not None and not isinstance(self.lsh, LSHConfig):
            raise ValueError(f"lsh must be an LSHConfig or None, got {type(self.lsh).__name__}")
        lsh = LSHConfig(window="bucket" if self.causal else "chunks") if self.lsh is None else self.lsh
        object.__setattr__(self, "lsh", dataclasses.replace(lsh, causal=self.causal))

    def _check_layers(self) -> None:
        if isinstance(self.layers, str) or not isinstance(self.layers, tuple | list) or not self.layers:
            raise ValueError(
                "layers must name the attention of each layer, such as ('local', 'lsh') * 3, got "
                f"{self.layers!r}"
            )
        for kind in self.layers:
            check_choice("each of layers", kind, get_args(LayerKind))
        object.__setattr__(self, "layers", tuple(self.layers))

    def _check_sizes(self) -> None:
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                "d_model must be a multiple of num_heads where head_dim is not given, got d_model "
                f"{self.d_model} and num_heads {self.num_heads}"
            )
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"d_model must be even for sinusoidal positions, got {self.d_model}")
        if self.positions == "rotary" and self.size_of_head % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.size_of_head}")
        for name in ("axial_shape", "axial_dims"):
            sizes = getattr(self, name)
            if sizes is None:
                continue
            if self.positions != "axial":
                raise ValueError(f'{name} belongs to positions="axial", got positions={self.positions!r}')
            if not isinstance(sizes, tuple | list) or not sizes:
                raise ValueError(f"{name} must be a tuple of positive integers or None, got {sizes!r}")
            for size in sizes:
                check_integer(f"each of {name}", size, 1, MAX_SIZE)
            object.__setattr__(self, name, tuple(sizes))
        if self.axial_dims is not None and sum(self.axial_dims) != self.d_model:
            raise ValueError(f"axial_dims must sum to d_model {self.d_model}, got {self.axial_dims}")
        dims, shape = self.axial_dims, self.axial_shape
        if dims is not None and shape is not None and len(dims) != len(shape):
            raise ValueError(f"axial_dims and axial_shape must have one size an axis, got {dims} and {shape}")
        if self.keep_layouts and self.residual != "float":
            raise ValueError(f'keep_layouts is for residual="float", got residual={self.residual!r}')
        if self.tie_embeddings and (self.streams != "mean" or self.token_context != 1):
            raise ValueError(
                'tie_embeddings needs streams="mean" (a head as wide as the embedding) and token_context=1, '
                f"got streams={self.streams!r} and token_context={self.token_context}"
            )

    @property
    def size_of_head(self) -> int:
        """D: `head_dim`, or d / H where that is None."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def lsh_config(self) -> LSHConfig:
        """`lsh`, which is never None after the configuration was made."""
        assert self.lsh is not None
        return self.lsh

    @property
    def buckets_for(self) -> int | None:
        """The length that automatic bucket factors are for; None means the length of each call."""
        if self.bucket_length is None and self.causal:
            return self.max_length
        return self.bucket_length

    @property
    def size_of_memory(self) -> int:
        """The width of what cross-attention attends to."""
        return self.d_out if self.memory_dim is None else self.memory_dim

    @property
    def d_out(self) -> int:
        """The width of the model's output: 2 d for streams "concat", d for "mean"."""
        return 2 * self.d_model if self.streams == "concat" else self.d_model

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain numbers, strings, lists and dictionaries, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReformerConfig:
        """The configuration that `to_dict` wrote. Raises ValueError for an unknown name or a bad value."""
        names = {field.name for field in dataclasses.fields(cls)}
        lsh_names = {field.name for field in dataclasses.fields(LSHConfig)}
        lsh = values.get("lsh")
        unknown = sorted(map(str, values.keys() - names))
        if isinstance(lsh, Mapping):
            unknown += [f"lsh.{name}" for name in sorted(map(str, lsh.keys() - lsh_names))]
        if unknown or "vocab_size" not in values:
            raise ValueError(
                "not a Reformer configuration: "
                + (f"unknown {', '.join(unknown)}" if unknown else "no vocab_size")
            )
        given = dict(values)
        if isinstance(lsh, Mapping):
            given["lsh"] = LSHConfig(**lsh)
        return cls(**given)


def _is_number(value: object, low: float, end: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value < end
