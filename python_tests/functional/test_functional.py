"""What the public functions accept, refuse and draw; numbers are the reference tests' business."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from python_tests.helpers import NATIVE, assert_close, gradients, padding_mask, qkv
from reformer_kernels import Layout, LSHConfig, _backend, _native
from reformer_kernels import functional as F
from reformer_kernels.config import MAX_SCALE
from reformer_kernels.testing import normal

CONFIG = LSHConfig.paper(chunk_length=4, n_hashes=2, bucket_factors=(4, 2))
B, H, L, D = 2, 3, 20, 6


def inputs(**changes: Any) -> dict[str, Any]:
    """Arguments of a correct `lsh_attention` call, with `changes`."""
    qk, _, v = qkv(B, H, L, D, 5, dtype=torch.float32)
    return {"qk": qk, "v": v, "config": CONFIG, "seed": 0, "backend": "reference"} | changes


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


LAYOUT = Layout(
    torch.arange(L, dtype=torch.int32).expand(B, H, 2, L),
    torch.tensor([0, L], dtype=torch.int32).expand(B, H, 2, 2),
)

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "not a tensor": ({"qk": [[1.0]]}, TypeError, "qk must be a torch.Tensor, got list"),
    "integers": (
        {"v": zeros(B, H, L, D, dtype=torch.int64)},
        TypeError,
        "v must be one of float32.*got torch.int64",
    ),
    "complex": ({"qk": zeros(B, H, L, D, dtype=torch.complex64)}, TypeError, "qk must be one of float32"),
    "sparse": ({"qk": zeros(B, H, L, D).to_sparse()}, TypeError, "qk must be a dense tensor"),
    "rank": (
        {"qk": zeros(B, L, D)},
        ValueError,
        r"qk must be \(batch, heads, length, head_dim\), got shape \(2, 20, 6\)",
    ),
    "no heads": (
        {"qk": zeros(B, 0, L, D), "v": zeros(B, 0, L, D)},
        ValueError,
        "at least one head and one token",
    ),
    "no tokens": (
        {"qk": zeros(B, H, 0, D), "v": zeros(B, H, 0, D)},
        ValueError,
        "at least one head and one token",
    ),
    "no columns": (
        {"qk": zeros(B, H, L, 0)},
        ValueError,
        r"qk must have a head dimension of 1\.\.256, got 0",
    ),
    "wide": ({"v": zeros(B, H, L, 257)}, ValueError, r"v must have a head dimension of 1\.\.256, got 257"),
    "lengths": (
        {"v": zeros(B, H, L + 1, D)},
        ValueError,
        "qk and v must have the same batch, heads and length",
    ),
    "heads": ({"v": zeros(B, 1, L, D)}, ValueError, "qk and v must have the same batch, heads and length"),
    "dtypes": ({"v": zeros(B, H, L, D, dtype=torch.float16)}, TypeError, "qk and v must have one dtype"),
    "devices": (
        {"v": zeros(B, H, L, D, device="meta")},
        ValueError,
        "qk and v must be on one device, got cpu and meta",
    ),
    "config": ({"config": {"n_hashes": 2}}, TypeError, "config must be an LSHConfig.*got dict"),
    "mask dtype": (
        {"key_padding_mask": zeros(B, L, dtype=torch.long)},
        TypeError,
        "key_padding_mask must be bool, True = padding, or a float bias",
    ),
    "mask shape": (
        {"key_padding_mask": zeros(L, B, dtype=torch.bool)},
        ValueError,
        r"key_padding_mask must be \(batch, length\) = \(2, 20\), got shape \(20, 2\)",
    ),
    "mask kind": ({"key_padding_mask": "none"}, TypeError, "key_padding_mask must be a torch.Tensor"),
    "mask device": (
        {"key_padding_mask": zeros(B, L, dtype=torch.bool, device="meta")},
        ValueError,
        "must be on cpu",
    ),
    "rotation dtype": ({"rotations": zeros(H, D, 2, 3).half()}, TypeError, "rotations must be float32"),
    "double rotations": ({"rotations": zeros(H, D, 2, 3).double()}, TypeError, "rotations must be float32"),
    "rotation rounds": (
        {"rotations": zeros(H, D, 3, 3)},
        ValueError,
        r"\(3 or 1, 6, 2, 3\), got shape \(3, 6, 3, 3\); draw them with sample_rotations",
    ),
    "rotation heads": ({"rotations": zeros(2, D, 2, 3)}, ValueError, "rotations must be"),
    "rotation columns": ({"rotations": zeros(H, D, 2, 2)}, ValueError, "rotations must be"),
    "rotation rank": ({"rotations": zeros(D, 2, 3)}, ValueError, "rotations must be"),
    "both": (
        {"rotations": zeros(H, D, 2, 3), "layout": LAYOUT},
        ValueError,
        "rotations or a layout, got both",
    ),
    "layout kind": ({"layout": (1, 2)}, TypeError, "layout must be a Layout.*got tuple"),
    "layout dtype": (
        {"layout": dataclasses.replace(LAYOUT, order=LAYOUT.order.long())},
        TypeError,
        r"layout.order must be int32, got torch.int64",
    ),
    "layout rounds": (
        {"layout": dataclasses.replace(LAYOUT, order=LAYOUT.order[:, :, :1])},
        ValueError,
        r"layout.order must be \(batch, heads, rounds, length\) = \(2, 3, 2, 20\), got shape \(2, 3, 1, 20\)",
    ),
    "layout starts": (
        {"layout": dataclasses.replace(LAYOUT, bucket_starts=LAYOUT.bucket_starts[..., :1])},
        ValueError,
        "layout.bucket_starts must be",
    ),
    "layout device": (
        {"layout": dataclasses.replace(LAYOUT, bucket_starts=LAYOUT.bucket_starts.to("meta"))},
        ValueError,
        "layout.bucket_starts must be on cpu",
    ),
    "dropout 1": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be a number in \[0, 1\), got 1.0"),
    "dropout -": ({"dropout_p": -0.1}, ValueError, "dropout_p"),
    "dropout nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p"),
    "dropout kind": ({"dropout_p": True}, ValueError, "dropout_p"),
    "seed kind": (
        {"seed": 1.5},
        TypeError,
        "seed must be an int, an int64 tensor of one element, or None, got 1.5",
    ),
    "seed bool": ({"seed": True}, TypeError, "seed must be an int"),
    "seed dtype": (
        {"seed": torch.tensor(1, dtype=torch.int32)},
        TypeError,
        "seed must be an int or an int64 tensor",
    ),
    "seed size": ({"seed": torch.tensor([1, 2])}, TypeError, "seed must be an int or an int64 tensor of one"),
    "seed range": ({"seed": 2**64}, ValueError, "seed must fit 64 bits"),
    "return_lse": ({"return_lse": 1}, ValueError, "return_lse must be True or False, got 1"),
    "backend name": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of 'auto', 'reference', 'native', 'triton'",
    ),
    "backend None": ({"backend": None}, ValueError, "backend must be one of"),
    "triton": ({"backend": "triton"}, RuntimeError, "backend='triton' runs on CUDA and ROCm devices"),
    "native double": (
        {"qk": zeros(B, H, L, D).double(), "v": zeros(B, H, L, D).double(), "backend": "native"},
        RuntimeError,
        "backend='native' takes float32, bfloat16, float16, got torch.float64",
    ),
    "native device": (
        {"qk": zeros(B, H, L, D, device="meta"), "v": zeros(B, H, L, D, device="meta"), "backend": "native"},
        RuntimeError,
        "backend='native' runs on the CPU, got tensors on meta",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_of_lsh_attention(case: str) -> None:
    changes, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        F.lsh_attention(**inputs(**changes))


def test_the_unchanged_call_is_right() -> None:
    out, lse = F.lsh_attention(**inputs(return_lse=True))
    assert out.shape == (B, H, L, 5) and lse.shape == (B, H, L)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x: F.lsh_layout(x[0], CONFIG), ValueError, "qk must be"),
        (lambda x: F.lsh_layout(x, CONFIG, rotations=zeros(1, D, 1, 3)), ValueError, "rotations must be"),
        (lambda x: F.lsh_hash(x, zeros(1, D, 2, 3), (3,)), ValueError, r"even positive integers, got \(3,\)"),
        (lambda x: F.lsh_hash(x, zeros(1, D, 2, 3), None), ValueError, "even positive integers, got None"),  # type: ignore[arg-type]
        (
            lambda x: F.lsh_hash(x, zeros(1, D, 2, 3), 8),
            ValueError,
            r"= \(3 or 1, 6, R, 4\), got shape \(1, 6, 2, 3\)",
        ),
        (lambda x: F.lsh_hash(x, zeros(1, D, 0, 4), 8), ValueError, "rotations must be"),
        (lambda x: F.bucket_sort(x, 4), TypeError, "buckets must be int32 or int64, got torch.float32"),
        (
            lambda x: F.bucket_sort(torch.tensor(1), 4),
            ValueError,
            r"buckets must be \(\.\.\., L\) with L >= 1",
        ),
        (
            lambda x: F.bucket_sort(zeros(2, 0, dtype=torch.int32), 4),
            ValueError,
            r"with L >= 1, got shape \(2, 0\)",
        ),
        (
            lambda x: F.bucket_sort(zeros(2, 3, dtype=torch.int32), 0),
            ValueError,
            "n_buckets must be an integer in",
        ),
        (lambda x: F.attend(x, x, LAYOUT, CONFIG, k=x[..., :2]), ValueError, "q and k must have one shape"),
        (lambda x: F.attend(x, x, LAYOUT, CONFIG, k=x.double()), TypeError, "q and k must have one dtype"),
        (lambda x: F.attend(x, x, LAYOUT, 3), TypeError, "config must be an LSHConfig"),  # type: ignore[call-overload]
        (lambda x: F.local_attention(x, None, x), TypeError, "k must be a torch.Tensor, got NoneType"),  # type: ignore[call-overload]
        (
            lambda x: F.local_attention(x, x, x, chunk_length=0),
            ValueError,
            "chunk_length must be an integer in 1",
        ),
        (lambda x: F.local_attention(x, x, x, ring=1), ValueError, "ring must be True or False, got 1"),  # type: ignore[call-overload]
        (lambda x: F.local_attention(x, x, x, scale=-1), ValueError, "scale must be a finite number"),
        (lambda x: F.local_attention(x, x, x, scale=1e39), ValueError, r"at most 2\*\*127"),
        (lambda x: F.sample_rotations(CONFIG, 0, 4, 0), ValueError, "num_heads must be an integer in 1"),
        (
            lambda x: F.sample_rotations(CONFIG, 2, 300, 0),
            ValueError,
            r"head_dim must be an integer in 1\.\.256",
        ),
        (lambda x: F.sample_rotations(CONFIG, 2, 4, "x"), TypeError, "seed must be an int"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_of_the_others(
    call: Callable[[Tensor], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call(normal(B, H, L, D, dtype=torch.float32))


def test_an_extension_that_is_not_built_is_an_error_not_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "unavailable_reason", lambda: "it cannot be imported (No module '_C')")
    for backend in ("auto", "native"):
        with pytest.raises(RuntimeError, match=r"cannot be used: it cannot be imported \(No module '_C'\)"):
            F.lsh_attention(**inputs(backend=backend))
    assert F.lsh_attention(**inputs(qk=normal(B, H, L, D), v=normal(B, H, L, D), backend="auto")).shape == (
        B,
        H,
        L,
        D,
    )


@pytest.mark.parametrize(
    ("device", "dtype", "name"), [("cpu", torch.float64, "reference"), ("meta", torch.float32, "reference")]
)
def test_auto(device: str, dtype: torch.dtype, name: str) -> None:
    assert _backend.resolve_backend("auto", torch.device(device), dtype) == name


# Rotations and seeds


def test_rotations_depend_on_the_seed_alone() -> None:
    first = F.sample_rotations(CONFIG, H, D, 7)
    assert first.shape == (H, D, 2, 3) and first.dtype == torch.float32
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, F.sample_rotations(CONFIG, H, D, torch.tensor([7])))
    assert torch.equal(state, torch.get_rng_state()), "an explicit seed must leave torch's generator alone"
    assert not torch.equal(first, F.sample_rotations(CONFIG, H, D, 8))
    assert F.sample_rotations(CONFIG, H, D, 7, shared_heads=True).shape == (1, D, 2, 3)
    assert F.sample_rotations(LSHConfig(n_hashes=2), H, D, 7).shape == (H, D, 2, 128)
    many = F.sample_rotations(LSHConfig(n_hashes=8), 8, 64, 0)
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01


@pytest.mark.parametrize("seed", [0, -1, 2**63, 2**64 - 1, -(2**63)])
def test_seeds_of_64_bits(seed: int) -> None:
    wrapped = seed if seed < 2**63 else seed - 2**64
    assert torch.equal(
        F.sample_rotations(CONFIG, 1, 2, seed), F.sample_rotations(CONFIG, 1, 2, torch.tensor(wrapped))
    )


def test_without_a_seed_torch_manual_seed_reproduces() -> None:
    def run() -> Tensor:
        return F.lsh_attention(**inputs(seed=None, dropout_p=0.3))

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert torch.equal(first, run())
    assert not torch.equal(first, second)


def test_nothing_is_drawn_where_nothing_is_random() -> None:
    state = torch.get_rng_state()
    F.lsh_attention(**inputs(seed=None, rotations=zeros(1, D, 2, 3)))
    F.lsh_attention(**inputs(seed=None, layout=LAYOUT))
    F.lsh_attention(**inputs(seed=None, config=LSHConfig(chunk_length=L)))
    assert torch.equal(state, torch.get_rng_state())


# The two halves


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        LSHConfig.trax(chunk_length=4),
        LSHConfig(window="bucket", chunk_length=4),
        LSHConfig(chunk_length=L),
    ],
)
def test_lsh_attention_is_layout_then_attend(config: LSHConfig) -> None:
    mask = padding_mask([13, L], L)
    whole = F.lsh_attention(**inputs(config=config, dropout_p=0.2, key_padding_mask=mask, return_lse=True))
    qk, v = inputs()["qk"], inputs()["v"]
    layout = F.lsh_layout(qk, config, seed=0, key_padding_mask=mask, backend="reference")
    options: dict[str, Any] = {"key_padding_mask": mask, "dropout_p": 0.2, "seed": 0, "backend": "reference"}
    for a, e in zip(whole, F.attend(qk, v, layout, config, return_lse=True, **options), strict=True):
        assert torch.equal(a, e)
    again = F.lsh_attention(**inputs(config=config, layout=layout, dropout_p=0.2, key_padding_mask=mask))
    assert torch.equal(again, whole[0])


def test_layout_is_the_sorted_hash() -> None:
    qk, mask = inputs()["qk"], padding_mask([13, L], L)
    rotations = F.sample_rotations(CONFIG, H, D, 0)
    layout = F.lsh_layout(qk, CONFIG, rotations=rotations, key_padding_mask=mask, backend="reference")
    buckets = F.lsh_hash(qk, rotations, (4, 2), mask, backend="reference")
    assert buckets.max() == 8
    assert torch.equal(layout.order, F.bucket_sort(buckets, 9, backend="reference"))
    assert layout.bucket_starts.shape == (B, H, 2, 10) and (layout.rounds, layout.length) == (2, L)
    assert (layout.bucket_starts[0, ..., 8] == 13).all() and (layout.bucket_starts[1, ..., 8] == L).all()
    assert not layout.order.requires_grad


@pytest.mark.parametrize(("window", "size", "n"), [("chunks", 12, 10), ("bucket", 4, 2)])
def test_automatic_buckets(window: Any, size: int, n: int) -> None:
    """Two buckets for each span of tokens; starts as long as the most that L allows, plus padding's."""
    config = LSHConfig(chunk_length=4, n_hashes=2, window=window)
    layout = F.lsh_layout(inputs()["qk"], config, seed=0, backend="reference")
    assert layout.bucket_starts.shape[-1] == size
    rotations = F.sample_rotations(config, H, D, 0)
    buckets = F.lsh_hash(inputs()["qk"], rotations, n, backend="reference")
    assert torch.equal(layout.order, F.bucket_sort(buckets, n, backend="reference"))


