"""Cached generation against the models' own calls, and against attention computed anew for every prefix."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from python_tests.helpers import assert_close, padding_mask
from reformer_kernels import LSHConfig, ReformerConfig, ReformerEncoderDecoder, ReformerLM
from reformer_kernels import functional as F
from reformer_kernels.models.generation import Decoder, beam_search, choose
from reformer_kernels.modules import LocalSelfAttention, LSHSelfAttention, caches
from reformer_kernels.testing import normal

BUCKET = LSHConfig(n_hashes=3, chunk_length=4, window="bucket")
SMALL = ReformerConfig(
    vocab_size=11,
    d_model=16,
    layers=("lsh", "local", "full", "lsh"),
    num_heads=2,
    d_ff=24,
    causal=True,
    lsh=BUCKET,
    local_chunk_length=5,
    max_length=128,
    init_std=0.4,
)


def lm(dtype: torch.dtype = torch.float64, **options: Any) -> ReformerLM:
    torch.manual_seed(0)
    return ReformerLM(dataclasses.replace(SMALL, **options)).to(dtype)


def tokens_of(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _often_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that merge every few tokens, so that short sequences go through every state."""
    monkeypatch.setattr(caches, "MERGE_EVERY", 7)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float32, {}),
        (torch.float64, {"positions": "rotary", "token_context": 3, "norm": "rms", "streams": "mean"}),
        (torch.float64, {"positions": "rotary", "rotary_hashing": "before", "residual": "plain"}),
        (torch.float64, {"lsh": dataclasses.replace(BUCKET, bucket_window=2, correct_duplicates=False)}),
        (torch.float64, {"lsh": LSHConfig.lucidrains(window="bucket", bucket_factors=(2, 4))}),
        (
            torch.float64,
            {"residual": "exact", "dropout": 0.3, "attention_dropout": 0.3},
        ),
    ],
)
def test_cached_logits_equal_the_model_s_own(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Every position of every row, prompts of several lengths with padding on either side."""
    model = lm(dtype, **options)
    model.train()  # generation is in evaluation mode whatever the model's, and leaves it as it was
    lengths, total = (1, 13, 30, 13), 70
    tokens = tokens_of(4, total)
    expected = model.eval()(tokens).detach()
    model.train()
    prompt, mask = tokens[:, :30].clone(), padding_mask(lengths, 30)
    prompt[mask] = 10
    for row in (1, 3):  # left padding there
        prompt[row], mask[row] = prompt[row].roll(17), mask[row].flip(0)
    decoder = Decoder(model, total)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}[dtype]
    if options.get("residual") == "exact":
        tolerance = 1e-5
    at = torch.tensor(lengths)
    rows = torch.arange(4)
    assert_close(decoder.prompt(prompt, mask), expected[rows, at - 1], tolerance)
    while int(at.max()) < total:
        logits = decoder.step(tokens[rows, at])
        assert_close(logits, expected[rows, at], tolerance)
        at += 1
    with pytest.raises(ValueError, match="the caches are full"):
        decoder.step(tokens[:, 0])
    assert model.training and model.reformer.layers.blocks[0].f.training


@pytest.mark.parametrize("rule", ["paper", "trax", "lucidrains", "across", "none", "wide"])
@pytest.mark.parametrize("lengths", [(1, 3), (9, 30), (4, 8)])
def test_chunk_windows_are_those_of_the_prefix(rule: str, lengths: tuple[int, int]) -> None:
    """Each new token attends as the last one of a sequence of the tokens so far, at the same buckets."""
    n_hashes, chunk = 3, 4
    options: dict[str, Any] = {"n_hashes": n_hashes, "chunk_length": chunk, "causal": True}
    config = {
        "paper": LSHConfig.paper(**options),
        "trax": LSHConfig.trax(**options),
        "lucidrains": LSHConfig.lucidrains(**options, bucket_factors=(4, 2)),
        "across": LSHConfig(**options, attend_across_buckets=True, chunks_after=1),
        "none": LSHConfig.trax(**options, chunks_before=0, key_norm="none"),
        "wide": LSHConfig.trax(**options, chunks_before=3, chunks_after=2, correct_duplicates=True),
    }[rule]
    layer = LSHSelfAttention(16, 2, config, seed=3).double().eval()
    total = 45
    x = normal(2, total, 16)
    rotations = F.sample_rotations(config, 2, 8, 3)
    factors = config.factors(total)
    frozen = dataclasses.replace(config, bucket_factors=factors)

    def anew(row: int, length: int) -> Tensor:
        """All outputs of the prefix, by the reference."""
        return layer_call(layer, x[row : row + 1, :length], frozen, rotations)[0]

    alone = []
    for row, length in enumerate(lengths):
        cache = layer.make_cache(total)
        out = layer.decode(x[row : row + 1, :length], cache)
        assert_close(out[0], anew(row, length))
        alone.append(cache)
    joined = type(alone[0]).joined(alone)
    at = torch.tensor(lengths)
    while int(at.max()) < total:
        out = layer.decode(x[torch.arange(2), at][:, None], joined)
        at += 1
        for row in range(2):
            assert_close(out[row, 0], anew(row, int(at[row]))[-1])


def layer_call(layer: LSHSelfAttention, x: Tensor, config: LSHConfig, rotations: Tensor) -> Tensor:
    before, layer.config = layer.config, config
    try:
        return layer(x, rotations=rotations)
    finally:
        layer.config = before


@pytest.mark.parametrize(
    ("before", "after", "ring"), [(1, 0, False), (0, 0, True), (2, 1, True), (3, 0, True)]
)
def test_local_windows_are_those_of_the_prefix(before: int, after: int, ring: bool) -> None:
    layer = LocalSelfAttention(
        16, 2, chunk_length=4, chunks_before=before, chunks_after=after, causal=True, ring=ring, scale=0.7
    ).double()
    x = normal(1, 40, 16)
    for start in (1, 4, 10):
        cache = layer.make_cache(40)
        assert_close(layer.decode(x[:, :start], cache), layer(x[:, :start]))
        for length in range(start + 1, 41):
            assert_close(layer.decode(x[:, length - 1 : length], cache)[:, 0], layer(x[:, :length])[:, -1])


def test_a_token_that_sees_only_itself_gets_its_own_value() -> None:
    """One bucket a token as far as hashing can tell them apart: opposite directions, never alike."""
    config = LSHConfig(n_hashes=1, chunk_length=4, window="bucket", causal=True, bucket_factors=2)
    layer = LSHSelfAttention(4, 1, config, head_dim=1).double()
    with torch.no_grad():
        layer.query_key.weight.copy_(torch.tensor([[1.0, 0, 0, 0]]))
    x = normal(1, 3, 4)
    x[0, :, 0] = torch.tensor([1.0, -1.0, 2.0])
    cache = layer.make_cache(3)
    out = [layer.decode(x[:, n : n + 1], cache)[0, 0] for n in range(3)]
    own = layer.output(layer.value(x))[0]
    assert_close(out[0], own[0])
    assert_close(out[1], own[1])
    assert_close(out[2], own[0])  # the only other one in its bucket


def test_rows_do_not_meet() -> None:
    """What a row gives depends on its own prompt alone, whatever the others' content and length."""
    for lsh in (BUCKET, LSHConfig.trax(chunk_length=4, n_hashes=2)):
        model = lm(lsh=lsh)
        prompt = tokens_of(1, 9)
        alone = model.generate(prompt, 20)[0]
        for other in (tokens_of(2, 9, seed=4), tokens_of(2, 9, seed=5)):
            together = torch.cat([other[:1], prompt, other[1:]])
            mask = padding_mask([9, 9, 2], 9)
            assert torch.equal(model.generate(together, 20, key_padding_mask=mask)[1], alone)
        padded = torch.nn.functional.pad(prompt, (40, 3), value=5)
        mask = torch.ones_like(padded, dtype=torch.bool)
        mask[:, 40:49] = False
        longer = torch.cat([padded, tokens_of(1, 52)])
        mask = torch.cat([mask, torch.zeros(1, 52, dtype=torch.bool)])
        assert torch.equal(model.generate(longer, 20, key_padding_mask=mask)[0], alone)


def test_greedy_is_the_argmax_of_the_model_and_draws_nothing() -> None:
    model, prompt = lm(), tokens_of(2, 5)
    state = torch.get_rng_state()
    found = torch.stack(model.generate(prompt, 30))
    assert torch.equal(torch.get_rng_state(), state)
    tokens = prompt
    for _ in range(30):
        tokens = torch.cat([tokens, model.eval()(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, tokens[:, 5:])
    one = torch.stack(model.generate(prompt, 30, n_hashes=1))
    assert not torch.equal(one, found)
    expected = model(torch.cat([prompt, one[:, :-1]], 1), n_hashes=1)[:, 4:].argmax(-1)
    assert torch.equal(one, expected)


def test_sampling_follows_the_chances() -> None:
    chances = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]])
    logits = chances.log().repeat_interleave(20000, 0)
    generator = torch.Generator().manual_seed(0)

    def shares(**options: Any) -> Tensor:
        drawn = choose(logits, generator=generator, **options).view(2, 20000)
        return torch.stack([row.bincount(minlength=4) for row in drawn]) / 20000

    def near(found: Tensor, expected: list[list[float]]) -> bool:
        return bool((found - torch.tensor(expected)).abs().max() < 0.02)

    assert near(shares(temperature=1.0), chances.tolist())
    hot = chances**0.5
    assert near(shares(temperature=2.0), (hot / hot.sum(-1, keepdim=True)).tolist())
    assert near(shares(temperature=1.0, top_k=1), [[1, 0, 0, 0], [0, 0, 0, 1]])
    assert near(shares(temperature=1.0, top_k=2)[:1], [[4 / 7, 3 / 7, 0, 0]])
    assert near(shares(temperature=1.0, top_p=0.65), [[4 / 7, 3 / 7, 0, 0], [0, 0, 0, 1]])
    assert near(shares(temperature=1.0, top_p=0.75)[:1], [[4 / 9, 3 / 9, 2 / 9, 0]])
    assert near(shares(temperature=1.0, top_k=3, top_p=0.4)[:1], [[1, 0, 0, 0]])
    assert torch.equal(choose(logits), logits.argmax(-1))
    model, prompt = lm(), tokens_of(2, 5)
    draws = [
        torch.stack(
            model.generate(prompt, 20, temperature=1.5, generator=torch.Generator().manual_seed(seed))
        )
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_stop_tokens_end_rows_and_streams_end_with_the_last_row() -> None:
    model, prompt = lm(), tokens_of(3, 6)
    whole = torch.stack(model.generate(prompt, 25))
    stop = int(whole[0, 4])
    firsts = [(row == stop).nonzero() for row in whole]
    ends = [int(found[0]) + 1 if found.numel() else 25 for found in firsts]
    stopped = model.generate(prompt, 25, stop_tokens=[stop])
    assert [row.numel() for row in stopped] == ends
    for row, end, free in zip(stopped, ends, whole, strict=True):
        assert torch.equal(row, free[:end])
    pieces = list(model.stream(prompt, 25, stop_tokens=[stop]))
    assert len(pieces) == max(ends)
    for n, piece in enumerate(pieces):
        for row in range(3):
            assert piece[row] == (whole[row, n] if n < ends[row] else -1)
    assert len(list(itertools.islice(model.stream(prompt, 100), 3))) == 3


def test_wide_beams_find_the_best_continuation() -> None:
    """As many beams as there are continuations: the search is exhaustive."""
    torch.manual_seed(1)
    options: dict[str, Any] = {"vocab_size": 3, "layers": ("lsh", "local"), "init_std": 0.6}
    model = ReformerLM(dataclasses.replace(SMALL, **options)).double().eval()
    prompts = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 0]])

    def log_chance(prompt: Tensor, new: tuple[int, ...]) -> float:
        tokens = torch.cat([prompt, torch.tensor(new)])[None]
        chances = model(tokens)[0].detach().log_softmax(-1)
        return sum(float(chances[prompt.numel() - 1 + n, token]) for n, token in enumerate(new))

    for stops, penalty in (((), 1.0), ((2,), 1.0), ((2,), 0.0), ((0, 2), 2.0)):
        found = model.generate(prompts, 3, beams=9, stop_tokens=stops, length_penalty=penalty)
        for prompt, row in zip(prompts, found, strict=True):
            whole = [
                new
                for length in range(1, 4)
                for new in itertools.product(range(3), repeat=length)
                if not set(new[:-1]) & set(stops) and (length == 3 or new[-1] in stops)
            ]
            best = max(whole, key=lambda new: log_chance(prompt, new) / len(new) ** penalty)
            assert tuple(row.tolist()) == best, (stops, penalty)
    narrow, greedy = model.generate(prompts, 12, beams=3), model.generate(prompts, 12)
    for prompt, a, b in zip(prompts, narrow, greedy, strict=True):
        assert log_chance(prompt, tuple(a.tolist())) >= log_chance(prompt, tuple(b.tolist())) - 1e-9


