"""Random numbers: seeds, and the numbers by counter that every back end shares.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives the same four
words for the same key and counter everywhere: on every back end, in forward, backward and recomputation,
with no state between them. Here it is written in int64 tensors. Words become dropout's decisions or nearly
normal numbers without a rounding that could differ between machines.
"""

from __future__ import annotations

import torch
from torch import Tensor

Seed = int | Tensor | None
"""What the public functions take as a seed; None draws one from torch's global generator."""


def resolve_seed(seed: Seed, device: torch.device) -> Tensor:
    """The seed as an int64 tensor of one element on `device`, made without waiting for a GPU.

    None draws it from torch's generator of that device, which `torch.manual_seed` seeds. Integers up to
    2^64 - 1 keep their 64 bits. Only a tensor of another device is copied.
    """
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed must be an int or an int64 tensor of one element, got {seed.dtype} {tuple(seed.shape)}"
            )
        if seed.device.type == "meta" and device.type != "meta":
            raise ValueError(
                "seed must hold a number, got a tensor on the meta device, which holds none; pass an int, or "
                "a tensor made with device='cpu'"
            )
        # To the CPU it waits, as the number would otherwise be read before it has arrived.
        return seed.reshape(()).to(device, non_blocking=device.type != "cpu")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, an int64 tensor of one element, or None, got {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit 64 bits, got {seed}")
    # Filled, not copied: torch.tensor would copy from the host, and wait.
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)


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


def normal_numbers(word: Tensor) -> Tensor:
    """A float32 number of mean 0, variance 1 and nearly normal distribution from each word.

    The number of one bits of a uniform word w is binomial, with mean 16 and variance 8. A fraction in (-1, 1)
    of triangular distribution fills the gaps between whole numbers: the sum of the halves of
    w' = 0x9E3779B9 * w mod 2^32, each taken as a fraction in [0, 1), less its mean. So

        N = 2^16 (ones(w) - 16) + floor(w' / 2^16) + w' mod 2^16 - (2^16 - 1)

    has a mean of exactly 0 over all words and the variance 2^32 * 8.166659. N is below 2^24, so exact in
    float32, and the one product rounds alike everywhere: every back end gets the same bits.

    Over all 2^32 words the skewness is -0.0001 and the kurtosis 2.940 (normal: 3); the distribution function
    is within 0.0015 of the normal one, and |z| > 3 has a probability of 0.0023 (normal: 0.0027). Numbers
    lie in -6..6.
    """
    ones = word - ((word >> 1) & 0x55555555)
    ones = (ones & 0x33333333) + ((ones >> 2) & 0x33333333)
    ones = (ones + (ones >> 4)) & 0x0F0F0F0F
    ones = ((ones * 0x01010101) >> 24) & 0xFF
    mixed = (word * 0x9E3779B9) & _WORD
    total = (ones << 16) + (mixed >> 16) + (mixed & 0xFFFF) - (16 * 2**16 + 2**16 - 1)
    return total.to(torch.float32) * NORMAL_SCALE


NORMAL_SCALE = float.fromhex("0x1.665356p-18")
"""1 / sqrt(variance of N) in float32, with which the variance is 1 + 4e-8."""


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product, in halves of `b` so that int64 never overflows."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
