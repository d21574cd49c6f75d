"""Generation by a causal language model, token by token, at a cost per token that does not grow.

`Decoder` holds the caches; `stream` and `generate` choose tokens from its logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from reformer_kernels.config import check_integer
from reformer_kernels.models.config import ReformerConfig
from reformer_kernels.models.encoder import Reformer
from reformer_kernels.models.evaluation import evaluation_copy
from reformer_kernels.modules.caches import LayerCache

STOPPED = -1
"""What `stream` yields for a row that has stopped."""


class LanguageModel(Protocol):
    """What generation needs of a model; `ReformerLM` has it."""

    reformer: Reformer
    head: nn.Linear

    @property
    def config(self) -> ReformerConfig: ...


class Decoder:
    """The state of a model after some tokens of each row: call `prompt` once, then `step` for each token.

    The logits equal those of the model's own call on the same tokens if a token sees the same keys whatever
    follows it. That holds for local and full layers, and for LSH layers with window="bucket". With
    window="chunks" a new token attends to the prefix as it is sorted when the token comes.

    The computation is in evaluation mode; the model's own mode is left alone, so another thread may train it.

    Args:
        model: a causal `ReformerLM`, whose `config.seed` fixes the rotations.
        max_length: the largest length of a row, prompt included.
        n_hashes: hash rounds of the LSH layers; None takes the configuration's.
        bucket_length: the length that automatic bucket factors are for; None takes the configuration's.
        memory: (B, L_m, config.size_of_memory), for a model with full cross-attention.
        memory_padding_mask: (B, L_m) bool, True = padding.

    Raises:
        ValueError: the model is not causal, attends to a memory by LSH (its windows there depend on how long
            the decoded sequence becomes), lacks its memory, or has no positions for `max_length` tokens.
    """

    def __init__(
        self,
        model: LanguageModel,
        max_length: int,
        *,
        n_hashes: int | None = None,
        bucket_length: int | None = None,
        memory: Tensor | None = None,
        memory_padding_mask: Tensor | None = None,
    ) -> None:
        config = model.config
        if not config.causal:
            raise ValueError("generation needs a causal model; make it with ReformerConfig(causal=True)")
        if config.cross_attention == "lsh":
            raise ValueError(
                'generation needs cross_attention="full": LSH windows on a memory move with the '
                "target's length"
            )
        check_integer("max_length", max_length, 1, 2**31 - 1)
        table = getattr(model.reformer.embedding.positions, "max_length", None)
        if table is not None and max_length > table:
            raise ValueError(
                f"the model has positions for {table} tokens, prompt and new ones need {max_length}"
            )
        self.model = model
        self._reformer, self._head = evaluation_copy(model.reformer), evaluation_copy(model.head)
        self.max_length = max_length
        self.n_hashes = n_hashes
        self.bucket_length = config.buckets_for if bucket_length is None else bucket_length
        self.lengths = torch.empty(0, dtype=torch.int64)
        self._caches: list[LayerCache] = []
        self._memory: list[tuple[Tensor, ...]] = [()] * len(config.layers)  # keys, values and mask
        model.reformer.check_memory(memory, memory_padding_mask)
        if memory is not None:
            with torch.no_grad():
                self._memory = [block.f.cross.keys_of(memory) for block in self._blocks]
            if memory_padding_mask is not None:
                self._memory = [(*pair, memory_padding_mask) for pair in self._memory]
        self._before = torch.empty(0)  # the latest tokens, which the next one's embedding includes

    @torch.no_grad()
    def prompt(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """Take the prompt of each row and return the logits (B, V) of its next token.

        tokens is (B, L) int64; key_padding_mask is (B, L) bool, True = padding, on any side. Rows of equal
        length are computed together and without padding, so that no row depends on the others.
        """
        rows = prompt_rows(tokens, key_padding_mask)
        lengths = [row.numel() for row in rows]
        groups = {length: [n for n, own in enumerate(lengths) if own == length] for length in lengths}
        parts, caches, before = [], [], []
        back = self.model.config.token_context - 1
        if self._memory[0] and self._memory[0][0].shape[0] != len(rows):
            raise ValueError(f"the memory has {self._memory[0][0].shape[0]} rows, the prompts {len(rows)}")
        for length, members in groups.items():
            group = torch.stack([rows[n] for n in members])
            own = [
                block.f.make_cache(self.max_length, self.n_hashes, self.bucket_length)
                for block in self._blocks
            ]
            nothing = group.new_full((len(members), back), -1)
            memory = [tuple(part[members] for part in of_layer) for of_layer in self._memory]
            positions = torch.arange(length, device=group.device)
            parts.append(self._run(group, positions, own, nothing, memory))
            caches.append(own)
            before.append(torch.cat([nothing, group], dim=1)[:, length:])
        self._caches = [type(of_layer[0]).joined(of_layer) for of_layer in zip(*caches, strict=True)]
        order = torch.tensor([n for members in groups.values() for n in members], device=tokens.device)
        self._before = torch.cat(before)
        self.lengths = torch.tensor(lengths, device=tokens.device)[order]
        self._memory = [tuple(part[order] for part in of_layer) for of_layer in self._memory]
        back_again = order.argsort()
        self.select(back_again)
        return torch.cat(parts)[back_again]

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row, tokens (B,) int64, and return the logits (B, V) of the next one."""
        if tokens.shape != self.lengths.shape:
            raise ValueError(
                f"tokens must be one for each of {self.lengths.numel()} rows, got {tuple(tokens.shape)}"
            )
        if int(self.lengths.max()) >= self.max_length:
            raise ValueError(f"the caches are full: they were made for {self.max_length} tokens")
        with torch.inference_mode():
            token, positions = tokens[:, None], self.lengths[:, None]
            logits = self._run(token, positions, self._caches, self._before, self._memory)
            self._before = torch.cat([self._before, token], dim=1)[:, 1:]
            self.lengths = self.lengths + 1
        return logits.clone()  # an ordinary tensor, which the caller may change and differentiate through

    def select(self, rows: Tensor) -> None:
        """Continue with these rows, in this order; a row may be given several times. Copies the caches."""
        if torch.equal(rows, torch.arange(self.lengths.numel(), device=rows.device)):
            return
        for cache in self._caches:
            cache.select(rows)
        self._memory = [tuple(part[rows] for part in of_layer) for of_layer in self._memory]
        self.lengths, self._before = self.lengths[rows], self._before[rows]

    @property
    def _blocks(self) -> Any:
        return self._reformer.layers.blocks

    def _run(
        self,
        tokens: Tensor,
        positions: Tensor,
        caches: Sequence[LayerCache],
        before: Tensor,
        memory: Sequence[tuple[Tensor, ...]],
    ) -> Tensor:
        """The logits (B, V) after tokens (B, L) that follow what the caches hold, and which they take in."""
        reformer = self._reformer
        first = second = reformer.embedding(tokens, positions, before)
        for block, cache, of_layer in zip(self._blocks, caches, memory, strict=True):
            first = first + block.f.decode(block.norm_f(second), cache, positions, of_layer)
            second = second + block.g(block.norm_g(first))
        logits: Tensor = self._head(reformer.finish(first[:, -1], second[:, -1]))
        return logits