class Script:
    """Stands for a `Decoder` whose logits depend on the tokens so far alone."""

    def __init__(self, chances: dict[tuple[int, ...], list[float]]) -> None:
        self.chances = chances
        self.rows: list[tuple[int, ...]] = [()]

    def logits(self) -> Tensor:
        uniform = [1 / 3] * 3
        return torch.tensor([self.chances.get(row, uniform) for row in self.rows]).log()

    def select(self, rows: Tensor) -> None:
        self.rows = [self.rows[row] for row in rows.tolist()]

    def step(self, tokens: Tensor) -> Tensor:
        self.rows = [(*row, token) for row, token in zip(self.rows, tokens.tolist(), strict=True)]
        return self.logits()


def test_beams_run_on_while_they_can_become_better() -> None:
    """Two hypotheses end early, yet the one that still runs wins by its length."""
    chances = {(): [0.6, 0.1, 0.3], (0,): [0.79, 0.01, 0.2], (0, 0): [0.005, 0.005, 0.99]}
    for penalty, best in ((1.0, [0, 0, 2]), (0.0, [0, 0, 2]), (3.0, [0, 0, 2])):
        script: Any = Script(chances)
        (found,) = beam_search(script, script.logits(), 5, 2, penalty, {2})
        assert found.tolist() == best
    script = Script({**chances, (0,): [0.01, 0.01, 0.98]})
    assert beam_search(script, script.logits(), 5, 2, 1.0, {2})[0].tolist() == [0, 2]


