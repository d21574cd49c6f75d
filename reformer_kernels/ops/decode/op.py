"""The steps of one cache, and the choice of back end.

It is no operator of torch: a step writes the cache in place, no gradient passes it, and a graph of one token
would pass the same tensors again and again. What the kernel needs to know of them is checked and kept once.
"""

from __future__ import annotations

from torch import Tensor

from reformer_kernels.ops.decode import native, reference
from reformer_kernels.ops.decode.reference import Step
from reformer_kernels.ops.hash.op import lsh_hash


class Decoding:
    """Runs the steps of one cache, one after another. A copy starts afresh."""

    def __init__(self) -> None:
        self._prepared: native.Prepared | None = None

    def __reduce__(self) -> tuple[type[Decoding], tuple[()]]:
        return type(self), ()

    def step(self, step: Step, backend: str) -> Tensor:
        """Append new tokens to the cache and attend from them: see `reference.decode_step`.

        The "triton" back end hashes by its kernel and does the rest in plain torch.
        """
        if backend == "native":
            if self._prepared is None or not self._prepared.is_for(step):
                self._prepared = native.Prepared(step)
            return self._prepared.run(step)
        ids = None
        if step.hashed is not None and step.rotations is not None:
            ids = lsh_hash(step.hashed, step.rotations, step.factors, None, backend)
        return reference.decode_step(step, ids)
