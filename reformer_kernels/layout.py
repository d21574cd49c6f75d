"""The sorted order that attention works on, as a value that can be made, kept, passed in and compared."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each token of each hash round is sorted to. Carries no gradient.

    Attributes:
        order: (B, H, R, L) int32. order[b, h, r, i] is the position of the token at rank i of round r: a
            permutation of 0..L-1, sorted by (bucket, position).
        bucket_starts: (B, H, R, S) int32, rising from 0 to L. Bucket x of a round holds the ranks
            [bucket_starts[x], bucket_starts[x + 1]); entries past the last bucket hold L. The bucket after
            the hash's n is the padding's, so S >= n + 2; a sequence that was not hashed has S = 2.
    """

    order: Tensor
    bucket_starts: Tensor

    @property
    def rounds(self) -> int:
        """R, the number of hash rounds."""
        return self.order.shape[2]

    @property
    def length(self) -> int:
        """L, the number of tokens."""
        return self.order.shape[3]
