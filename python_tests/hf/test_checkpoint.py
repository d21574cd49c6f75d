"""Checkpoints of transformers' Reformers, written by live transformers models, in our models and back.

The oracle is the transformers model in float64, with the language model's missing bias added. Both sides take
the rotations that its `hash_seed` gives.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from python_tests.helpers import NATIVE, assert_close
from python_tests.hf.test_accelerate import (
    ANSWER,
    BARE,
    CLASSIFY,
    DTYPE,
    LEARNED,
    LM,
    MASKED,
    SAME,
    D,
    H,
    make,
    rotations_in_float32,
    tokens,
)
from reformer_kernels import LSHConfig, ReformerConfig, ReformerLM, hf
from reformer_kernels.models import Reformer, ReformerClassifier, ReformerQuestionAnswering
from reformer_kernels.testing import relative_error

assert rotations_in_float32  # a fixture that every test here uses

DECODER_BIAS = "lm_head.decoder.bias"  # a parameter of transformers from 5.24 on, before that an unknown name
HAS_DECODER_BIAS = DECODER_BIAS in make(LM, is_decoder=True).state_dict()

MASK = torch.stack([torch.arange(48) < 19, torch.arange(48) >= 29])  # True = padding, left and right
KINDS = {LM: ReformerLM, MASKED: ReformerLM, CLASSIFY: ReformerClassifier, ANSWER: ReformerQuestionAnswering}
KINDS |= {BARE: Reformer}


def peer_model(kind: str, **options: Any) -> Any:
    """A transformers model whose parameters are all random, biases and norms too."""
    model = make(kind, **options)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype))
    return model


def rotations_of(model: Any, n_hashes: int | None = None) -> list[Tensor]:
    """What `hash_seed` gives in every LSH layer of transformers, for each layer of ours."""
    config = model.config
    buckets = config.num_buckets if isinstance(config.num_buckets, list) else [config.num_buckets]
    torch.manual_seed(config.hash_seed)
    drawn = torch.randn((H, D, n_hashes or config.num_hashes, sum(buckets) // 2), dtype=torch.float32)
    return [drawn] * len(config.attn_layers)


def outputs(kind: str, result: Any, model: Any, padding: Tensor | None) -> Tensor:
    """One tensor of either side's results, zero at padding."""
    if isinstance(result, tuple):
        out = torch.stack(result, -1)
    elif isinstance(result, Tensor):
        out = result
    elif kind == ANSWER:
        out = torch.stack([result.start_logits, result.end_logits], -1)
    else:
        out = result[0]
        if kind in (LM, MASKED) and not HAS_DECODER_BIAS:
            out = out + model.lm_head.bias  # which transformers left out before 5.24
    return out if padding is None or kind == CLASSIFY else out.masked_fill(padding[..., None], 0)


def nothing_amiss(report: dict[str, Any]) -> bool:
    """Whether a report of loading names no key, beside the second bias where transformers has none."""
    left = {what: set(keys) for what, keys in report.items()}
    if not HAS_DECODER_BIAS:
        left["unexpected_keys"].discard(DECODER_BIAS)
    return not any(left.values())


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize(
    ("kind", "options", "length", "padding"),
    [
        (LM, {"is_decoder": True, "num_buckets": [2, 4]}, 48, None),
        (LM, {"is_decoder": True, "lsh_num_chunks_before": 2, "attn_layers": ["lsh"]}, 48, MASK),
        (MASKED, LEARNED | {"lsh_num_chunks_after": 1, "local_num_chunks_after": 1}, 48, MASK),
        (CLASSIFY, LEARNED | {"attn_layers": ["local", "lsh"], "num_labels": 3}, 48, MASK[[1, 1]]),
        (ANSWER, LEARNED | {"attn_layers": ["local"], "hidden_act": "gelu_new"}, 24, None),
        (BARE, LEARNED | {"num_buckets": [2, 2, 2], "hidden_act": "silu", "num_hashes": 1}, 48, MASK),
    ],
)
def test_models_equal_those_of_transformers(
    kind: str, options: dict[str, Any], length: int, padding: Tensor | None, backend: str, tmp_path: Path
) -> None:
    theirs = peer_model(kind, **options)
    theirs.save_pretrained(tmp_path)
    ours = hf.from_pretrained(tmp_path, dtype=DTYPE[backend], backend=backend)
    assert type(ours) is KINDS[kind] and not ours.training
    ids, results = tokens(2, length), []
    for model in (theirs, ours):
        model.train()
        call: dict[str, Any] = {"position_ids": torch.arange(length).expand(2, length)}
        if model is theirs:
            call["attention_mask"] = None if padding is None else (~padding).long()
        else:
            call |= {"key_padding_mask": padding, "rotations": rotations_of(theirs)}
        out = outputs(kind, model(ids, **call), theirs, padding)
        weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
        (out.double() * weights).sum().backward()
        results.append(out)
    assert results[0].abs().max() > 0.1
    assert_close(results[1].double(), results[0], SAME[backend])

    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    if HAS_DECODER_BIAS and kind in (LM, MASKED):  # ours has one bias, that of the decoder
        gradients["lm_head.bias"] = gradients[DECODER_BIAS]
    with torch.no_grad():
        for p in ours.parameters():
            assert p.grad is not None
            p.copy_(p.grad)
    found = hf.state_dict(ours)
    assert found.keys() - {DECODER_BIAS} == gradients.keys() - {DECODER_BIAS}
    for name, gradient in gradients.items():
        error = relative_error(found[name], gradient)
        assert error < SAME[backend], (name, error)


