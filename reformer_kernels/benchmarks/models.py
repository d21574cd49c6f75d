"""The calls of the benchmarks of whole models: `model`, `mha` and `encoder`.

Each builder makes the call of one row. 16-bit dtypes run under autocast on float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels.benchmarks.calls import (
    Call,
    Trained,
    autocast_to,
    hidden_states,
    module_call,
    seeded,
    weight_dtype,
)
from reformer_kernels.benchmarks.checks import Agreement, Calls
from reformer_kernels.benchmarks.peers import axial_shape, need_multiple, quiet_transformers
from reformer_kernels.benchmarks.sizes import Sizes
from reformer_kernels.config import LSHConfig
from reformer_kernels.models import ReformerLM
from reformer_kernels.models.config import LayerKind, ReformerConfig
from reformer_kernels.modules.multihead_attention import MultiheadAttention
from reformer_kernels.modules.replace import replace_attention
from reformer_kernels.testing import TOLERANCE, relative_error

VOCABULARY = 256
"""Byte-level language models."""

Loss = Callable[[nn.Module, Tensor], Tensor]


def build_language_model(name: str, sizes: Sizes) -> Call:
    """A training step (forward, loss, backward, AdamW) of a causal byte-level language model of LSH layers:
    ours, Hugging Face's and `reformer_pytorch`'s of the same size."""
    makers = {
        "reformer_kernels": _our_model,
        "Hugging Face": _huggingface_model,
        "reformer_pytorch": _lucidrains_model,
    }
    with seeded():
        model, loss = makers[name](sizes)
        tokens = torch.randint(VOCABULARY, (sizes.batch, sizes.length)).to(sizes.device)
    model = model.to(sizes.device, weight_dtype(sizes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def forward() -> Sequence[Tensor]:
        with torch.no_grad(), autocast_to(sizes):
            return [loss(model, tokens)]

    def train() -> Trained:
        with autocast_to(sizes):
            value = loss(model, tokens)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return Trained([value.detach()])

    return Call(name, sizes, forward, train, train_phase="training step", inputs=[tokens])


def _our_model(sizes: Sizes) -> tuple[nn.Module, Loss]:
    kind: LayerKind = "lsh"
    config = ReformerConfig(
        vocab_size=VOCABULARY,
        d_model=sizes.width,
        layers=(kind,) * sizes.layers,
        num_heads=sizes.heads,
        d_ff=4 * sizes.width,
        causal=True,
        lsh=LSHConfig.trax(n_hashes=sizes.n_hashes, chunk_length=sizes.chunk_length),
        max_length=sizes.length,
    )
    return ReformerLM(config), lambda model, tokens: model(tokens, labels=tokens)


def _huggingface_model(sizes: Sizes) -> tuple[nn.Module, Loss]:
    from transformers import ReformerConfig as TheirConfig
    from transformers import ReformerModelWithLMHead

    length, width = sizes.length, sizes.width
    need_multiple("Hugging Face's model", length, sizes.chunk_length, "the chunk length")
    with quiet_transformers():
        model = ReformerModelWithLMHead(
            TheirConfig(
                vocab_size=VOCABULARY,
                attn_layers=["lsh"] * sizes.layers,
                hidden_size=width,
                num_attention_heads=sizes.heads,
                attention_head_size=width // sizes.heads,
                feed_forward_size=4 * width,
                hidden_act="gelu",
                num_hashes=sizes.n_hashes,
                lsh_attn_chunk_length=sizes.chunk_length,
                axial_pos_shape=axial_shape(length),
                axial_pos_embds_dim=(width // 4, width - width // 4),
                max_position_embeddings=length,
                is_decoder=True,
                use_cache=False,
                hidden_dropout_prob=0.0,
                lsh_attention_probs_dropout_prob=0.0,
            )
        )

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        with quiet_transformers():
            result: Tensor = model(tokens, labels=tokens).loss
        return result

    return model, loss


def _lucidrains_model(sizes: Sizes) -> tuple[nn.Module, Loss]:
    from reformer_pytorch import ReformerLM as Theirs

    need_multiple("reformer_pytorch", sizes.length, 2 * sizes.chunk_length, "twice the chunk length")
    model = Theirs(
        num_tokens=VOCABULARY,
        dim=sizes.width,
        depth=sizes.layers,
        max_seq_len=sizes.length,
        heads=sizes.heads,
        bucket_size=sizes.chunk_length,
        n_hashes=sizes.n_hashes,
        causal=True,
        axial_position_emb=True,
    )

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss


def build_multihead_attention(name: str, sizes: Sizes) -> Call:
    """`nn.MultiheadAttention`, ours with its default threshold, and ours always hashing ("LSH"): where the
    default threshold belongs, and what ours costs below it. No weights are returned."""
    with seeded():
        plain = nn.MultiheadAttention(sizes.width, sizes.heads, batch_first=True)
    module = plain
    if name != "nn.MultiheadAttention":
        module = MultiheadAttention(
            sizes.width,
            sizes.heads,
            batch_first=True,
            config=_config(sizes),
            full_attention_threshold={"default": None, "LSH": 0}[name],
        )
        module.load_state_dict(plain.state_dict())
    dtype = weight_dtype(sizes)
    module.to(sizes.device, dtype)

    def attend(x: Tensor) -> Tensor:
        result: Tensor = module(x, x, x, need_weights=False)[0]
        return result

    return module_call(name, sizes, attend, hidden_states(sizes, sizes.width, dtype), autocast=True)


def check_multihead_attention(sizes: Sizes, calls: Calls) -> Iterator[Agreement]:
    """Where all outputs are those of full attention, whether ours are those of torch's."""
    short = min(sizes.length, 32)
    x = hidden_states(sizes, sizes.width, weight_dtype(sizes))[:, :short]
    with seeded(), torch.no_grad():
        theirs = nn.MultiheadAttention(sizes.width, sizes.heads, batch_first=True, device=x.device).to(
            x.dtype
        )
        ours = MultiheadAttention(sizes.width, sizes.heads, batch_first=True, device=x.device).to(x.dtype)
        ours.load_state_dict(theirs.state_dict())
        error = relative_error(ours(x, x, x, need_weights=False)[0], theirs(x, x, x, need_weights=False)[0])
    name = f"nn.MultiheadAttention, first {short} tokens"
    yield Agreement(name, "largest output difference", error, TOLERANCE[x.dtype])


def build_encoder(name: str, sizes: Sizes) -> Call:
    """`nn.TransformerEncoder` in training, before and after `replace_attention`."""
    with seeded():
        layer = nn.TransformerEncoderLayer(
            sizes.width, sizes.heads, 4 * sizes.width, dropout=0.0, batch_first=True
        )
    model = nn.TransformerEncoder(layer, sizes.layers)
    if name == "replace_attention":
        replace_attention(model, config=_config(sizes))
    elif name != "nn.TransformerEncoder":
        raise KeyError(name)
    dtype = weight_dtype(sizes)
    model.to(sizes.device, dtype)
    return module_call(name, sizes, model, hidden_states(sizes, sizes.width, dtype), autocast=True)


def _config(sizes: Sizes) -> LSHConfig:
    return LSHConfig(n_hashes=sizes.n_hashes, chunk_length=sizes.chunk_length)
