"""Which back end runs a call: resolved once, by the public functions."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal, get_args

import torch

from reformer_kernels import _native
from reformer_kernels._limits import KERNEL_DTYPES

Backend = Literal["auto", "reference", "native", "triton"]
BACKENDS = get_args(Backend)  # here, as torch.compile of older versions cannot trace get_args


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter: TRITON_INTERPRET decides when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")


@functools.cache
def triton_missing() -> bool:
    """Whether Triton is not installed; found out without importing it, which takes a while."""
    return importlib.util.find_spec("triton") is None


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The back end for tensors of `dtype` on `device`: "reference", "native" or "triton".

    "auto" takes "reference" for float64 and for devices that have no kernels, "native" on the CPU, "triton"
    on CUDA and ROCm devices. Raises ValueError for an unknown name, and RuntimeError, saying why and what to
    do, where the back end cannot run; it never falls back to another.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "auto":
        kernels = {"cpu": "native", "cuda": "triton"}.get(device.type, "reference")
        backend = "reference" if dtype == torch.float64 else kernels
    if backend in ("native", "triton") and dtype not in KERNEL_DTYPES:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in KERNEL_DTYPES)
        raise RuntimeError(f"backend={backend!r} takes {accepted}, got {dtype}; use backend='reference'")
    if backend == "triton":
        if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
            raise RuntimeError(
                f"backend='triton' runs on CUDA and ROCm devices, got tensors on {device}; use 'native' on "
                "the CPU or 'reference' (or start Python with TRITON_INTERPRET=1, for tests)"
            )
        if triton_missing():
            raise RuntimeError(
                "the Triton back end cannot be used, as the package triton is not installed; get it with "
                "'pip install triton', or pass backend='reference', which is slow"
            )
    if backend == "native":
        if device.type != "cpu":
            raise RuntimeError(
                f"backend='native' runs on the CPU, got tensors on {device}; use 'reference' "
                "(on CUDA tensors, bucket_sort is the one function with a native kernel)"
            )
        reason = _native.unavailable_reason()
        if reason is not None:
            raise RuntimeError(
                f"the native back end cannot be used: {reason}; or pass backend='reference', which is slow"
            )
    return backend


def resolve_sort_backend(backend: str, device: torch.device) -> str:
    """`resolve_backend` for `bucket_sort`, whose native kernel also takes CUDA tensors: their default.

    Without it (no CUDA in the build, or ROCm) "auto" sorts them with the Triton kernel.
    """
    if device.type != "cuda" or backend not in ("auto", "native"):
        return resolve_backend(backend, device, torch.float32)
    if _native.CUDA_MISSING is None:
        return "native"
    if backend == "auto":
        return resolve_backend("triton", device, torch.float32)
    raise RuntimeError(
        f"backend='native' cannot sort CUDA tensors: {_native.CUDA_MISSING}; use 'auto' or 'triton'"
    )