def test_automatic_buckets_round_down() -> None:
    qk = normal(1, 1, 300, 4, dtype=torch.float32)
    config = LSHConfig(chunk_length=2, n_hashes=1)
    layout = F.lsh_layout(qk, config, seed=0, backend="reference")
    buckets = F.lsh_hash(qk, F.sample_rotations(config, 1, 4, 0), (16, 16), backend="reference")
    assert torch.equal(layout.order, F.bucket_sort(buckets, 256, backend="reference"))
    assert layout.bucket_starts.shape[-1] == 302 and bool((layout.bucket_starts[..., 256:] == 300).all())


def test_one_chunk_is_in_order_of_position() -> None:
    layout = F.lsh_layout(inputs()["qk"], LSHConfig(chunk_length=L), backend="reference")
    assert torch.equal(layout.order, torch.arange(L, dtype=torch.int32).expand(B, H, 1, L))
    assert layout.bucket_starts.tolist() == [[[[0, L]]] * H] * B
    assert layout.order.dtype == layout.bucket_starts.dtype == torch.int32


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 1, 2, 7), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bucket_sort_takes_any_leading_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    buckets = torch.randint(0, 3, shape, dtype=dtype)
    order = F.bucket_sort(buckets, 3, backend="reference")
    assert order.shape == shape and order.dtype == torch.int32
    assert torch.equal(order.long(), buckets.argsort(dim=-1, stable=True))


