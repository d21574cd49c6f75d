"""The sizes and dtypes that the package accepts."""

from __future__ import annotations

import torch

MAX_HEAD_DIM = 256
"""The largest head dimension of queries, keys and values: the kernels keep a row on the stack."""

MAX_LENGTH = 2**31 - 1
"""The longest sequence: positions are 32-bit integers."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes of the native and the Triton kernels."""

FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)
"""The dtypes of the public functions; float64 is the reference's alone."""