def stream(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    key_padding_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    generator: torch.Generator | None = None,
    **options: Any,
) -> Iterator[Tensor]:
    """Yield the next token of each row, (B,) int64, until `max_new_tokens` or until all rows have stopped.

    The arguments are those of `generate`, without beams. After its stop token a row yields -1. The call
    checks the arguments at once; the model runs only as far as the iterator is read.
    """
    check_integer("max_new_tokens", max_new_tokens, 1, 2**31 - 1)
    stops = _stop_tokens(stop_tokens, model.config.vocab_size)
    _check_sampling(temperature, top_k, top_p)
    longest = max(row.numel() for row in prompt_rows(tokens, key_padding_mask))
    decoder = Decoder(model, longest + max_new_tokens, **options)

    def run() -> Iterator[Tensor]:
        logits = decoder.prompt(tokens, key_padding_mask)
        stopped = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
        for count in range(1, max_new_tokens + 1):
            chosen = choose(logits, temperature, top_k, top_p, generator)
            yield chosen.masked_fill(stopped, STOPPED)
            stopped = stopped | torch.isin(chosen, stops.to(chosen.device))
            if count == max_new_tokens or bool(stopped.all()):
                return
            logits = decoder.step(chosen)

    return run()


def generate(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    key_padding_mask: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 1,
    length_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
    generator: torch.Generator | None = None,
    **options: Any,
) -> list[Tensor]:
    """Continue each row of `tokens`, in evaluation mode.

    Args:
        model: a causal `ReformerLM`.
        tokens: prompts (B, L) int64.
        max_new_tokens: the largest number of new tokens.
        key_padding_mask: (B, L) bool, True = padding, on any side, for prompts of different lengths.
        temperature: 0 takes the likeliest token; above 0, tokens are drawn by softmax(logits / temperature).
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the fewest tokens whose probabilities sum to this or more (after `top_k`).
        beams: above 1, beam search with so many hypotheses, ranked by log probability / tokens **
            length_penalty.
        length_penalty: see `beams`.
        stop_tokens: a row ends after any of these tokens.
        generator: the source of random draws; None is torch's global one.
        options: those of `Decoder`: n_hashes, bucket_length, memory, memory_padding_mask.

    Returns:
        for each row its new tokens (n,) int64, the stop token included.

    Raises:
        TypeError, ValueError: an argument out of range, or a model that is not causal.
    """
    check_integer("beams", beams, 1, 2**16)
    if beams == 1:
        pieces = list(
            stream(
                model,
                tokens,
                max_new_tokens,
                key_padding_mask=key_padding_mask,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stop_tokens=stop_tokens,
                generator=generator,
                **options,
            )
        )
        return [row[row != STOPPED] for row in torch.stack(pieces, dim=1)]
    if temperature != 0:
        raise ValueError(f"beam search draws no tokens: temperature must be 0, got {temperature}")
    _check_sampling(temperature, top_k, top_p)
    check_integer("max_new_tokens", max_new_tokens, 1, 2**31 - 1)
    stops = _stop_tokens(stop_tokens, model.config.vocab_size)
    longest = max(row.numel() for row in prompt_rows(tokens, key_padding_mask))
    decoder = Decoder(model, longest + max_new_tokens, **options)
    logits = decoder.prompt(tokens, key_padding_mask)
    return beam_search(decoder, logits, max_new_tokens, beams, length_penalty, set(stops.tolist()))