def test_bucket_sort_clamps_before_it_narrows() -> None:
    buckets = torch.tensor([2**40, 1, -(2**40), 0])
    assert F.bucket_sort(buckets, 3, backend="reference").tolist() == [2, 3, 1, 0]


# How tensors arrive


def test_strided_views() -> None:
    fused = normal(B, L, 3 * H * D, seed=4)
    q, k, v = (x.view(B, L, H, D).transpose(1, 2) for x in fused.chunk(3, dim=-1))
    mask = padding_mask([13, L], L).t().contiguous().t()
    dense = [x.contiguous() for x in (q, k, v)]
    for views in (
        [q, k, v],
        [x.mT.contiguous().mT for x in dense],
        [x.repeat_interleave(2, 2)[:, :, ::2] for x in dense],
    ):
        a = F.lsh_attention(views[0], views[2], CONFIG, seed=0, key_padding_mask=mask)
        assert_close(a, F.lsh_attention(dense[0], dense[2], CONFIG, seed=0, key_padding_mask=mask), 1e-14)
        a = F.local_attention(*views, chunk_length=4)
        assert_close(a, F.local_attention(*dense, chunk_length=4), 1e-14)
    expanded = dense[0][:1, :1].expand(B, H, L, D)
    a = F.lsh_attention(expanded, expanded, CONFIG, seed=0)
    assert_close(a, F.lsh_attention(expanded.contiguous(), expanded.contiguous(), CONFIG, seed=0), 1e-14)


