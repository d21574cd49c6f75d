"""Random rotations: their distribution, and that a number depends on the seed and its place alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.fuzz.oracle import philox_words
from python_tests.helpers import NATIVE
from python_tests.native_tools import isa, poisoned_memory, runnable_isas, torch_threads
from reformer_kernels import LSHConfig
from reformer_kernels import functional as F
from reformer_kernels._random import normal_numbers, resolve_seed
from reformer_kernels.ops.hash import op, reference

SHAPES = [(1, 1, 1, 1), (3, 5, 2, 6), (8, 64, 4, 24), (2, 17, 3, 131), (1, 300, 1, 3), (2, 3, 64, 65)]


def native_rotations(seed: int, *shape: int) -> Tensor:
    with poisoned_memory():
        return torch.ops.reformer_kernels.native_sample_rotations(torch.tensor(seed), *shape)


# Where each number comes from


def test_definition() -> None:
    """Number (h, d, r, c) from one word, by scalar arithmetic."""
    seed = 0x1234567890ABCDEF
    drawn = reference.sample_rotations(torch.tensor(seed), 3, 4, 2, 7)
    assert drawn.shape == (3, 4, 2, 7) and drawn.dtype == torch.float32 and drawn.is_contiguous()
    for h, d, r, c in [(0, 0, 0, 0), (2, 3, 1, 6), (1, 2, 0, 5), (2, 0, 1, 3)]:
        word = philox_words((seed & 0xFFFFFFFF, seed >> 32), (h, 2**31 + d, r, c // 4))[c % 4]
        mixed = word * 0x9E3779B9 % 2**32
        whole = (word.bit_count() - 16) * 2**16 + mixed // 2**16 + mixed % 2**16 - 65535
        expected = torch.tensor(whole, dtype=torch.float32) * float.fromhex("0x1.665356p-18")
        assert drawn[h, d, r, c] == expected


@pytest.mark.parametrize("name", runnable_isas())
@pytest.mark.parametrize("shape", SHAPES)
def test_native_equals_reference(name: str, shape: tuple[int, ...]) -> None:
    for seed in (0, -1, 2**40 + 7):
        with isa(name), torch_threads(1):
            got = native_rotations(seed, *shape)
        assert torch.equal(got, reference.sample_rotations(torch.tensor(seed), *shape))
        with isa(name), torch_threads(3):
            assert torch.equal(native_rotations(seed, *shape), got)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_a_part_is_the_same_as_in_the_whole(backend: str) -> None:
    config = LSHConfig(n_hashes=3, bucket_factors=(16, 6))
    whole = F.sample_rotations(LSHConfig(n_hashes=4), 5, 9, 7, backend=backend)
    assert torch.equal(whole[:2, :9, :3, :11], F.sample_rotations(config, 2, 9, 7, backend=backend))
    assert torch.equal(whole[:1], F.sample_rotations(LSHConfig(), 1, 9, 7, shared_heads=True))


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("factors", [None, (8, 6), 4])
def test_a_layout_draws_what_sample_rotations_draws(backend: str, factors: Any) -> None:
    config = LSHConfig(n_hashes=3, chunk_length=4, bucket_factors=factors)
    qk, k = torch.randn(2, 3, 50, 9), torch.randn(2, 3, 70, 9)
    rotations = F.sample_rotations(config, 3, 9, 11)
    drawn = F.lsh_layout(qk, config, seed=11, backend=backend)
    assert torch.equal(drawn.order, F.lsh_layout(qk, config, rotations=rotations, backend=backend).order)
    pair = F.lsh_cross_layout(qk, k, config, seed=11, backend=backend)
    given = F.lsh_cross_layout(qk, k, config, rotations=rotations, backend=backend)
    assert all(torch.equal(a.order, b.order) for a, b in zip(pair, given, strict=True))


@pytest.mark.parametrize("name", runnable_isas())
def test_the_hash_draws_while_it_packs(name: str) -> None:
    x, seed = torch.randn(2, 3, 61, 20), torch.tensor(-9)
    for factors in ([2], [16, 6], [4, 2, 2]):
        rotations = reference.sample_rotations(seed, 3, 20, 2, sum(factors) // 2)
        for threads in (1, 4):
            with isa(name), torch_threads(threads), poisoned_memory():
                drawn = op.lsh_hash(x, None, factors, None, "native", seed=seed, rounds=2)
                given = op.lsh_hash(x, rotations, factors, None, "native")
            assert torch.equal(drawn, given)


# The distribution


def test_moments_and_tails() -> None:
    """Within sampling error of what the definition says of all 2^32 words."""
    n = 2**21
    z = normal_numbers(torch.randint(2**32, (n,), generator=torch.Generator().manual_seed(0))).double()
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.square().mean() - 1) < 6 / n**0.5
    assert abs(z.pow(3).mean()) < 0.01
    assert abs(z.pow(4).mean() - 2.940) < 0.02
    for threshold, share in ((1, 0.3198), (2, 0.04485), (3, 0.002292)):
        assert (z.abs() > threshold).double().mean() == pytest.approx(share, rel=0.05)
    ordered = z.sort().values[:: n // 1000]
    share = torch.arange(n)[:: n // 1000].double() / n
    assert (torch.special.ndtr(ordered) - share).abs().max() < 0.003
    assert z.abs().max() < 6


def test_places_are_uncorrelated() -> None:
    drawn = reference.sample_rotations(torch.tensor(3), 4, 32, 4, 64)
    for dim in range(4):
        n = drawn.numel() * (drawn.shape[dim] - 1) / drawn.shape[dim]
        near = drawn.narrow(dim, 0, drawn.shape[dim] - 1) * drawn.narrow(dim, 1, drawn.shape[dim] - 1)
        assert abs(near.mean()) < 4 / n**0.5
    for seed in (2, 4, 2**32 + 3, 3 - 2**63):
        other = reference.sample_rotations(torch.tensor(seed), 4, 32, 4, 64)
        assert abs((drawn * other).mean()) < 4 / drawn.numel() ** 0.5


@pytest.mark.parametrize("D", [2, 64])
@pytest.mark.parametrize("axis", [False, True])
def test_collisions_by_angle_match_normal_rotations(D: int, axis: bool) -> None:
    """Two vectors at an angle share a bucket as often as under normal rotations, within sampling error.

    `axis`: one vector lies along a coordinate axis, where no sum over dimensions makes a projection normal.
    """
    torch.manual_seed(0)
    heads, rounds, factor = 64, 64, 16
    drawn = reference.sample_rotations(torch.tensor(1), heads, D, rounds, factor // 2)
    normal = torch.randn(drawn.shape)
    first = torch.eye(D)[0] if axis else torch.nn.functional.normalize(torch.randn(D), dim=0)
    other = torch.randn(D)
    other = torch.nn.functional.normalize(other - (other @ first) * first, dim=0)
    angles = torch.tensor([0.1, 0.3, 0.6, 1.0, 1.5])
    x = torch.stack([first, *(math.cos(a) * first + math.sin(a) * other for a in angles.tolist())])
    shares = []
    for rotations in (drawn, normal):
        ids = reference.lsh_hash(x.expand(1, heads, -1, -1), rotations, (factor,), None)
        shares.append((ids[..., 1:] == ids[..., :1]).double().mean((0, 1, 2)))
        assert (shares[-1].diff() < 0).all()
    error = (shares[1] * (1 - shares[1]) * 2 / (heads * rounds)).sqrt()
    assert ((shares[0] - shares[1]).abs() < 4 * error).all(), (shares, error)


# The operator and the public function


def test_operator_contract() -> None:
    operators = torch.ops.reformer_kernels
    seed = torch.tensor(4)
    torch.library.opcheck(operators.native_sample_rotations.default, (seed, 2, 3, 2, 5))
    x = torch.randn(1, 2, 30, 8)
    torch.library.opcheck(operators.native_lsh_hash.default, (x, None, [], 16, None, None, seed, 2))
    with pytest.raises(TypeError, match="seed must be an int64 tensor of one element, got torch"):
        operators.native_sample_rotations(seed.int(), 2, 3, 2, 5)
    with pytest.raises(ValueError, match="sizes of rotations must not be negative"):
        operators.native_sample_rotations(seed, 2, 3, -2, 5)
    for arguments in ((None, 2), (seed, 0)):
        with pytest.raises(ValueError, match="give rotations, or a seed and rounds >= 1"):
            operators.native_lsh_hash(x, None, [8], 0, None, None, *arguments)


def test_devices() -> None:
    config = LSHConfig(n_hashes=2, bucket_factors=8)
    assert F.sample_rotations(config, 2, 8, 0, device="meta").device.type == "meta"
    assert F.sample_rotations(config, 2, 8, 0).device.type == "cpu"
    with FakeTensorMode():
        rows = torch.empty(1, 2, 640, 8, device="cuda")
        seed = torch.zeros((), dtype=torch.int64, device="cuda")
        assert F.sample_rotations(config, 2, 8, seed).device == rows.device
        assert F.sample_rotations(config, 2, 8, 5, device="cuda").device == rows.device
        for given in (None, 5, seed):
            ids = op.lsh_hash(
                rows, None, [], None, "triton", span=64, seed=resolve_seed(given, rows.device), rounds=2
            )
            assert ids.device == rows.device and ids.shape == (1, 2, 2, 640)
    layout = F.lsh_layout(torch.empty(1, 2, 640, 8, device="meta"), LSHConfig(), seed=5)
    assert layout.order.device.type == "meta"
