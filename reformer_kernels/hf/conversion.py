"""Conversion between the configurations and parameter names of transformers and ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reformer_kernels._checks import kind_of
from reformer_kernels.config import LSHConfig
from reformer_kernels.models import (
    Reformer,
    ReformerClassifier,
    ReformerConfig,
    ReformerLM,
    ReformerQuestionAnswering,
)
from reformer_kernels.modules import AxialPositionalEmbedding

# Configuration

DEFAULTS: dict[str, Any] = {
    "attention_head_size": 64,
    "attn_layers": ["local", "lsh", "local", "lsh", "local", "lsh"],
    "axial_pos_embds": True,
    "axial_pos_embds_dim": [64, 192],
    "axial_pos_shape": [64, 64],
    "classifier_dropout": None,
    "feed_forward_size": 512,
    "hash_seed": None,
    "hidden_act": "relu",
    "hidden_dropout_prob": 0.05,
    "hidden_size": 256,
    "initializer_range": 0.02,
    "is_decoder": False,
    "layer_norm_eps": 1e-12,
    "local_attention_probs_dropout_prob": 0.05,
    "local_attn_chunk_length": 64,
    "local_num_chunks_after": 0,
    "local_num_chunks_before": 1,
    "lsh_attention_probs_dropout_prob": 0.0,
    "lsh_attn_chunk_length": 64,
    "lsh_num_chunks_after": 0,
    "lsh_num_chunks_before": 1,
    "max_position_embeddings": 4096,
    "num_attention_heads": 12,
    "num_buckets": None,
    "num_hashes": 1,
    "vocab_size": 320,
}
"""The defaults of transformers' `ReformerConfig`, which a config.json leaves out."""

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' names of activations and ours; where several mean the same, the first is written."""

ARCHITECTURES: dict[str, type[nn.Module]] = {
    "ReformerModel": Reformer,
    "ReformerModelWithLMHead": ReformerLM,
    "ReformerForMaskedLM": ReformerLM,
    "ReformerForSequenceClassification": ReformerClassifier,
    "ReformerForQuestionAnswering": ReformerQuestionAnswering,
}


KEPT = "hugging_face_config"
"""Attribute of a loaded model: the config.json it came with, for what our configuration does not hold."""


def config_from(values: Mapping[str, Any], *, backend: str = "auto") -> ReformerConfig:
    """Our configuration for the values of a config.json. Raises ValueError for values not accepted."""
    given = DEFAULTS | dict(values)
    if given["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}, got {given['hidden_act']!r}")
    if not set(given["attn_layers"]) <= {"lsh", "local"}:
        raise ValueError(f'attn_layers must be "lsh" or "local" each, got {given["attn_layers"]!r}')
    axial = given["axial_pos_embds"]
    buckets = given["num_buckets"]
    seed = given["hash_seed"]
    return ReformerConfig(
        vocab_size=given["vocab_size"],
        d_model=given["hidden_size"],
        layers=tuple(given["attn_layers"]),
        num_heads=given["num_attention_heads"],
        head_dim=given["attention_head_size"],
        d_ff=given["feed_forward_size"],
        activation=ACTIVATIONS[given["hidden_act"]],
        causal=given["is_decoder"],
        lsh=LSHConfig.trax(
            n_hashes=given["num_hashes"],
            chunk_length=given["lsh_attn_chunk_length"],
            chunks_before=given["lsh_num_chunks_before"],
            chunks_after=given["lsh_num_chunks_after"],
            bucket_factors=buckets,
        ),
        local_chunk_length=given["local_attn_chunk_length"],
        local_chunks_before=given["local_num_chunks_before"],
        local_chunks_after=given["local_num_chunks_after"],
        local_ring=True,
        positions="axial" if axial else "learned",
        max_length=given["max_position_embeddings"],
        axial_shape=tuple(given["axial_pos_shape"]) if axial else None,
        axial_dims=tuple(given["axial_pos_embds_dim"]) if axial else None,
        norm_eps=given["layer_norm_eps"],
        dropout=given["hidden_dropout_prob"],
        attention_dropout=given["lsh_attention_probs_dropout_prob"],
        local_attention_dropout=given["local_attention_probs_dropout_prob"],
        init_std=given["initializer_range"],
        seed=0 if seed is None else seed,
        backend=backend,
    )


