"""Random numbers: seeds, and the counter-based generator that every back end shares.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives the same four
words for the same key and counter everywhere: on every back end, in forward, backward and recomputation,
with no state between them. Here it is written in int64 tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

Seed = int | Tensor | None
"""What the public functions take as a seed; None draws one from torch's global generator."""


def resolve_seed(seed: Seed) -> Tensor:
    """An int64 tensor of one element, on the CPU unless `seed` is a tensor on another device.

    Integers up to 2^64 - 1 keep their 64 bits. It is made on the CPU whatever torch's default
    device is.
    """
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed must be an int or an int64 tensor of one element, got {seed.dtype} {tuple(seed.shape)}"
            )
        if seed.device.type == "meta":
            raise ValueError(
                "seed must hold a number, got a tensor on the meta device, which holds none; pass an int, or "
                "a tensor made with device='cpu'"
            )
        return seed.reshape(())
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, an int64 tensor of one element, or None, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit 64 bits, got {seed}")
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device="cpu")


_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(key: tuple[Tensor, Tensor], counter: Words) -> Words:
    """The four 32-bit words of `counter` under `key`, as int64 tensors in 0..2^32-1.

    Key and counter words are int64 tensors in the same range, and broadcast.
    """
    key0, key1 = key
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def split_seed(seed: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high 32 bits of an int64 seed, as int64 tensors: a Philox key."""
    return seed & _WORD, (seed >> 32) & _WORD


def threshold(dropout_p: float) -> int:
    """floor(p * 2^32): a probability is kept iff its word is at least this."""
    return int(dropout_p * 2**32)


def keep(seed: Tensor, head: Tensor, round_: Tensor, rank: Tensor, slot: Tensor, dropout_p: float) -> Tensor:
    """Which probabilities dropout keeps: bool, of the arguments' broadcast shape.

    counter = (head, round, rank, slot // 4), word slot % 4, where head = b * H + h, round and rank are the
    query's and slot = key's round * 4 * ceil(L / 4) + key's rank.
    """
    words = philox(split_seed(seed), (head, round_, rank, slot // 4))
    lane = slot % 4
    word = words[3]
    for i in range(3):
        word = words[i].where(lane == i, word)
    return word >= threshold(dropout_p)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product, in halves of `b` so that int64 never overflows."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
