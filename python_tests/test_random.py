from __future__ import annotations

import pytest
import torch

from bench.fuzz.oracle import philox_words
from reformer_kernels import _random

# Known answers of Random123 (kat_vectors, philox4x32 10 rounds).
KNOWN = [
    ((0, 0), (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("key", "counter", "answer"), KNOWN)
def test_known_answers(key: tuple[int, int], counter: tuple[int, int, int, int], answer: str) -> None:
    words = _random.philox(
        tuple(torch.tensor(w) for w in key),  # type: ignore[arg-type]
        tuple(torch.tensor(w) for w in counter),  # type: ignore[arg-type]
    )
    assert " ".join(f"{int(w):08x}" for w in words) == answer
    assert " ".join(f"{w:08x}" for w in philox_words(key, counter)) == answer


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, -1, -(2**63), 2**63 - 1])
def test_seed_splits_into_words(seed: int) -> None:
    low, high = _random.split_seed(torch.tensor(seed))
    assert (int(high) << 32 | int(low)) == seed % 2**64


def test_keep_reads_the_slot_word() -> None:
    seed, p = 2**40 + 7, 0.4
    slot = torch.arange(40)
    kept = _random.keep(torch.tensor(seed), torch.tensor(3), torch.tensor(1), torch.tensor(11), slot, p)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    words = [philox_words(key, (3, 1, 11, s // 4))[s % 4] for s in range(40)]
    assert kept.tolist() == [w >= int(p * 2**32) for w in words]
    assert 0 < kept.sum() < 40


def test_threshold() -> None:
    assert [_random.threshold(p) for p in (0.0, 0.5, 1e-12)] == [0, 2**31, 0]