def config_to(model: nn.Module) -> dict[str, Any]:
    """The config.json of one of our models, with the rest of the config.json that it was read from, if any.

    Raises:
        TypeError: transformers has no such model.
        ValueError: transformers cannot express the model; all reasons are listed.
    """
    check_expressible(model)
    config, axial = config_of(model), axial_table(model)
    lsh = config.lsh_config
    factors = lsh.bucket_factors
    values: dict[str, Any] = {
        "model_type": "reformer",
        "architectures": [architecture_of(model)],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "attn_layers": list(config.layers),
        "num_attention_heads": config.num_heads,
        "attention_head_size": config.size_of_head,
        "feed_forward_size": 4 * config.d_model if config.d_ff is None else config.d_ff,
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation),
        "is_decoder": config.causal,
        "num_hashes": lsh.n_hashes,
        "num_buckets": factors[0] if factors is not None and len(factors) == 1 else factors,
        "lsh_attn_chunk_length": lsh.chunk_length,
        "lsh_num_chunks_before": lsh.chunks_before,
        "lsh_num_chunks_after": lsh.chunks_after,
        "local_attn_chunk_length": config.local_chunk_length,
        "local_num_chunks_before": config.local_chunks_before,
        "local_num_chunks_after": config.local_chunks_after,
        "axial_pos_embds": axial is not None,
        "max_position_embeddings": config.max_length,
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.dropout,
        "lsh_attention_probs_dropout_prob": config.attention_dropout,
        "local_attention_probs_dropout_prob": config.attention_dropout
        if config.local_attention_dropout is None
        else config.local_attention_dropout,
        "initializer_range": config.init_std,
    }
    if axial is not None:
        values |= {"axial_pos_shape": list(axial.shape), "axial_pos_embds_dim": list(axial.dims)}
    kept: dict[str, Any] = getattr(model, KEPT, {})
    if isinstance(model, ReformerClassifier):
        known = kept.get("classifier_dropout")
        if model.dropout != (config.dropout if known is None else known):
            values["classifier_dropout"] = model.dropout
        if len(kept.get("id2label", ())) != model.n_labels:
            values["id2label"] = {str(n): f"LABEL_{n}" for n in range(model.n_labels)}
            values["label2id"] = {f"LABEL_{n}": n for n in range(model.n_labels)}
    # `torch_dtype` is the old name of `dtype`.
    return {name: value for name, value in kept.items() if name != "torch_dtype"} | values


def architecture_of(model: nn.Module) -> str:
    """The class of transformers that corresponds to one of our models."""
    if isinstance(model, ReformerLM):
        return "ReformerModelWithLMHead" if model.config.causal else "ReformerForMaskedLM"
    return next(name for name, kind in ARCHITECTURES.items() if isinstance(model, kind))


def config_of(model: nn.Module) -> ReformerConfig:
    """The configuration of a model. Raises TypeError for a model that transformers does not have."""
    if not isinstance(model, tuple(ARCHITECTURES.values())):
        names = ", ".join(sorted({kind.__name__ for kind in ARCHITECTURES.values()}))
        raise TypeError(f"model must be one of {names}, got {kind_of(model)}")
    config: Any = model.config
    return config


def axial_table(model: nn.Module) -> AxialPositionalEmbedding | None:
    """The axial position embedding of one of our models, if it has one."""
    body: Any = model if isinstance(model, Reformer) else model.reformer
    table = body.embedding.positions
    return table if isinstance(table, AxialPositionalEmbedding) else None


