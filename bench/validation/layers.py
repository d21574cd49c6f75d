"""Cross-attention, feed-forward, loss, decoding, modules and training steps: checked, and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn

from reformer_kernels import (
    ChunkedFeedForward,
    LSHConfig,
    LSHSelfAttention,
    ReformerLM,
    ReversibleSequence,
    functional,
)
from reformer_kernels.benchmarks.memory import peak_allocated
from reformer_kernels.models.config import ReformerConfig
from reformer_kernels.models.generation import Decoder
from reformer_kernels.testing import TOLERANCE, normal, relative_error
from validation.calls import BOTH, FORWARD, Call, differentiated
from validation.context import Context, Row, attempt, attempts
from validation.judging import F32, errors, exact, gradients, inputs, judged
from validation.timings import time_call

ROW_SHARE = 0.02
"""The share of rows that may differ where two back ends hash for themselves and near-ties fall either way."""


def cross(context: Context, *, causal: bool, dtype: torch.dtype, D: int) -> Row:
    """out, lse and the gradients of `lsh_cross_attention`, on the float64 reference's layouts."""
    B, H, L, L_k = context.pick((2, 4, 900, 1300), (1, 1, 33, 41))
    config = LSHConfig.paper(
        n_hashes=2, chunk_length=context.pick(64, 8), causal=causal, bucket_window=context.pick(64, 8)
    )
    leaves = inputs(context, dtype, (B, H, L, D), (B, H, L_k, D), (B, H, L_k, D))
    mask = (torch.rand(B, L_k, generator=torch.Generator().manual_seed(3)) < 0.2).to(context.device)
    with torch.no_grad():
        q, k, _ = (x.double() for x in leaves)
        layout = functional.lsh_cross_layout(q, k, config, seed=0, key_padding_mask=mask, backend="reference")

    def run(x: list[Tensor], backend: str) -> list[Tensor]:
        results = functional.lsh_cross_attention(
            *x, config, layout=layout, key_padding_mask=mask, backend=backend, return_lse=True
        )
        return [*results, *gradients(list(results), x)]

    ours, expected = run(leaves, context.backend), run(exact(leaves), "reference")
    return judged(errors(["out", "lse", "dq", "dk", "dv"], ours, expected), TOLERANCE[dtype])


def feed_forward(context: Context, *, dtype: torch.dtype, activation: str) -> Row:
    """`chunked_feed_forward` and its gradients, against float64."""
    rows, width, hidden = context.pick((3001, 256, 1024), (37, 8, 16))
    gates = 2 if "glu" in activation else 1
    shapes = ((rows, width), (gates * hidden, width), (gates * hidden,), (width, hidden), (width,))
    leaves = inputs(context, dtype, *shapes)
    with torch.no_grad():
        for weight in leaves[1::2]:
            weight.mul_(weight.shape[1] ** -0.5)

    def run(x: list[Tensor]) -> list[Tensor]:
        out = functional.chunked_feed_forward(*x, activation=activation, chunk_size=context.pick(1024, 16))
        return [out, *gradients([out], x)]

    names = ["out", "dx", "dw1", "db1", "dw2", "db2"]
    return judged(errors(names, run(leaves), run(exact(leaves))), TOLERANCE[dtype])


def loss(context: Context, *, dtype: torch.dtype) -> Row:
    """`linear_cross_entropy` and its gradients, against torch's own loss in float64."""
    rows, width, classes = context.pick((2500, 256, 8000), (37, 8, 20))
    leaves = inputs(context, dtype, (rows, width), (classes, width))
    with torch.no_grad():
        leaves[1].mul_(width**-0.5)
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    target[::5] = -100
    target = target.to(context.device)
    x, weight = exact(leaves)
    expected = torch_functional.cross_entropy(x @ weight.T, target)
    ours = functional.linear_cross_entropy(*leaves, target)
    pairs = zip(
        ["loss", "dx", "dweight"],
        [ours, *torch.autograd.grad(ours, leaves)],
        [expected, *torch.autograd.grad(expected, [x, weight])],
        strict=True,
    )
    return judged({name: relative_error(a, b) for name, a, b in pairs}, TOLERANCE[dtype])


def language_model(context: Context, length: int, layers: int, **fields: Any) -> ReformerLM:
    """A causal byte-level model of LSH layers on the device, with fixed weights."""
    torch.manual_seed(0)
    width, heads = context.pick((512, 8), (16, 1))
    config = ReformerConfig(
        vocab_size=256,
        d_model=width,
        num_heads=heads,
        layers=("lsh",) * layers,
        causal=True,
        lsh=LSHConfig.paper(n_hashes=context.pick(4, 1), chunk_length=context.pick(64, 8), window="bucket"),
        max_length=length,
        backend=context.backend,
        **fields,
    )
    return ReformerLM(config).to(context.device)