def test_wrong_use_is_refused() -> None:
    model, prompt = lm(), tokens_of(2, 5)
    for options, message in [
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"temperature": -1.0}, "temperature must be a finite number"),
        ({"top_k": 3}, "give a temperature above 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0"),
        ({"beams": 2, "temperature": 1.0}, "temperature must be 0"),
        ({"beams": 0}, "beams must be"),
        ({"stop_tokens": [11]}, "each of stop_tokens must be"),
        ({"max_new_tokens": 128}, "positions for 132 tokens, prompt and new ones need 133"),
        ({"key_padding_mask": torch.ones(2, 5, dtype=torch.bool)}, "at least one token"),
        ({"key_padding_mask": torch.ones(2, 4, dtype=torch.bool)}, "key_padding_mask must be bool"),
        ({"tokens": prompt.float()}, "prompts must be an integer tensor"),
        ({"tokens": prompt[0]}, "prompts must be an integer tensor"),
    ]:
        call: dict[str, Any] = {"tokens": prompt, "max_new_tokens": 3, **options}
        with pytest.raises(ValueError, match=message):
            model.generate(**call)
    with pytest.raises(ValueError, match="needs a causal model"):
        lm(causal=False).generate(prompt, 3)


def test_generation_leaves_the_mode_alone_at_every_moment() -> None:
    """Other threads may train the model meanwhile, so no module's flag may change even for a moment."""
    model = lm(dropout=0.5, attention_dropout=0.5).train()
    expected = copy.deepcopy(model).eval().generate(tokens_of(2, 9), 5)
    parts = [model.reformer.embedding, *model.reformer.layers.blocks, model.head]
    seen = []

    def note(*_: object) -> None:
        seen.append([part.training for part in model.modules()])

    for part in parts:
        for module in part.modules():
            module.register_forward_pre_hook(note)
    model.head.eval()  # a mode of its own, as frozen parts have
    modes = [part.training for part in model.modules()]
    found = model.generate(tokens_of(2, 9), 5)
    assert all(map(torch.equal, found, expected))
    assert seen and all(moment == modes for moment in seen)


