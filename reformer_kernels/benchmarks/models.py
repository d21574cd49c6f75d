"""Whole models beside what they replace: `reformer-kernels bench model | mha | encoder`.

Each `bench_*` function returns the rows of `steps.compare`; the step named first is the plain one.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels.benchmarks.steps import Row, Step, compare
from reformer_kernels.config import LSHConfig
from reformer_kernels.models import ReformerLM
from reformer_kernels.models.config import LayerKind, ReformerConfig
from reformer_kernels.modules.multihead_attention import MultiheadAttention
from reformer_kernels.modules.replace import replace_attention

VOCABULARY = 256


def bench_language_model(
    length: int = 16384,
    layers: int = 6,
    width: int = 256,
    heads: int = 4,
    n_hashes: int = 4,
    chunk_length: int = 64,
    *,
    budget: float = 60.0,
    repeats: int = 5,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """A training step (forward, loss, backward, AdamW) of a causal byte-level LM of LSH layers: ours, Hugging
    Face's and `reformer_pytorch`'s of the same size. 16-bit dtypes: weights in float32, under autocast.
    """
    place = torch.device(device)
    tokens = torch.randint(VOCABULARY, (1, length), device=place)
    sizes = (length, layers, width, heads, n_hashes, chunk_length)
    makers = {
        "reformer_kernels": _our_model,
        "Hugging Face": _huggingface_model,
        "reformer_pytorch": _lucidrains_model,
    }
    steps: dict[str, Step] = {}
    for name, make in makers.items():
        torch.manual_seed(0)
        try:
            model, loss = make(*sizes)
        except ImportError:
            continue
        steps[name] = _training_step(model.to(place).train(), loss, tokens, dtype)
    about = {"length": length, "layers": layers, "width": width, "heads": heads, "n_hashes": n_hashes}
    return compare(steps, "reformer_kernels", budget=budget, repeats=repeats, device=place, **about)


Loss = Callable[[nn.Module, Tensor], Tensor]


def _our_model(
    length: int, layers: int, width: int, heads: int, n_hashes: int, chunk: int
) -> tuple[nn.Module, Loss]:
    kind: LayerKind = "lsh"
    config = ReformerConfig(
        vocab_size=VOCABULARY,
        d_model=width,
        layers=(kind,) * layers,
        num_heads=heads,
        d_ff=4 * width,
        causal=True,
        lsh=LSHConfig.trax(n_hashes=n_hashes, chunk_length=chunk),
        max_length=length,
    )
    return ReformerLM(config), lambda model, tokens: model(tokens, labels=tokens)


def _huggingface_model(
    length: int, layers: int, width: int, heads: int, n_hashes: int, chunk: int
) -> tuple[nn.Module, Loss]:
    from transformers import ReformerConfig as TheirConfig
    from transformers import ReformerModelWithLMHead

    rows = max(d for d in range(1, int(length**0.5) + 1) if length % d == 0)
    with _quiet_transformers():
        model = ReformerModelWithLMHead(
            TheirConfig(
                vocab_size=VOCABULARY,
                attn_layers=["lsh"] * layers,
                hidden_size=width,
                num_attention_heads=heads,
                attention_head_size=width // heads,
                feed_forward_size=4 * width,
                hidden_act="gelu",
                num_hashes=n_hashes,
                lsh_attn_chunk_length=chunk,
                axial_pos_shape=(rows, length // rows),
                axial_pos_embds_dim=(width // 4, width - width // 4),
                max_position_embeddings=length,
                is_decoder=True,
                use_cache=False,
                hidden_dropout_prob=0.0,
                lsh_attention_probs_dropout_prob=0.0,
            )
        )

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        with _quiet_transformers():
            result: Tensor = model(tokens, labels=tokens).loss
        return result

    return model, loss


def _lucidrains_model(
    length: int, layers: int, width: int, heads: int, n_hashes: int, chunk: int
) -> tuple[nn.Module, Loss]:
    from reformer_pytorch import ReformerLM as Theirs

    model = Theirs(
        num_tokens=VOCABULARY,
        dim=width,
        depth=layers,
        max_seq_len=length,
        heads=heads,
        bucket_size=chunk,
        n_hashes=n_hashes,
        causal=True,
        axial_position_emb=True,
    )

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss


def _training_step(model: nn.Module, loss: Loss, tokens: Tensor, dtype: torch.dtype) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> Sequence[Tensor]:
        with _autocast(tokens.device, dtype):
            value = loss(model, tokens)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return [value]

    return step


def bench_multihead_attention(
    lengths: Sequence[int] = (128, 512, 1024, 2048, 4096),
    width: int = 512,
    heads: int = 8,
    *,
    budget: float = 10.0,
    repeats: int = 7,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """`nn.MultiheadAttention`, ours as it is by default, and ours when it always hashes, without weights
    returned: where the default threshold belongs, and what ours costs below it."""
    place = torch.device(device)
    rows: list[Row] = []
    for length in lengths:
        torch.manual_seed(0)
        plain = nn.MultiheadAttention(width, heads, batch_first=True, device=place)
        default = MultiheadAttention(width, heads, batch_first=True, device=place)
        hashing = MultiheadAttention(width, heads, batch_first=True, device=place, full_attention_threshold=0)
        x = torch.randn(1, length, width, device=place, requires_grad=True)
        modules = {"nn.MultiheadAttention": plain, "default": default, "LSH": hashing}
        steps = {}
        for name, module in modules.items():
            module.load_state_dict(plain.state_dict())
            steps[name] = _layer_step(functools.partial(_attend_to_itself, module), module, x, dtype)
        about = {"length": length, "width": width, "heads": heads}
        rows += compare(steps, "nn.MultiheadAttention", budget=budget, repeats=repeats, device=place, **about)
    return rows


def bench_encoder(
    length: int = 32768,
    layers: int = 6,
    width: int = 512,
    heads: int = 8,
    *,
    budget: float = 60.0,
    repeats: int = 3,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """`nn.TransformerEncoder`, before and after `replace_attention`, in training."""
    torch.manual_seed(0)
    place = torch.device(device)
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, device=place)
    before = nn.TransformerEncoder(layer, layers)
    after = copy.deepcopy(before)
    replace_attention(after)
    x = torch.randn(1, length, width, device=place, requires_grad=True)
    steps = {
        name: _layer_step(model, model, x, dtype)
        for name, model in (("nn.TransformerEncoder", before), ("replace_attention", after))
    }
    about = {"length": length, "layers": layers, "width": width, "heads": heads}
    return compare(steps, "nn.TransformerEncoder", budget=budget, repeats=repeats, device=place, **about)


def _attend_to_itself(module: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = module(x, x, x, need_weights=False)[0]
    return result


def _layer_step(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, dtype: torch.dtype) -> Step:
    grad = torch.randn_like(x)

    def step() -> Sequence[Tensor]:
        with _autocast(x.device, dtype):
            y = call(x)
        y.backward(grad.to(y.dtype))
        module.zero_grad(set_to_none=False)
        assert x.grad is not None
        found, x.grad = x.grad, None
        return [y, found]

    return step


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    if dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, dtype)
    return nullcontext()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the warnings about choosing the number of buckets, which it does as it always does."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
