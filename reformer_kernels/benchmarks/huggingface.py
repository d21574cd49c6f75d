"""The calls of the benchmarks of transformers' models: Reformers before and after `hf.accelerate`, and others
with full attention and with LSH attention by name.

Both rows of a table are one model and its copy, on the same input. Layers include their projections; models
everything from tokens to the loss. transformers is imported only when a call is built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reformer_kernels import LSHConfig, hf
from reformer_kernels.benchmarks.calls import Call, Trained, hidden_states, module_call, seeded
from reformer_kernels.benchmarks.checks import Agreement, Calls
from reformer_kernels.benchmarks.peers import axial_shape, need_multiple, quiet_transformers
from reformer_kernels.benchmarks.sizes import Sizes
from reformer_kernels.testing import TOLERANCE

ORIGINAL, ACCELERATED = "transformers", "accelerated"

MODELS: dict[str, dict[str, Any]] = {
    "default": {},
    # Two of google/reformer-enwik8's twelve layers.
    "wide": {
        "attn_layers": ["local", "lsh"],
        "hidden_size": 1024,
        "feed_forward_size": 4096,
        "num_attention_heads": 8,
        "attention_head_size": 128,
        "local_attn_chunk_length": 128,
        "lsh_attn_chunk_length": 256,
        "num_hashes": 4,
        "axial_pos_embds_dim": [256, 768],
    },
}
"""Options of transformers' `ReformerConfig`, by variant: its defaults (6 layers, 256 wide, 12 heads of 64, 1
hash round), and wide layers."""

NO_DROPOUT = {"local_attention_probs_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0}


def build_attention(name: str, sizes: Sizes) -> Call:
    """An attention layer alone, "local" or "lsh", causal and without dropout."""
    layer = _layer(name, sizes)
    x = hidden_states(sizes, sizes.width, sizes.torch_dtype)
    width = sizes.heads * sizes.head_dim
    return module_call(name, sizes, lambda x: layer(x).hidden_states, x, out_width=width)


def _layer(name: str, sizes: Sizes) -> Any:
    from transformers.models.reformer import modeling_reformer as peer

    if sizes.length > sizes.chunk_length:
        need_multiple("transformers' layer", sizes.length, sizes.chunk_length, "the chunk length")
    kinds: dict[str, Any] = {"local": peer.LocalSelfAttention, "lsh": peer.LSHSelfAttention}
    config = _config(
        sizes.length,
        num_hashes=sizes.n_hashes,
        hidden_size=sizes.width,
        num_attention_heads=sizes.heads,
        attention_head_size=sizes.head_dim,
        local_attn_chunk_length=sizes.chunk_length,
        lsh_attn_chunk_length=sizes.chunk_length,
        **NO_DROPOUT,
    )
    with seeded():
        layer = kinds[sizes.variant](config).to(sizes.device, sizes.torch_dtype)
    return _accelerated(name, layer)


def check_attention(sizes: Sizes, calls: Calls) -> Iterator[Agreement]:
    """|ours - theirs| / |theirs| of the median token, on the same buckets.

    Two hashes of one vector may differ where directions nearly tie, and tokens that see only themselves are
    up to 0.4% off in transformers' own float32.
    """
    x = hidden_states(sizes, sizes.width, sizes.torch_dtype)
    with torch.no_grad(), seeded(), quiet_transformers():
        theirs = _layer(ORIGINAL, sizes)(x)
        ours = _layer(ACCELERATED, sizes)(x, buckets=getattr(theirs, "buckets", None)).hidden_states
    error = (ours.double() - theirs.hidden_states.double()).norm(dim=-1)
    error = float((error / theirs.hidden_states.double().norm(dim=-1)).median())
    yield Agreement(
        "transformers", "output difference of the median token", error, TOLERANCE[sizes.torch_dtype]
    )


def build_model(name: str, sizes: Sizes) -> Call:
    """A causal language model: the loss without gradients, and a training step, dropout included."""
    from transformers import ReformerModelWithLMHead

    options = {"local_attn_chunk_length": 64, "lsh_attn_chunk_length": 64} | MODELS[sizes.variant]
    chunk = math.lcm(options["local_attn_chunk_length"], options["lsh_attn_chunk_length"])
    need_multiple("transformers' model", sizes.length, chunk, "its chunk lengths")
    with seeded():
        model: Any = ReformerModelWithLMHead(_config(sizes.length, **options))
        tokens = torch.randint(model.config.vocab_size, (sizes.batch, sizes.length)).to(sizes.device)
    model = _accelerated(name, model.to(sizes.device, sizes.torch_dtype))

    def forward() -> Sequence[Tensor]:
        with torch.no_grad(), quiet_transformers():
            return [model.eval()(tokens, use_cache=False).logits]

    def train() -> Trained:
        with quiet_transformers():
            model.train()(tokens, labels=tokens, use_cache=False).loss.backward()
        return Trained([])

    return Call(name, sizes, forward, train, train_phase="training step", inputs=[tokens])


FULL, LSH = "sdpa", "lsh"

OTHER_MODELS = ("llama", "bert")
"""A decoder whose 8 heads share 2 heads of keys, and an encoder."""


def build_other_model(name: str, sizes: Sizes) -> Call:
    """Two layers of another architecture, to the last hidden states, and their gradients."""
    import transformers

    options: dict[str, Any] = {
        "hidden_size": sizes.width,
        "num_hidden_layers": int(sizes.layers),
        "num_attention_heads": sizes.heads,
        "intermediate_size": 2 * sizes.width,
        "vocab_size": 256,
        "max_position_embeddings": sizes.length,
    }
    config = LSHConfig(n_hashes=sizes.n_hashes, chunk_length=sizes.chunk_length)
    hf.register_attention(LSH, hf.AttentionOptions(config))
    with seeded():
        if sizes.variant == "llama":
            key_heads = max(1, sizes.heads // 4)
            llama = transformers.LlamaConfig(**options, num_key_value_heads=key_heads, pad_token_id=0)
            model: Any = transformers.LlamaModel(llama)
        else:
            options |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            model = transformers.BertModel(transformers.BertConfig(**options))
        tokens = torch.randint(256, (sizes.batch, sizes.length)).to(sizes.device)
    model = model.to(sizes.device, sizes.torch_dtype)
    model.set_attn_implementation(name)

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return [model.eval()(tokens)[0]]

    def train() -> Trained:
        model.train()(tokens)[0].square().mean().backward()
        return Trained([])

    return Call(name, sizes, forward, train, train_phase="training step", inputs=[tokens])


def _accelerated(name: str, module: nn.Module) -> nn.Module:
    if name == ACCELERATED:
        hf.accelerate(module)
    elif name != ORIGINAL:
        raise KeyError(name)
    return module


def _config(length: int, **options: Any) -> Any:
    from transformers import ReformerConfig

    with quiet_transformers():
        return ReformerConfig(
            is_decoder=True,
            axial_pos_shape=axial_shape(length),
            max_position_embeddings=length,
            **options,
        )
