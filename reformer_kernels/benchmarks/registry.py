"""The benchmarks there are: one entry for each operation of `reformer-kernels bench`.

To add one, write a builder that makes the call of a row (see `kernels.py`) and an entry in `OPERATIONS`; the
command line, the harness, tables, files and plots follow from the entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from reformer_kernels.benchmarks import checks, decoding, huggingface, kernels, layers, models
from reformer_kernels.benchmarks.calls import Call
from reformer_kernels.benchmarks.checks import Agreement, Calls
from reformer_kernels.benchmarks.peers import FULL_ATTENTION
from reformer_kernels.benchmarks.sizes import Sizes

AXES = {
    "seq_lens": "length",
    "layers": "layers",
    "d_ff": "d_ff",
    "vocabulary": "vocabulary",
    "variants": "variant",
    "hashes": "n_hashes",
}
"""Options that take several values, each with the field of `Sizes` that it varies."""

SINGLE = {
    "batch": "batch",
    "heads": "heads",
    "head_dim": "head_dim",
    "width": "width",
    "chunk": "chunk_length",
    "causal": "causal",
    "backend": "backend",
}
"""Options that take one value, each with its field of `Sizes`."""


@dataclass(frozen=True)
class Operation:
    """A benchmark.

    Attributes:
        name: what follows `reformer-kernels bench`.
        help: what is timed; shown by --help.
        options: the options that it takes beside those that all take, with their defaults: keys of `AXES` (a
            string of comma-separated values), keys of `SINGLE`, "compare" and "max_seconds".
        build: makes the call of the row of this name; raises PeerRefusesError where a peer cannot run it.
        ours: names of our rows.
        baselines: names of the rows that ours are always compared with.
        peers: names of the rows that --compare chooses, by their key in `peers.PEERS`.
        variants: what --variants accepts.
        variant_title: what the variants are, in words.
        hash_free: names of rows that are the same for any number of hash rounds.
        check: compares results with the baselines' or peers', before anything is timed.
        memory: "resident" is what the system sees in a process of its own; "allocated" is what torch
            allocates, which counts tensors alone.
        package: key of the peer without which nothing can be timed.
        note: what a reader of the table should know about its rows.
    """

    name: str
    help: str
    options: Mapping[str, Any]
    build: Callable[[str, Sizes], Call]
    ours: tuple[str, ...]
    baselines: tuple[str, ...] = ()
    peers: Mapping[str, str] = field(default_factory=dict)
    variants: tuple[str, ...] = ()
    variant_title: str = ""
    hash_free: tuple[str, ...] = ()
    check: Callable[[Sizes, Calls], Iterable[Agreement]] = lambda sizes, calls: ()
    memory: Literal["resident", "allocated"] = "allocated"
    package: str | None = None
    note: str = ""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of `Sizes` that its rows report."""
        used = {**AXES, **SINGLE}
        return (*(used[option] for option in self.options if option in used), "dtype", "device")

    def is_ours(self, name: str) -> bool:
        return name in self.ours


_HEADS: dict[str, Any] = {"seq_lens": "1024,4096", "batch": 1, "heads": 8, "head_dim": 64}
_HASHING: dict[str, Any] = {"hashes": "4", "chunk": 64}
_ATTENTION: dict[str, Any] = {
    **_HEADS,
    **_HASHING,
    "causal": True,
    "backend": "auto",
    "compare": None,
    "max_seconds": 120.0,
}
_HASH: dict[str, Any] = {**_HEADS, **_HASHING, "backend": "auto"}
_FULL = tuple(FULL_ATTENTION.values())
_PRESETS = (
    "trax() attends as Hugging Face does; paper() adds the bucket mask and the duplicate correction; "
    "window=bucket replaces chunks by the nearest keys in the bucket."
)
_REFORMERS = {"hf": "Hugging Face", "lucidrains": "reformer_pytorch"}