def check_expressible(model: nn.Module) -> None:
    """Raise ValueError, with all reasons, for a model that transformers' Reformer cannot express."""
    config, axial = config_of(model), axial_table(model)
    lsh, trax = config.lsh_config, LSHConfig.trax()
    fixed: list[tuple[str, Any, Any]] = [
        (f"lsh.{field}", getattr(lsh, field), getattr(trax, field))
        for field in ("window", "attend_across_buckets", "correct_duplicates", "ring", "key_norm", "scale")
    ]
    fixed += [
        ("token_context", config.token_context, 1),
        ("norm", config.norm, "layer"),
        ("streams", config.streams, "concat"),
        ("attention_bias", config.attention_bias, False),
        ("attention_out_bias", config.attention_out_bias, False),
        ("cross_attention", config.cross_attention, None),
    ]
    if "local" in config.layers and not config.causal:
        fixed.append(("local_ring", config.local_ring, True))
    if isinstance(model, ReformerLM):
        fixed.append(("head_bias", config.head_bias, True))
    wrong = [f"{name} must be {wanted!r}, is {value!r}" for name, value, wanted in fixed if value != wanted]
    if "full" in config.layers:
        wrong.append('layers must be "lsh" or "local" each')
    if config.positions not in ("axial", "learned"):
        wrong.append(f'positions must be "axial" or "learned", is {config.positions!r}')
    if axial is not None and len(axial.shape) != 2:
        wrong.append(f"axial positions must have two axes, has {len(axial.shape)}")
    accepted = sorted(set(ACTIVATIONS.values()))
    if config.activation not in accepted:
        wrong.append(f"activation must be one of {', '.join(accepted)}, is {config.activation!r}")
    if wrong:
        raise ValueError("transformers cannot express this model: " + "; ".join(wrong))


# Parameters

HEAD_BIAS, DECODER_BIAS = "lm_head.bias", "lm_head.decoder.bias"

_CONSTANTS = re.compile(r"\.self_attention\.(self_)?mask_value_float(16|32)$")
"""Buffers of old checkpoints that hold the values of masked logits."""


@dataclass(frozen=True)
class Counterpart:
    """Our parameter for one of transformers', with the shape that it has there."""

    ours: nn.Parameter
    shape: tuple[int, ...]


