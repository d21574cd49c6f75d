"""The public functions: check the arguments, resolve the back end once, call the operators.

Shapes use B batch, H heads, L length, D head dimension (1..256), Dv value dimension (1..256), R hash rounds.
Tensors are float32, bfloat16, float16, or float64 (reference only), with any strides. Functions raise
ValueError for wrong shapes and values, TypeError for wrong types and dtypes, RuntimeError for a back end that
cannot run. Under `torch.autocast` they cast q, k, v to the autocast dtype, as
`torch.nn.functional.scaled_dot_product_attention` does.

`backend`: "auto" takes the reference for float64, else the native kernels on the CPU and the Triton kernels
on CUDA and ROCm devices; a back end asked for by name runs or raises. `torch.compile(fullgraph=True)` traces
all functions; the kernels' operators keep L symbolic, while the reference is specialised to each L.

On CUDA tensors nothing waits for the device, and with rotations and seed on it (or a layout) a call can be
captured in a CUDA graph.

`seed`: an int, or an int64 tensor of one element; None draws one from torch's global generator, so that
`torch.manual_seed` reproduces a run.
"""

from reformer_kernels.functional.attention import (
    attend,
    local_attention,
    lsh_attention,
    lsh_cross_attention,
)
from reformer_kernels.functional.feed_forward import chunked_feed_forward
from reformer_kernels.functional.hashing import (
    bucket_sort,
    lsh_cross_layout,
    lsh_hash,
    lsh_layout,
    sample_rotations,
)
from reformer_kernels.functional.loss import linear_cross_entropy
from reformer_kernels.functional.sliding_window import sliding_window_attention

__all__ = [
    "attend",
    "bucket_sort",
    "chunked_feed_forward",
    "linear_cross_entropy",
    "local_attention",
    "lsh_attention",
    "lsh_cross_attention",
    "lsh_cross_layout",
    "lsh_hash",
    "lsh_layout",
    "sample_rotations",
    "sliding_window_attention",
]