@pytest.mark.parametrize("kind", list(KINDS))
def test_there_and_back(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter, bit for bit, and the whole configuration, read and written without transformers."""
    options = {
        "num_labels": 3,
        "id2label": {0: "a", 1: "b", 2: "c"},
        "num_buckets": [4, 2],
        "eos_token_id": 7,
    }
    theirs = peer_model(kind, is_decoder=kind == LM, **options if kind != ANSWER else LEARNED).float()
    if HAS_DECODER_BIAS and kind in (LM, MASKED):
        with torch.no_grad():  # two biases that differ come back as this one
            theirs.lm_head.decoder.bias.copy_(theirs.lm_head.bias)
    theirs.save_pretrained(tmp_path / "theirs")
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
            patch.setitem(sys.modules, name, None)
        ours = hf.from_pretrained(tmp_path / "theirs")
        hf.save_pretrained(ours, tmp_path / "ours")
        hf.save_pretrained(ours, tmp_path / "ours")  # over itself
    before = type(theirs).from_pretrained(tmp_path / "theirs").config.to_dict()
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert nothing_amiss(report), report
    assert [p.name for p in sorted((tmp_path / "ours").iterdir())] == ["config.json", "model.safetensors"]
    after = again.config.to_dict()
    assert after.pop("_name_or_path") != before.pop("_name_or_path") and after == before
    for (name, p), q in zip(theirs.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q) and p.dtype == q.dtype, name


def test_our_own_models_go_to_transformers(tmp_path: Path) -> None:
    """A model made here; its logits there, with their bias from 5.24 on."""
    config = ReformerConfig(
        vocab_size=40,
        d_model=12,
        num_heads=H,
        head_dim=D,
        layers=("local", "lsh"),
        lsh=LSHConfig.trax(n_hashes=3, chunk_length=8, bucket_factors=(4, 4)),
        local_chunk_length=4,
        causal=True,
        max_length=100,
        init_std=0.5,
    )
    ours = ReformerLM(config).double().eval()
    hf.save_pretrained(ours, tmp_path)
    theirs, report = transformers.ReformerModelWithLMHead.from_pretrained(
        tmp_path, output_loading_info=True, hash_seed=2
    )
    assert nothing_amiss(report) and theirs.dtype == torch.float64
    ids = tokens(2, 91)  # which they pad
    rotations = rotations_of(theirs)
    bias = 0 if HAS_DECODER_BIAS else ours.head.bias
    assert_close(ours(ids, rotations=rotations) - bias, theirs(ids).logits, 1e-6)

    wrong = ReformerConfig(vocab_size=9, layers=("full",), positions="none", norm="rms", activation="glu")
    with pytest.raises(ValueError, match=r"lsh\.ring.*norm must be 'layer'.*layers.*positions.*activation"):
        hf.save_pretrained(ReformerLM(wrong), tmp_path / "none")
    with pytest.raises(TypeError, match="got Linear"):
        hf.save_pretrained(nn.Linear(2, 2), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    """A small causal language model and its folder."""
    model = peer_model(LM, is_decoder=True, attn_layers=["local", "lsh"]).float()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_every_form_of_file_is_read(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = saved
    expected = hf.from_pretrained(folder).state_dict()

    def check(path: Path, **options: Any) -> None:
        found = hf.from_pretrained(path, **options)
        for name, value in found.state_dict().items():
            assert torch.equal(value, expected[name].to(value.dtype)), name
            assert value.dtype == options.get("dtype", torch.float32)

    check(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    check(tmp_path / "shards")

    # As versions 3 and 4 of transformers wrote it: another name of the bias, constants, no architectures.
    old = dict(model.state_dict())
    del old["lm_head.bias"]
    old[DECODER_BIAS] = expected["head.bias"]
    for name in ("self_mask_value_float16", "mask_value_float32"):
        old[f"reformer.encoder.layers.1.attention.self_attention.{name}"] = torch.tensor(-1e4)
    values = json.loads((folder / "config.json").read_text())
    del values["architectures"]
    for path, parts in ((tmp_path / "old", 1), (tmp_path / "old shards", 2)):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(values))
        names = list(old)
        files = {f"pytorch_model-{n}.bin": names[n::parts] for n in range(parts)}
        if parts == 1:
            files = {"pytorch_model.bin": names}
        else:
            weight_map = {name: file for file, held in files.items() for name in held}
            (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for file, held in files.items():
            torch.save({name: old[name] for name in held}, path / file)
        check(path)


def test_damage_is_refused(saved: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = saved
    weights, config = (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_text()

    def refused(error: type[Exception], match: str, files: dict[str, Any], *, without: str = "") -> None:
        path = tmp_path / "damaged"
        shutil.copytree(folder, path)
        for name, content in files.items():
            if isinstance(content, bytes):
                (path / name).write_bytes(content)
            elif isinstance(content, str):
                (path / name).write_text(content)
            else:
                torch.save(content, path / name)
        if without:
            (path / without).unlink()
        try:
            with pytest.raises(error, match=match):
                hf.from_pretrained(path)
        finally:
            shutil.rmtree(path)

    bin_, index, safe = "pytorch_model.bin", "model.safetensors.index.json", "model.safetensors"
    for cut in (0, 5, 200, len(weights) - 1):
        refused(ValueError, "safetensors is damaged", {safe: weights[:cut]})
    refused(ValueError, "bin is damaged", {bin_: b"PK\3\4 nothing"}, without=safe)
    refused(ValueError, "more than tensors", {bin_: {"lm_head.bias": Unsafe()}}, without=safe)
    refused(ValueError, "must hold a state dict, got list", {bin_: [torch.zeros(2)]}, without=safe)
    refused(ValueError, "got int as 'epoch'", {bin_: {"epoch": 3}}, without=safe)
    refused(FileNotFoundError, "no parameters", {}, without=safe)
    refused(FileNotFoundError, "no config.json", {}, without="config.json")
    refused(ValueError, "no JSON", {"config.json": config[:-9]})
    refused(ValueError, "JSON object, got list", {"config.json": "[]"})
    refused(ValueError, "weight_map", {index: "{}"}, without=safe)
    for place, error, match in (
        ("../model.safetensors", ValueError, "outside its folder"),
        ("absent.safetensors", FileNotFoundError, "lists 'absent.safetensors'"),
        ("other.safetensors", ValueError, "disagree"),
    ):
        listed = json.dumps({"weight_map": {"lm_head.bias": place}})
        refused(error, match, {index: listed, "other.safetensors": weights}, without=safe)
    with pytest.raises(FileNotFoundError, match="snapshot_download"):
        hf.from_pretrained("google/reformer-enwik8")

    values = json.loads(config)
    for change, match in (
        ({"model_type": "bert"}, "model_type must be \"reformer\", got 'bert'"),
        ({"architectures": ["ReformerForTokenClassification"]}, "architectures must be one of"),
        ({"is_decoder": False}, "is_decoder must be True"),
        ({"hidden_act": "tanh"}, "hidden_act must be one of relu"),
        ({"attn_layers": ["lsh", "full"]}, "attn_layers"),
        ({"attn_layers": None}, "config.json: "),
        ({"num_buckets": 7}, "even"),
        ({"num_hashes": 0}, "n_hashes must be"),
        ({"hidden_dropout_prob": 1.5}, "dropout must be"),
        ({"axial_pos_embds_dim": [4, 9]}, "sum to d_model 12"),
        ({"vocab_size": 41}, r"wrong shape: reformer.embeddings.word_embeddings.weight is \(40, 12\)"),
        ({"vocab_size": 2**31 - 1}, "wrong shape: reformer.embeddings.word_embeddings.weight"),
        ({"attn_layers": ["lsh"] * 100_000}, "layers has 100000 entries, the file of tensors only"),
    ):
        refused(ValueError, match, {"config.json": json.dumps(values | change)})
    with pytest.raises(ValueError, match="backend must be one of"):
        hf.from_pretrained(folder, backend="fast")


class Unsafe:
    """Anything that is no tensor."""


def test_all_that_does_not_fit_is_listed(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    ours = hf.from_pretrained(folder)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    values: dict[str, Any] = dict(model.state_dict())
    first = "reformer.encoder.layers.0.attention.self_attention.query.weight"
    del values[first]
    values["pooler.weight"] = torch.zeros(1)
    values["reformer.encoder.layer_norm.bias"] = torch.zeros(3)
    values["lm_head.bias"] = torch.zeros(40, dtype=torch.int64)
    with pytest.raises(ValueError, match="does not fit this ReformerLM") as caught:
        hf.load_state_dict(ours, values)
    assert str(caught.value).splitlines()[1:] == [
        f"  missing: {first}",
        "  unknown: pooler.weight",
        "  wrong shape: reformer.encoder.layer_norm.bias is (3,), must be (24,)",
        "  wrong dtype: lm_head.bias is torch.int64, must be floating-point",
    ]
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    body = Reformer(ours.config)
    for second in (torch.ones(40), torch.zeros(40), model.lm_head.bias):
        hf.load_state_dict(ours, model.state_dict() | {DECODER_BIAS: second})
        assert torch.equal(ours.head.bias, second)
    head = {"lm_head.bias", "lm_head.decoder.weight", DECODER_BIAS}
    part = {name: value for name, value in model.state_dict().items() if name not in head}
    hf.load_state_dict(body, part)  # names with "reformer." in front
    assert torch.equal(body.norm.weight, ours.reformer.norm.weight)


# What is wrong in transformers and must not be here


@pytest.fixture
def both(saved: tuple[Any, Path]) -> tuple[Any, Any]:
    """transformers' language model and ours from its checkpoint."""
    model, folder = saved
    ours = hf.from_pretrained(folder)
    model.config.hash_seed = None
    for layer in model.reformer.encoder.layers:
        layer.attention.self_attention.hash_seed = None
    return model, ours


def test_the_bias_counts(both: tuple[Any, Any]) -> None:
    """transformers loads `lm_head.bias`, saves it and leaves it out of the logits."""
    theirs, ours = both
    ids = tokens(1, 48)
    found = []
    for model, bias in ((theirs, theirs.lm_head.bias), (ours, ours.head.bias)):
        before = model(ids)
        with torch.no_grad():
            bias += 5
        changed = model(ids)
        pair = [x if isinstance(x, Tensor) else x.logits for x in (before, changed)]
        found.append(float((pair[1] - pair[0]).mean()))
    assert abs(found[0]) < 1 and found[1] == pytest.approx(5, abs=1e-3)


def test_cached_rows_do_not_meet(both: tuple[Any, Any]) -> None:
    """transformers' cached LSH step gathers every row's keys from the first row's states."""
    theirs, ours = both
    one, other = tokens(1, 40), tokens(2, 40)[1:]
    third = other.flip(1)
    theirs.config.use_cache = True
    found = []
    for first in (one, third):
        torch.manual_seed(0)
        ids = torch.cat([first, other])
        cache = theirs(ids, use_cache=True).past_buckets_states
        torch.manual_seed(0)
        found.append(theirs(ids[:, -1:], past_buckets_states=cache, use_cache=True).logits[1])
    assert relative_error(found[0], found[1]) > 1e-2
    written = [ours.generate(torch.cat([first, other]), 6)[1] for first in (one, third)]
    assert torch.equal(*written)


def test_rotations_stay_while_decoding(both: tuple[Any, Any]) -> None:
    """Without a seed transformers draws new ones at each step, so that cached buckets mean nothing."""
    theirs, ours = both
    ids = tokens(1, 40)
    steps = []
    for _ in range(2):
        torch.manual_seed(0)
        cache = theirs(ids, use_cache=True).past_buckets_states
        torch.manual_seed(len(steps))  # the state of the generator decides the new token's buckets
        theirs(ids[:, :1], past_buckets_states=cache, use_cache=True)
        steps.append(cache.buckets_cache[1][..., -1])
    assert not torch.equal(*steps)
    written = []
    for seed in range(2):
        torch.manual_seed(seed)
        written.append(ours.generate(ids, 6)[0])
    assert torch.equal(*written)


def test_training_keeps_no_states_and_is_reproducible(both: tuple[Any, Any]) -> None:
    """transformers' training forward keeps every layer's states in a cache, and reseeds torch's generator."""
    theirs, ours = both
    ids = tokens(2, 48)
    theirs.train(), ours.train()
    assert len(theirs(ids).past_buckets_states.states_cache) == 2
    assert isinstance(ours(ids), Tensor)  # there is nothing else that could hold them
    for layer in [m for m in theirs.modules() if hasattr(m, "dropout")]:
        layer.dropout = 0.1
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append([theirs(ids, labels=ids).loss, torch.rand(1)])
    assert losses[0][1] != losses[1][1]
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append([ours(ids, labels=ids), torch.rand(1)])
    assert losses[0] == losses[1]


def test_hashes_of_one_call_and_explicit_positions(both: tuple[Any, Any]) -> None:
    """In transformers the one fails in training, the other at lengths that need padding."""
    theirs, ours = both
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        theirs.train()(tokens(1, 48), num_hashes=3).logits.sum().backward()
    ours.train()(tokens(1, 48), n_hashes=3).sum().backward()
    ids, positions = tokens(1, 43), torch.arange(43)[None]
    with pytest.raises(RuntimeError):
        theirs.eval()(ids, position_ids=positions)
    ours.eval()
    assert torch.equal(ours(ids, position_ids=positions), ours(ids))
