"""The calls of the benchmarks of operations: hash, sort, attention, lsh and cross.

Each builder makes the call of one row, ours or a peer's; all rows of a table run on the same random tensors.
A builder raises PeerRefusesError where a peer cannot run such sizes.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from reformer_kernels import functional
from reformer_kernels.benchmarks.calls import SEED, Call, function_call
from reformer_kernels.benchmarks.peers import (
    FULL_ATTENTION,
    FullAttention,
    HuggingFace,
    Lucidrains,
    own_generator,
)
from reformer_kernels.benchmarks.sizes import (
    Sizes,
    attention_work,
    full_attention_work,
    hash_work,
    lsh_work,
    sort_work,
)

PRESETS = {"trax()": "trax", "paper()": "paper", "window=bucket": "bucket"}
"""Our rows of attention, and the preset of each."""


def random_heads(sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Normal (B, H, L, D), drawn on the CPU so that every device gets the same."""
    shape = (sizes.batch, sizes.heads, sizes.length, sizes.head_dim)
    return torch.randn(shape, generator=generator).to(sizes.device, sizes.torch_dtype)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, L, D) as a projection writes it, (B, L, H * D)."""
    return x.transpose(1, 2).flatten(2).contiguous()


def make_inputs(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Query-keys and values (B, H, L, D)."""
    generator = torch.Generator().manual_seed(SEED)
    return random_heads(sizes, generator), random_heads(sizes, generator)


def make_keys(sizes: Sizes) -> Tensor:
    """Keys (B, H, L, D) beside the queries and values of `make_inputs`."""
    return random_heads(sizes, torch.Generator().manual_seed(SEED + 1))


def build_lsh(name: str, sizes: Sizes) -> Call:
    """The whole call: hash, sort and attend."""
    qk, v = make_inputs(sizes)
    if name in PRESETS:
        config = sizes.config(PRESETS[name])

        def ours(qk: Tensor, v: Tensor) -> Tensor:
            return functional.lsh_attention(qk, v, config, seed=SEED, backend=sizes.backend)

        return function_call(name, sizes, ours, (qk, v), lsh_work(sizes, config))
    if name == "Hugging Face":
        hugging_face = HuggingFace(sizes)
        work = lsh_work(sizes, sizes.config("trax"))
        inputs = (merge_heads(qk), merge_heads(v))
        return function_call(name, sizes, lambda qk, v: hugging_face.attend(qk, v)[0], inputs, work)
    if name == "reformer_pytorch":
        lucidrains = Lucidrains(sizes)
        work = lsh_work(sizes, sizes.config("lucidrains"))
        inputs = (qk.flatten(0, 1), v.flatten(0, 1))
        return function_call(name, sizes, lambda qk, v: lucidrains.attend(qk, v)[0], inputs, work)
    return _build_full_attention(name, sizes, qk, v)


def build_cross(name: str, sizes: Sizes) -> Call:
    """Attention of queries over keys of their own, both hashed."""
    q, v = make_inputs(sizes)
    if name != "lsh_cross_attention":
        return _build_full_attention(name, sizes, q, v)
    config = sizes.config("paper")

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.lsh_cross_attention(q, k, v, config, seed=SEED, backend=sizes.backend)

    work = dataclasses.replace(attention_work(sizes, sizes.config("bucket")), forward_bytes=None)
    return function_call(name, sizes, ours, (q, make_keys(sizes), v), work)


def _build_full_attention(name: str, sizes: Sizes, q: Tensor, v: Tensor) -> Call:
    if name not in FULL_ATTENTION.values():
        raise KeyError(name)
    attend = FullAttention(name, sizes).attend
    return function_call(name, sizes, attend, (q, make_keys(sizes), v), full_attention_work(sizes))


def build_attention(name: str, sizes: Sizes) -> Call:
    """Attention alone, over a layout made beforehand."""
    qk, v = make_inputs(sizes)
    if name in PRESETS:
        config = sizes.config(PRESETS[name])
        layout = functional.lsh_layout(qk, config, seed=SEED, backend=sizes.backend)

        def ours(qk: Tensor, v: Tensor) -> Tensor:
            return functional.attend(qk, v, layout, config, backend=sizes.backend)

        return function_call(name, sizes, ours, (qk, v), attention_work(sizes, config))
    if name == "Hugging Face":
        hugging_face = HuggingFace(sizes)
        inputs = (merge_heads(qk), merge_heads(v))
        with torch.no_grad(), own_generator(SEED):
            buckets = hugging_face.attend(*inputs)[1]
        work = attention_work(sizes, sizes.config("trax"))
        return function_call(name, sizes, lambda qk, v: hugging_face.attend(qk, v, buckets)[0], inputs, work)
    return _build_full_attention(name, sizes, qk, v)


def build_hash(name: str, sizes: Sizes) -> Call:
    """Bucket ids of query-keys."""
    qk, _ = make_inputs(sizes)
    if name == "lsh_hash":
        rotations = _rotations(sizes)

        def ours(qk: Tensor) -> Tensor:
            return functional.lsh_hash(qk, rotations, sizes.factors, backend=sizes.backend)

        function, inputs = ours, qk
    elif name == "Hugging Face":
        function, inputs = HuggingFace(sizes).hash, merge_heads(qk)
    elif name == "reformer_pytorch":
        function, inputs = Lucidrains(sizes).hash, qk.flatten(0, 1)
    else:
        raise KeyError(name)
    return function_call(name, sizes, function, (inputs,), hash_work(sizes), differentiable=False)


def _rotations(sizes: Sizes) -> Tensor:
    """Rotations (H, D, R, sum of factors / 2)."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (sizes.heads, sizes.head_dim, sizes.n_hashes, sum(sizes.factors) // 2)
    return torch.randn(shape, generator=generator).to(sizes.device)


def build_sort(name: str, sizes: Sizes) -> Call:
    """The stable order of the bucket ids of query-keys."""
    qk, _ = make_inputs(sizes)
    buckets = functional.lsh_hash(qk, _rotations(sizes), sizes.factors, backend=sizes.backend)
    n_buckets = math.prod(sizes.factors)

    def ours(buckets: Tensor) -> Tensor:
        return functional.bucket_sort(buckets, n_buckets, backend=sizes.backend)

    def torch_sort(buckets: Tensor) -> Tensor:
        return torch.sort(buckets, dim=-1, stable=True).indices

    function = {"bucket_sort": ours, "torch.sort(stable)": torch_sort}[name]
    return function_call(name, sizes, function, (buckets,), sort_work(sizes), differentiable=False)
