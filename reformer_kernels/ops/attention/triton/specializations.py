"""Every Triton kernel of attention as its launcher compiles it: see `gpu.specializations`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reformer_kernels.gpu.cost_model import Shape
from reformer_kernels.gpu.presets import PRESETS
from reformer_kernels.gpu.recording import Launch, recording
from reformer_kernels.gpu.specializations import Launched, Specialization
from reformer_kernels.gpu.tiles import Tile
from reformer_kernels.ops.attention.triton import launch

PRODUCTS = {"attention_forward": 2, "attention_backward_queries": 3, "attention_backward_keys": 4}
"""How many matrix products a kernel computes over its pairs. These kernels have tiles in the table."""

LENGTH = 4096
"""The tokens for which kernels are described. Other lengths have the same kernels."""

_ROWS = {"q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"}
"""The arguments of kernels that are rows of the call's tensors."""

_STORED = {"running", "q_sums", "k_sums", "v_sums", "grad_q", "grad_k", "grad_v"}
"""The arguments that are rows which a kernel stores."""


def specializations(
    *,
    architecture: str,
    dtype: torch.dtype,
    head_dim: int,
    options: str,
    tiles: Mapping[str, Tile],
    preset: str,
    rounds: int,
) -> list[Specialization]:
    """The kernels of a call's forward and backward pass: see `gpu.specializations`.

    With options "off" there is no padding and no dropout; with "all" there are both, and a gradient of the
    log-sum-exp. Where a kernel has a variant for the first, the middle and the last round, "off" takes the
    most frequent one and "all" the last one.
    """
    shape = Shape(head_dim=head_dim, n_hashes=rounds, bits=8 * dtype.itemsize, length=LENGTH)
    launched = launches(architecture, shape, dtype, preset, options=options, tiles=tiles)
    listed = [one.specialization for one in launched]
    if options == "off":
        listed = sorted(listed, key=listed.count)
    chosen = {}
    for one in listed:
        kind = {name: value for name, value in one.constexprs.items() if name not in ("FIRST", "LAST")}
        chosen[one.name, str(kind)] = one
    return list(chosen.values())


def launches(
    architecture: str,
    shape: Shape,
    dtype: torch.dtype,
    preset: str,
    *,
    options: str = "off",
    tiles: Mapping[str, Tile] | None = None,
    backward: bool = True,
) -> list[Launched]:
    """What the launchers launch for a forward pass and, unless `backward` is False, a backward pass.

    The layout is given: hashing and sorting are other operations.
    """
    kind, everything = PRESETS[preset], options == "all"
    B, H, L, D = 1, shape.heads, shape.length, shape.head_dim
    rounds, rule = kind.rounds(shape.n_hashes), kind.rule(L, shape.chunk_length)

    def empty(*sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def rows() -> Tensor:
        return empty(B, H, L, D, dtype=dtype)

    order = empty(B, H, rounds, L, dtype=torch.int32)
    starts = empty(B, H, rounds, kind.buckets(L, shape.chunk_length) + 2, dtype=torch.int32)
    apart = kind.keys == "apart"
    inputs = launch.Inputs(
        q=rows(),
        k=None if kind.keys == "shared" else rows(),
        v=rows(),
        order=order,
        starts=starts,
        key_bias=empty(B, L, dtype=torch.float32) if everything else None,
        seed=empty(1, dtype=torch.int64) if everything else None,
        key_order=torch.empty_like(order) if apart else None,
        key_starts=torch.empty_like(starts) if apart else None,
    )
    config = kind.sized(L, shape.chunk_length)
    scale = config.logit_scale(D, shared_qk=kind.keys == "shared")
    dropout_p = 0.1 if everything else 0.0
    out, lse = rows(), empty(B, H, L, dtype=torch.float32)
    with recording(architecture, tiles) as recorded:
        launch.forward(inputs, rule, scale, dropout_p, out, lse)
        if backward:
            grad_lse = torch.empty_like(lse) if everything else None
            grad_k = None if kind.keys == "shared" else rows()
            launch.backward(
                rows(), grad_lse, out, lse, inputs, rule, scale, dropout_p, rows(), grad_k, rows()
            )
    return [
        Launched(_specialization(one, architecture, shape, dtype, options, preset, rounds), one.programs)
        for one in recorded
    ]


def _specialization(
    recorded: Launch,
    architecture: str,
    shape: Shape,
    dtype: torch.dtype,
    options: str,
    preset: str,
    rounds: int,
) -> Specialization:
    products = PRODUCTS.get(recorded.name, 0)
    tensor_cores = dtype != torch.float32 or recorded.arguments.get("PRECISION") == "tf32"
    return recorded.specialization(
        architecture=architecture,
        dtype=dtype,
        head_dim=shape.head_dim,
        options=options,
        preset=preset,
        rounds=rounds,
        tile_names=("M", "N", "DIMS") if products else (),
        multiplies=products > 0 and tensor_cores,
        gathers=bool(_ROWS & set(recorded.kernel.arg_names)),
        scatters=bool(_STORED & set(recorded.kernel.arg_names)),
        products=products,
    )