def tokens_of(context: Context, rows: int, length: int) -> Tensor:
    """Random bytes (rows, length)."""
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(0)).to(context.device)


def decoding(context: Context) -> Row:
    """Logits of decoding token by token equal those of one call of the model on the same tokens.

    See `judged_by_row`: the two hash in different kernels.
    """
    length, prompt = context.pick((512, 480), (20, 18))
    model = language_model(context, length, 2).eval()
    tokens = tokens_of(context, 2, length)
    with torch.no_grad():
        whole = model(tokens)
        decoder = Decoder(model, length)
        steps = [decoder.prompt(tokens[:, :prompt])]
        steps += [decoder.step(tokens[:, n]) for n in range(prompt, length)]
    ours = torch.stack([step.view(2, -1) for step in steps], 1)
    return judged_by_row(ours, whole[:, prompt - 1 :])


def module(context: Context) -> Row:
    """`LSHSelfAttention` on its default path, against the reference with the same weights and seed."""
    width, heads, L = context.pick((256, 4, 1500), (16, 1, 40))
    config = LSHConfig.paper(n_hashes=2, chunk_length=context.pick(64, 8), causal=True)
    layers = []
    for backend in (context.backend, "reference"):
        torch.manual_seed(0)
        layers.append(LSHSelfAttention(width, heads, config, backend=backend).to(context.device).eval())
    x = normal(2, L, width, dtype=F32).to(context.device)
    with torch.no_grad():
        ours, expected = (layer(x) for layer in layers)
    return judged_by_row(ours, expected)


def judged_by_row(ours: Tensor, expected: Tensor) -> Row:
    """A row of a check whose two sides hash for themselves: single rows may differ where projections nearly
    tie, at most `ROW_SHARE` of them."""
    far = (ours - expected).abs().amax(-1) > TOLERANCE[F32] * expected.abs().max()
    share = float(far.double().mean())
    return {"ok": share <= ROW_SHARE, "rows_that_differ": round(share, 5), "limit": ROW_SHARE}


# Default paths, which must not wait for the device


