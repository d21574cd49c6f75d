"""The only place that turns tensors into pointers for the native kernels (`reformer_kernels._C`).

torch is imported first: the extension's OpenMP calls resolve to the runtime that torch has loaded, so one
thread pool serves both.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from types import ModuleType

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Storage dtypes of the native kernels, as csrc/kernels.h numbers them."""

CPU = torch.device("cpu")

HUGE_PAGES_FROM = 4 * 2**20
"""Bytes from which on an array that a kernel is about to fill asks for huge pages."""

_forked = False


def _import_failure(error: ImportError) -> str:
    if re.search("GOMP_|omp_", str(error)):
        return (
            f"the native extension needs GNU OpenMP, which this build of torch does not load ({error}); "
            "use a torch wheel for Linux from PyPI or pytorch.org, or start Python with "
            "LD_PRELOAD=libgomp.so.1"
        )
    return (
        f"the native extension cannot be imported ({error}); build it with: pip install -e . "
        "(in the folder of reformer-kernels' source)"
    )


def _load() -> ModuleType | str:
    """The extension, or why it cannot be used."""
    try:
        from reformer_kernels import _C
    except ImportError as error:
        return _import_failure(error)
    isa = os.environ.get("REFORMER_ISA", "")
    if isa and not _C.select_isa(isa):
        return (
            f"REFORMER_ISA={isa} is not available; this build has {_C.compiled_isas()}, "
            f"of which this machine's best is {_C.active_isa()}"
        )
    return _C


_loaded = _load()


def _after_fork_in_child() -> None:
    global _forked
    _forked = True


# An OpenMP pool does not survive fork: a parallel region in the child would wait for threads that are gone.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def unavailable_reason() -> str | None:
    """Why the native kernels cannot run on this machine, or None where they can."""
    return _loaded if isinstance(_loaded, str) else None


def extension() -> Any:
    """The extension module; RuntimeError with the reason where it cannot be used."""
    if isinstance(_loaded, str):
        raise RuntimeError(f"native kernels are not available: {_loaded}")
    return _loaded


def _cuda_missing() -> str | None:
    if isinstance(_loaded, str):
        return _loaded
    if torch.version.hip is not None:
        return "they are CUDA C++, and this torch was built for ROCm"
    cuda: Any = _loaded.cuda_info()
    return None if cuda["built"] else f"the native extension was built without CUDA ({cuda['reason']})"


CUDA_MISSING = _cuda_missing()
"""Why the native kernels for CUDA tensors cannot run, whatever the GPU; None where they can."""


def threads() -> int:
    """Threads for one kernel call: torch's number, and 1 in a forked child."""
    return 1 if _forked else torch.get_num_threads()


def pointer(
    tensor: torch.Tensor,
    name: str,
    *,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    rows: bool = False,
    device: torch.device = CPU,
) -> int:
    """The address of `tensor`, once it is known to be what a kernel expects.

    Checks that it is a dense tensor on `device` of exactly `shape`, of one of `dtypes`, and contiguous; or,
    with `rows`, of any strides whose last dimension is contiguous. TypeError for a wrong kind of tensor or
    dtype, ValueError for a wrong device, shape or stride. The caller keeps the tensor alive during the
    kernel; on a GPU, torch's allocator does, as long as the kernel is in the stream that is current.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        accepted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {accepted}, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.device != device:
        place = "on the CPU for the native kernels" if device == CPU else f"on {device}"
        raise ValueError(f"{name} must be {place}, got device {tensor.device}")
    if tensor.is_neg():
        raise ValueError(f"{name} is a view that torch negates when it is read; pass {name}.resolve_neg()")
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if rows:
        if tensor.stride(-1) != 1 and tensor.size(-1) > 1 and tensor.numel():
            raise ValueError(f"{name}'s last dimension must be contiguous, got strides {tensor.stride()}")
    elif not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    return tensor.data_ptr()


def seed_of(seed: torch.Tensor) -> int:
    """The 64 bits of an int64 tensor of one element on the CPU, as the kernels take a seed."""
    return int(seed) & (2**64 - 1)


def rows(tensor: torch.Tensor, name: str, *, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> Any:
    """A (B, H, L, D) tensor with a contiguous last dimension, as the kernels' `Rows`."""
    address = pointer(tensor, name, shape=shape, dtypes=dtypes, rows=True)
    batch_stride, head_stride, row_stride, _ = tensor.stride()
    return extension().Rows(
        data=address, batch_stride=batch_stride, head_stride=head_stride, row_stride=row_stride
    )


def prefer_huge_pages(*tensors: torch.Tensor) -> None:
    """Asks the system for huge pages for tensors that own their memory and are not written yet.

    Kernels gather rows in sorted order, so with pages of 4 KiB most rows would miss the translation buffer,
    and each page costs a fault when it is first touched.
    """
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() >= HUGE_PAGES_FROM:
            extension().prefer_huge_pages(storage.data_ptr(), storage.nbytes())


def info() -> dict[str, Any]:
    """What the native back end is on this machine.

    Keys: `available` (bool), `reason` (why not, else ""), `isa` (in use), `isa_reason` (why that
    one), `compiled_isas`, `threads`, and
    `cuda`: a dict with `built` (bool) and `reason`, and where built `runtime_version` and `architectures`.
    """
    reason = unavailable_reason()
    if reason is not None:
        cuda = {"built": False, "reason": "the native extension is not available"}
        return {
            "available": False,
            "reason": reason,
            "isa": "",
            "isa_reason": "",
            "compiled_isas": [],
            "threads": threads(),
            "cuda": cuda,
        }
    native = extension()
    return {
        "available": True,
        "reason": "",
        "isa": native.active_isa(),
        "isa_reason": native.active_isa_reason(),
        "compiled_isas": native.compiled_isas().split(),
        "threads": threads(),
        "cuda": native.cuda_info(),
    }