def counterparts(model: nn.Module) -> dict[str, Counterpart]:
    """All parameters of one of our models, under transformers' names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    axial = axial_table(model)
    axes = 0 if axial is None else len(axial.shape)
    pairs = {}
    for theirs, ours in _names(model, axes):
        parameter = parameters[ours]
        shape = tuple(parameter.shape)
        if "position_embeddings.weights" in theirs:
            # Each axis has a table of its own, which broadcasts over the grid.
            axis = int(theirs.rsplit(".", 1)[1])
            shape = (*(shape[0] if n == axis else 1 for n in range(axes)), shape[1])
        pairs[theirs] = Counterpart(parameter, shape)
    return pairs


def _names(model: nn.Module, axes: int) -> Iterator[tuple[str, str]]:
    """Pairs of transformers' and our name of every parameter; `axes` counts the axes of axial positions."""
    prefix = "" if isinstance(model, Reformer) else "reformer."
    both = "weight", "bias"

    def body(theirs: str, ours: str, *parts: str) -> Iterator[tuple[str, str]]:
        for part in parts:
            yield f"{prefix}{theirs}.{part}", f"{prefix}{ours}.{part}"

    def head(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
        for part in both:
            yield f"{theirs}.{part}", f"{ours}.{part}"

    yield from body("embeddings.word_embeddings", "embedding.tokens", "weight")
    if axes:
        tables = map(str, range(axes))
        yield from body("embeddings.position_embeddings.weights", "embedding.positions.weights", *tables)
    else:
        yield from body("embeddings.position_embeddings.embedding", "embedding.positions", "weight")
    for n, kind in enumerate(config_of(model).layers):
        theirs, ours = f"encoder.layers.{n}", f"layers.blocks.{n}"
        yield from body(f"{theirs}.attention.layer_norm", f"{ours}.norm_f", *both)
        for name in ("query_key", "value") if kind == "lsh" else ("query", "key", "value"):
            projection = f"{theirs}.attention.self_attention.{name}"
            yield from body(projection, f"{ours}.f.attention.{name}", "weight")
        yield from body(f"{theirs}.attention.output.dense", f"{ours}.f.attention.output", "weight")
        yield from body(f"{theirs}.feed_forward.layer_norm", f"{ours}.norm_g", *both)
        yield from body(f"{theirs}.feed_forward.dense.dense", f"{ours}.g.feed_forward.inner", *both)
        yield from body(f"{theirs}.feed_forward.output.dense", f"{ours}.g.feed_forward.outer", *both)
    yield from body("encoder.layer_norm", "norm", *both)
    if isinstance(model, ReformerLM):
        yield "lm_head.decoder.weight", "head.weight"
        yield HEAD_BIAS, "head.bias"
    elif isinstance(model, ReformerClassifier):
        yield from head("classifier.dense", "dense")
        yield from head("classifier.out_proj", "out")
    elif isinstance(model, ReformerQuestionAnswering):
        yield from head("qa_outputs", "out")


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of one of our models under transformers' names and in its shapes; they share memory.

    Raises:
        TypeError: transformers has no such model.
        ValueError: transformers cannot express the model; all reasons are listed.
    """
    check_expressible(model)
    values = {name: x.ours.detach().view(x.shape) for name, x in counterparts(model).items()}
    if HEAD_BIAS in values:
        values[DECODER_BIAS] = values[HEAD_BIAS]  # which transformers from 5.24 on adds to its logits
    return values


def load_state_dict(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy the state dict of a transformers Reformer into one of our models.

    Names of old versions are understood; constants such as `mask_value_float32` are left out. For a
    `Reformer`, names may begin with "reformer." or not. Values are converted to the model's dtype and device.
    After an error the model is as it was.

    `lm_head.bias` is used, although transformers loads it and leaves it out of its logits.
    `lm_head.decoder.bias` is another name of it in old checkpoints; from 5.24 on it is a parameter of its
    own, and the only one that is added to the logits. Where both are given, `lm_head.decoder.bias` is used.

    Args:
        model: a `Reformer`, `ReformerLM`, `ReformerClassifier` or `ReformerQuestionAnswering` of the
            checkpoint's sizes, as `hf.from_pretrained` makes it.
        values: names to tensors.

    Raises:
        TypeError: transformers has no such model, or a value is not a tensor.
        ValueError: names are missing or unknown, or shapes or dtypes do not fit; all are listed.
    """
    given = check_state_dict(model, values)
    with torch.no_grad():
        for name, x in counterparts(model).items():
            x.ours.copy_(given[name].view(x.ours.shape))


def check_state_dict(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under current names, one entry for each parameter. Raises as `load_state_dict` does."""
    wanted, given = counterparts(model), _current_names(model, values)
    problems = [f"missing: {name}" for name in wanted if name not in given]
    problems += [f"unknown: {name}" for name in given if name not in wanted]
    for name in (name for name in wanted if name in given):
        value, shape = given[name], wanted[name].shape
        if tuple(value.shape) != shape:
            problems.append(f"wrong shape: {name} is {tuple(value.shape)}, must be {shape}")
        elif not value.is_floating_point():
            problems.append(f"wrong dtype: {name} is {value.dtype}, must be floating-point")
    if problems:
        raise ValueError(
            f"the state dict does not fit this {type(model).__name__}:\n  " + "\n  ".join(problems)
        )
    return given


def _current_names(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without constants, under the names of current versions of transformers."""
    given: dict[str, Tensor] = {}
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"a state dict holds tensors, got {type(value).__name__} as {name}")
        if not _CONSTANTS.search(name):
            given[name] = value
    second = given.pop(DECODER_BIAS, None)
    if second is not None:
        first = given.setdefault(HEAD_BIAS, second)
        if second.shape != first.shape or not second.is_floating_point():
            given[DECODER_BIAS] = second  # which is then listed as unknown
        elif first.is_floating_point():
            given[HEAD_BIAS] = second
    if isinstance(model, Reformer):
        return {name.removeprefix("reformer."): value for name, value in given.items()}
    return given