def choose(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose a token from each row of logits (B, V), as `generate` describes; (B,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.double() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if top_p is not None:
        probabilities, order = torch.softmax(logits, -1).sort(dim=-1, descending=True, stable=True)
        dropped = probabilities.cumsum(-1) - probabilities >= top_p  # the likelier ones are enough
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), float("-inf"))
    return torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]


def beam_search(
    decoder: Decoder, logits: Tensor, max_new_tokens: int, beams: int, length_penalty: float, stops: set[int]
) -> list[Tensor]:
    """The best hypothesis of each row, by log probability / tokens ** length_penalty.

    A row ends when no running hypothesis can become better than its `beams` best finished ones.
    """
    B, V = logits.shape
    running: list[list[tuple[float, list[int]]]] = [[(0.0, [])] for _ in range(B)]
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(B)]
    decoder.select(torch.arange(B, device=logits.device).repeat_interleave(beams))
    logits = logits.repeat_interleave(beams, dim=0)
    count = min(beams * (1 + len(stops)), beams * V)
    for length in range(1, max_new_tokens + 1):
        scores = torch.full((B, beams), float("-inf"), dtype=torch.float64, device=logits.device)
        for row, hypotheses in enumerate(running):
            for beam, (score, _) in enumerate(hypotheses):
                scores[row, beam] = score
        total = scores[..., None] + torch.log_softmax(logits.double(), -1).view(B, beams, V)
        best, index = total.flatten(1).topk(count)
        parents, chosen = list(range(B * beams)), [0] * (B * beams)
        for row in range(B):
            if not running[row]:
                continue
            new: list[tuple[float, list[int]]] = []
            for score, flat in zip(best[row].tolist(), index[row].tolist(), strict=True):
                parent, token = divmod(flat, V)
                if score == float("-inf") or len(new) == beams:
                    break
                hypothesis = (score, [*running[row][parent][1], token])
                if token in stops or length == max_new_tokens:
                    finished[row].append((score / length**length_penalty, hypothesis[1]))
                else:
                    parents[row * beams + len(new)] = row * beams + parent
                    chosen[row * beams + len(new)] = token
                    new.append(hypothesis)
            finished[row] = sorted(finished[row], key=lambda pair: -pair[0])[:beams]
            if new and len(finished[row]) == beams:
                longest = max_new_tokens if length_penalty > 0 else length + 1
                if new[0][0] / longest**length_penalty <= finished[row][-1][0]:
                    new = []
            running[row] = new
        if not any(running):
            break
        decoder.select(torch.tensor(parents, device=logits.device))
        logits = decoder.step(torch.tensor(chosen, device=logits.device))
    return [torch.tensor(hypotheses[0][1], device=logits.device) for hypotheses in finished]


def prompt_rows(tokens: Tensor, key_padding_mask: Tensor | None) -> list[Tensor]:
    """The tokens of each row without padding. Raises ValueError for a row that has none."""
    is_tensor = isinstance(tokens, Tensor)
    if not is_tensor or tokens.dtype not in (torch.int64, torch.int32) or tokens.dim() != 2:
        got = f"{tokens.dtype} {tuple(tokens.shape)}" if is_tensor else type(tokens).__name__
        raise ValueError(f"prompts must be an integer tensor (batch, length), got {got}")
    mask = key_padding_mask
    if mask is None:
        mask = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    if mask.shape != tokens.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"key_padding_mask must be bool {tuple(tokens.shape)}, True = padding, got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    rows = [row[~padding] for row, padding in zip(tokens, mask, strict=True)]
    if not rows or not all(row.numel() for row in rows):
        raise ValueError("each prompt must have at least one token; begin an empty one with a start token")
    return rows


def _stop_tokens(stop_tokens: Sequence[int], vocab_size: int) -> Tensor:
    for token in stop_tokens:
        check_integer("each of stop_tokens", token, 0, vocab_size - 1)
    return torch.tensor(list(stop_tokens), dtype=torch.int64)


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number >= 0, got {temperature}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p narrow what is drawn from: give a temperature above 0 with them")
    if top_k is not None:
        check_integer("top_k", top_k, 1, 2**31 - 1, or_else="None")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, or None, got {top_p}")