_ENTRIES = (
    Operation(
        "lsh",
        "The whole of LSH attention: hash, sort and attend.",
        _ATTENTION,
        kernels.build_lsh,
        ours=tuple(kernels.PRESETS),
        peers={**FULL_ATTENTION, **_REFORMERS},
        hash_free=_FULL,
        check=checks.check_lsh,
        memory="resident",
        note=_PRESETS,
    ),
    Operation(
        "hash",
        "Bucket ids of query-keys.",
        {**_HASH, "compare": None},
        kernels.build_hash,
        ours=("lsh_hash",),
        peers=_REFORMERS,
        check=checks.check_hash,
        memory="resident",
    ),
    Operation(
        "sort",
        "The stable sort of bucket ids, beside torch.sort.",
        _HASH,
        kernels.build_sort,
        ours=("bucket_sort",),
        baselines=("torch.sort(stable)",),
        check=checks.check_sort,
        memory="resident",
    ),
    Operation(
        "attention",
        "Attention alone, over a layout made beforehand.",
        _ATTENTION,
        kernels.build_attention,
        ours=tuple(kernels.PRESETS),
        # reformer_pytorch has no call that takes buckets.
        peers={**FULL_ATTENTION, "hf": "Hugging Face"},
        hash_free=_FULL,
        check=checks.check_attention,
        memory="resident",
        note=_PRESETS,
    ),
    Operation(
        "cross",
        "LSH attention of separate queries and keys.",
        _ATTENTION,
        kernels.build_cross,
        ours=("lsh_cross_attention",),
        peers=FULL_ATTENTION,
        hash_free=_FULL,
        check=checks.check_cross,
        memory="resident",
    ),
    Operation(
        "reversible",
        "Blocks of LSH attention and feed-forward: reversible, plain, and with checkpointing.",
        {
            "seq_lens": "1024",
            "batch": 1,
            "heads": 4,
            "width": 256,
            "layers": "6",
            "d_ff": "1024",
            "variants": "attention",
            **_HASHING,
            "compare": None,
        },
        layers.build_reversible,
        ours=("reversible float", "reversible exact"),
        baselines=("plain", "checkpoint"),
        peers={"lucidrains": "reformer_pytorch"},
        variants=("attention", "feed-forward"),
        variant_title="with attention, or a feed-forward in its place",
        check=layers.check_drift,
    ),
    Operation(
        "ffn",
        "The chunked feed-forward layer, beside the plain one and checkpointing.",
        {"seq_lens": "16384", "batch": 1, "width": 512, "d_ff": "2048", "variants": "gelu,relu"},
        layers.build_feed_forward,
        ours=("chunked",),
        baselines=("plain", "checkpoint"),
        variants=tuple(layers.ACTIVATIONS),
        variant_title="activations",
        check=checks.check_same_outputs,
    ),
    Operation(
        "loss",
        "Projection to the vocabulary and cross-entropy, chunked and plain.",
        {"seq_lens": "8192", "batch": 1, "width": 512, "vocabulary": "32768", "variants": "mean,none"},
        layers.build_loss,
        ours=("chunked",),
        baselines=("plain",),
        variants=layers.REDUCTIONS,
        variant_title="reductions",
        check=checks.check_same_outputs,
    ),
    Operation(
        "model",
        "A training step of a byte-level language model of LSH layers.",
        {
            "seq_lens": "16384",
            "batch": 1,
            "heads": 4,
            "width": 256,
            "layers": "6",
            **_HASHING,
            "compare": None,
        },
        models.build_language_model,
        ours=("reformer_kernels",),
        peers=_REFORMERS,
    ),
    Operation(
        "generate",
        "One more token of a language model: a step of cached generation, beside the model's own call.",
        {
            "seq_lens": "1024,32768",
            "batch": 1,
            "heads": 4,
            "width": 256,
            "layers": "6",
            "variants": "chunks,bucket",
            **_HASHING,
        },
        decoding.build_step,
        ours=(decoding.CACHED,),
        baselines=(decoding.WHOLE,),
        variants=tuple(decoding.RULES),
        variant_title="windows of the LSH layers",
        check=decoding.check_step,
        note="Tokens a second are the batch divided by the time of a step.",
    ),
    Operation(
        "mha",
        "Multi-head attention that replaces nn.MultiheadAttention, by default and always hashing.",
        {"seq_lens": "128,512,1024,2048,4096", "batch": 1, "heads": 8, "width": 512, **_HASHING},
        models.build_multihead_attention,
        ours=("default", "LSH"),
        baselines=("nn.MultiheadAttention",),
        hash_free=("nn.MultiheadAttention",),
        check=models.check_multihead_attention,
    ),
    Operation(
        "encoder",
        "nn.TransformerEncoder before and after replace_attention.",
        {"seq_lens": "32768", "batch": 1, "heads": 8, "width": 512, "layers": "6", **_HASHING},
        models.build_encoder,
        ours=("replace_attention",),
        baselines=("nn.TransformerEncoder",),
        hash_free=("nn.TransformerEncoder",),
    ),
    Operation(
        "huggingface",
        "The attention layers of transformers' Reformer, before and after hf.accelerate.",
        {
            "seq_lens": "256,1024,4096,16384",
            "batch": 1,
            "heads": 12,
            "head_dim": 64,
            "width": 256,
            "variants": "local,lsh",
            **_HASHING,
        },
        huggingface.build_attention,
        ours=(huggingface.ACCELERATED,),
        baselines=(huggingface.ORIGINAL,),
        variants=("local", "lsh"),
        variant_title="kinds of layer",
        check=huggingface.check_attention,
        package="hf",
    ),
    Operation(
        "huggingface-model",
        "Whole language models of transformers, before and after hf.accelerate.",
        {"seq_lens": "4096", "batch": 1, "variants": "default,wide"},
        huggingface.build_model,
        ours=(huggingface.ACCELERATED,),
        baselines=(huggingface.ORIGINAL,),
        variants=tuple(huggingface.MODELS),
        variant_title="sizes of the model",
        package="hf",
    ),
    Operation(
        "transformers",
        "Other models of transformers, with full attention and with LSH attention by hf.register_attention.",
        {
            "seq_lens": "2048,8192",
            "batch": 1,
            "heads": 8,
            "width": 512,
            "layers": "2",
            "variants": "llama,bert",
            **_HASHING,
        },
        huggingface.build_other_model,
        ours=(huggingface.LSH,),
        baselines=(huggingface.FULL,),
        variants=huggingface.OTHER_MODELS,
        variant_title="architectures",
        hash_free=(huggingface.FULL,),
        memory="resident",
        package="hf",
    ),
)

OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _ENTRIES}
"""All benchmarks by name; the first is the default."""