def test_separate_keys_may_see_themselves() -> None:
    q, k, v = qkv(1, 1, 3, D)
    config = LSHConfig(chunk_length=3)
    layout = F.lsh_layout(q, config)
    out = F.attend(q, v, layout, config, k=k)
    assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), 1e-14)
    scaled = F.attend(q, v, layout, dataclasses.replace(config, scale=1.0), k=k)
    assert_close(scaled, (q @ k.mT).softmax(-1) @ v, 1e-14)


@pytest.mark.parametrize("config", [LSHConfig.trax(chunk_length=4), LSHConfig(window="bucket"), LSHConfig()])
def test_meta_tensors_give_shapes(config: LSHConfig) -> None:
    qk, v = zeros(B, H, L, D, device="meta"), zeros(B, H, L, 5, device="meta")
    mask = zeros(B, L, dtype=torch.bool, device="meta")
    out, lse = F.lsh_attention(qk, v, config, seed=0, key_padding_mask=mask, dropout_p=0.1, return_lse=True)
    assert out.shape == (B, H, L, 5) and lse.shape == (B, H, L) and out.device.type == "meta"


def test_double_rotations_with_double_input() -> None:
    rotations = F.sample_rotations(CONFIG, H, D, 0)
    qk = normal(B, H, L, D)
    assert torch.equal(F.lsh_hash(qk, rotations, (4, 2)), F.lsh_hash(qk, rotations.double(), (4, 2)))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_sdpa_does(cast: torch.dtype) -> None:
    q, k, v = qkv(B, H, L, D, dtype=torch.float32)
    layout = F.lsh_layout(q.to(cast), CONFIG, seed=0, backend="reference")
    expected = F.attend(q.to(cast), v.to(cast), layout, CONFIG, backend="reference", return_lse=True)
    options: dict[str, Any] = {"backend": "reference", "return_lse": True}
    q.requires_grad_()
    with torch.autocast("cpu", cast):
        assert torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype == cast
        for actual in (
            F.lsh_attention(q, v, CONFIG, seed=0, **options),
            F.lsh_attention(q.to(cast), v, CONFIG, seed=0, **options),  # one cast already
        ):
            assert actual[0].dtype == cast and actual[1].dtype == torch.float32
            assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        assert torch.equal(F.lsh_layout(q, CONFIG, seed=0, backend="reference").order, layout.order)
        local = F.local_attention(q, k, v, backend="reference")
        assert F.lsh_attention(q.double(), v.double(), CONFIG, seed=0).dtype == torch.float64
        with pytest.raises(TypeError, match=r"under autocast qk is torch\.float64 and v"):
            F.lsh_attention(q.double(), v, CONFIG, seed=0)
    assert torch.equal(local, F.local_attention(q.to(cast), k.to(cast), v.to(cast), backend="reference"))
    actual[0].sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("backend", "config"),
    [
        ("reference", CONFIG),
        pytest.param("native", CONFIG, marks=NATIVE.marks),
        pytest.param("native", LSHConfig.trax(chunk_length=4), marks=NATIVE.marks),
        pytest.param("native", LSHConfig(window="bucket", chunk_length=4), marks=NATIVE.marks),
    ],
)
def test_compiles_to_one_graph(backend: str, config: LSHConfig) -> None:
    """Natively with L symbolic, so two compilations at most; the reference once for each L."""
    counter = CompileCounterWithBackend("aot_eager")

    def call(qk: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"key_padding_mask": mask, "dropout_p": 0.2, "backend": backend}
        return F.lsh_attention(qk, v, config, seed=3, return_lse=True, **options)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=counter, fullgraph=True)
    lengths = (20, 27, 33, 18) if backend == "native" else (20, 27)
    for length in lengths:
        qk, v = (normal(1, 2, length, 4, dtype=torch.float32, seed=s).requires_grad_() for s in range(2))
        mask = padding_mask([length - 3], length)
        eager, graph = call(qk, v, mask), compiled(qk, v, mask)
        for a, e in zip(graph, eager, strict=True):
            assert_close(a, e, 1e-6)
        for a, e in zip(gradients(graph, (qk, v)), gradients(eager, (qk, v)), strict=True):
            assert_close(a, e, 1e-5)
    assert counter.frame_count <= 2


def test_memory_is_poisoned() -> None:
    """What conftest.py promises, and every other test relies on."""
    assert bool(torch.empty(5).isnan().all()) and bool((torch.empty(5, dtype=torch.int32) == 2**31 - 1).all())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_largest_scale_is_finite(backend: Any) -> None:
    q, v = zeros(1, 1, 16, 8).requires_grad_(), torch.ones(1, 1, 16, 8)
    out = F.local_attention(q, q, v, chunk_length=8, scale=MAX_SCALE, backend=backend)
    out.sum().backward()
    assert torch.allclose(out, v) and q.grad is not None and (q.grad == 0).all()