def default_calls(context: Context) -> dict[str, Call]:
    """Calls as users write them: no rotations, no seed, in training mode, with dropout."""
    B, H, L, D = context.pick((2, 8, 4096, 64), (1, 1, 40, 16))
    width, dtype = H * D, context.pick(torch.bfloat16, F32)
    config = LSHConfig.paper(n_hashes=context.pick(4, 1), chunk_length=context.pick(64, 8), causal=True)
    qk, v = (x.to(dtype).requires_grad_() for x in torch.randn(2, B, H, L, D, device=context.device))
    hidden = torch.randn(B, L, width, device=context.device, requires_grad=True)
    attention = LSHSelfAttention(width, H, config, dropout=0.1, backend=context.backend)
    feed_forward = ChunkedFeedForward(width, 4 * width, dropout=0.1)
    pairs = [(nn.Linear(width // 2, width // 2), nn.Linear(width // 2, width // 2)) for _ in range(2)]
    exactly, floating = (ReversibleSequence(pairs, residual=kind) for kind in ("exact", "float"))
    for layer in (attention, feed_forward, exactly, floating):
        layer.to(context.device).train()

    def train(layer: nn.Module) -> Call:
        def call() -> Tensor:
            autocast = nullcontext() if context.dry_run else torch.autocast("cuda", torch.bfloat16)
            with autocast:
                out: Tensor = layer(hidden)
            return torch.autograd.grad(out.float().sum(), hidden)[0]

        return call

    def function() -> tuple[Tensor, ...]:
        out = functional.lsh_attention(qk, v, config, dropout_p=0.1, backend=context.backend)
        return torch.autograd.grad(out.float().sum(), [qk, v])

    model = language_model(context, L, 1).eval()
    decoder, row = Decoder(model, L), tokens_of(context, 2, L)
    decoder.prompt(row[:, : L // 2])

    def decode() -> Tensor:
        with torch.no_grad():
            return decoder.step(row[:, 0])

    return {
        "lsh_attention": function,
        "LSHSelfAttention": train(attention),
        "ChunkedFeedForward": train(feed_forward),
        "ReversibleSequence exact": train(exactly),
        "ReversibleSequence float": train(floating),
        "one decoding step": decode,
    }


def default_path_steps(context: Context) -> Iterator[Row]:
    """No default call waits for the device."""
    calls: dict[str, Call] = {}

    def prepare() -> Row:
        calls.update(default_calls(context))
        return {"calls": len(calls)}

    def check(call: Call) -> Row:
        call()
        context.synchronize()
        if context.dry_run:
            return {"skipped": "torch reports synchronisation on CUDA devices only; the call itself ran"}
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {}

    yield attempt("default calls are prepared", prepare)
    yield from attempts([(f"no wait in {name}", partial(check, call)) for name, call in calls.items()])


# Times


def timed(context: Context, make: Callable[[], Call], **about: Any) -> Row:
    """The time of a call that no floor is known for."""
    row: Row = dict(about)
    for way, spread in time_call(context, make()).items():
        row[f"{way}_us"] = round(spread.median * 1e6, 2)
        row[f"{way}_n"] = spread.n
    return row


def layer_steps(context: Context) -> Iterator[Row]:
    """Times of cross-attention, feed-forward, loss, the default path of modules, and decoding."""
    H, L, L_k, D = context.pick((8, 16384, 4096, 64), (1, 24, 20, 16))
    dtype = context.pick(torch.bfloat16, F32)

    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, device=context.device).to(dtype).requires_grad_()

    def cross_call(phase: str) -> Call:
        config = LSHConfig.paper(n_hashes=context.pick(4, 1))
        config = LSHConfig.paper(n_hashes=config.n_hashes, bucket_window=context.pick(128, 8))
        leaves = [rows(1, H, L, D), rows(1, H, L_k, D), rows(1, H, L_k, D)]
        rotations = functional.sample_rotations(config, H, D, 0).to(context.device)
        return differentiated(
            lambda q, k, v: functional.lsh_cross_attention(
                q, k, v, config, rotations=rotations, backend=context.backend
            ),
            leaves,
            phase,
        )

    def feed_forward_call(phase: str) -> Call:
        width = H * D
        leaves = [rows(L, width), rows(4 * width, width), rows(width, 4 * width)]
        return differentiated(
            lambda x, w1, w2: functional.chunked_feed_forward(x, w1, None, w2, None), leaves, phase, like=0
        )

    def loss_call() -> Call:
        width, classes = H * D, context.pick(32000, 30)
        x, weight = rows(L, width), rows(classes, width)
        target = torch.randint(classes, (L,), device=context.device)

        def call() -> tuple[Tensor, ...]:
            return torch.autograd.grad(functional.linear_cross_entropy(x, weight, target), [x, weight])

        return call

    checks: list[tuple[str, Callable[[], Row]]] = []
    for phase in (FORWARD, BOTH):
        shape = f"L={L} D={D}"
        checks += [
            (
                f"lsh_cross_attention {phase} {shape} L_k={L_k}",
                partial(timed, context, partial(cross_call, phase)),
            ),
            (
                f"chunked_feed_forward {phase} rows={L}",
                partial(timed, context, partial(feed_forward_call, phase)),
            ),
        ]
    checks.append((f"linear_cross_entropy {BOTH} rows={L}", partial(timed, context, loss_call)))
    yield from attempts(checks)
    try:
        calls = default_calls(context)
    except RuntimeError as error:
        yield {"check": "default calls", "ok": False, "reason": str(error)[:600]}
        return
    for name, call in calls.items():
        yield attempt(f"{name}, default path", partial(_eager, context, call))


def _eager(context: Context, call: Call) -> Row:
    """Eager times alone: default calls draw seeds, which a graph would repeat."""
    spread = time_call(context, call, graph=False)["eager"]
    return {"eager_us": round(spread.median * 1e6, 2), "eager_n": spread.n}


def training_steps(context: Context) -> Iterator[Row]:
    """A whole training step of a language model at two depths: time, and peak memory, which hardly grows."""
    length = context.pick(16384, 12)
    peaks: dict[int, int] = {}

    def check(layers: int) -> Row:
        model = language_model(context, length, layers).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tokens = tokens_of(context, 1, length)

        def step() -> None:
            autocast = nullcontext() if context.dry_run else torch.autocast("cuda", torch.bfloat16)
            with autocast:
                value = model(tokens, labels=tokens)
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        step()
        peaks[layers] = peak_allocated(step, context.device)
        spread = time_call(context, step, graph=False, budget=1.0)["eager"]
        finite = all(bool(p.isfinite().all()) for p in model.parameters())
        return {
            "ok": finite,
            "eager_us": round(spread.median * 1e6, 2),
            "tokens_per_second": round(length / spread.median),
            "peak_bytes": peaks[layers],
        }

    depths = context.pick((6, 24), (1, 2))
    yield from attempts([(f"{layers} layers, L={length}", partial(check, layers)) for layers in depths])
    if len(peaks) == 2:
        growth = peaks[depths[1]] / max(1, peaks[depths[0]])
        ok = context.dry_run or growth <= 1.15
        yield {
            "check": "peak memory of the deeper model: at most 1.15 times",
            "ok": ok,
            "growth": round(growth, 3),
        }