def test_encoding_the_source_leaves_the_mode_alone() -> None:
    config = dataclasses.replace(SMALL, dropout=0.5)
    model = ReformerEncoderDecoder(
        dataclasses.replace(config, causal=False, lsh=LSHConfig()),
        dataclasses.replace(config, cross_attention="full"),
    ).train()
    seen = []
    for module in model.encoder.modules():
        module.register_forward_pre_hook(lambda *_: seen.append(model.training and model.encoder.training))
    model.generate(tokens_of(2, 6), tokens_of(2, 3), 2)
    assert seen and all(seen)


def test_generation_beside_training_in_another_thread() -> None:
    """Both give what they give alone. Training draws random numbers; generation without sampling does not."""
    model = lm(dropout=0.5).train()
    tokens = tokens_of(2, 12)
    parameters = list(model.parameters())

    def step() -> list[Tensor]:
        torch.manual_seed(1)
        return list(torch.autograd.grad(model(tokens).square().sum(), parameters))

    gradients, expected = step(), model.generate(tokens, 3)
    errors: list[Exception] = []
    end = threading.Event()

    def keep_generating() -> None:
        try:
            while not end.is_set():
                assert all(map(torch.equal, model.generate(tokens, 3), expected))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=keep_generating)
    thread.start()
    try:
        for _ in range(20):
            for found, alone in zip(step(), gradients, strict=True):
                assert_close(found, alone)
    finally:
        end.set()
        thread.join(60)
    assert not errors, errors
