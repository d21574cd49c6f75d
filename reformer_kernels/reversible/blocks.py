"""Reversible residual layers: activation memory that does not grow with depth.

Source: Gomez et al., "The Reversible Residual Network" (arXiv 1707.04585), as used in Kitaev et al.,
"Reformer" (arXiv 2001.04451), section 3.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from reformer_kernels._backend import Backend, resolve_backend
from reformer_kernels.reversible.block_runs import Part
from reformer_kernels.reversible.fused_norm import Norm, Normed, check_norm, normalise
from reformer_kernels.reversible.graph import Enter, Leave, SequenceRun
from reformer_kernels.reversible.recomputation import AutocastState
from reformer_kernels.reversible.streams import FixedPointFormat, FloatFormat, StreamFormat
from reformer_kernels.reversible.turns import turn

Residual = Literal["float", "exact"]
Route = Literal["f", "g", "both"]
TensorOrPair = Tensor | tuple[Tensor, Tensor]


class ReversibleBlock(nn.Module):
    """A reversible residual block.

        y1 = x1 + f(x2), y2 = x2 + g(y1)

    A block that is called by itself, block(x1, x2, ...), keeps its activations like any module and returns
    (y1, y2, *auxiliary of f, *auxiliary of g). In a `ReversibleSequence` they are rebuilt instead. With FSDP2
    the block is the unit to shard: `fully_shard(block)`, not `fully_shard(block.f)`.

    Source: Gomez et al., "The Reversible Residual Network" (arXiv 1707.04585), section 3.1.

    Args:
        f, g: modules that keep their input's shape and dtype (under autocast, a result in lower precision is
            fine). Each may return a tuple (residual, *auxiliary), such as an auxiliary loss.
        route: which of the two gets the extra arguments of a call: "f", "g" or "both".
        compute_dtype: the dtype that the inputs of f and g are cast to, as for modules in bfloat16 on float32
            streams (such as FSDP2's `MixedPrecisionPolicy(param_dtype=torch.bfloat16,
            cast_forward_inputs=False)`). None means no cast.
        norm_f, norm_g: nn.LayerNorm or nn.RMSNorm over the last dimension, or None; the block then computes
            f(norm_f(x2)) and g(norm_g(y1)). Results are those of norms inside f and g, but in a reversible
            sequence on the native back end, the residual step that writes a stream normalises it in the same
            pass, without calling the norm's module.

    Raises:
        TypeError: f or g is not a module, or a norm is of another kind.
        ValueError: the route is unknown, or a norm is over more than the last dimension.
    """

    def __init__(
        self,
        f: nn.Module,
        g: nn.Module,
        *,
        route: Route = "f",
        compute_dtype: torch.dtype | None = None,
        norm_f: nn.Module | None = None,
        norm_g: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_norm("norm_f", norm_f)
        check_norm("norm_g", norm_g)
        for name, module in (("f", f), ("g", g)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be an nn.Module, got {type(module).__name__}")
        if route not in get_args(Route):
            raise ValueError(f"route must be one of {get_args(Route)}, got {route!r}")
        self.f = f
        self.g = g
        self.route = route
        self.compute_dtype = compute_dtype
        self.norm_f = norm_f
        self.norm_g = norm_g

    def norm_of(self, part: Part) -> Norm | None:
        """The norm of the input of f or g."""
        norm = self.norm_f if part == "f" else self.norm_g
        return cast("Norm | None", norm)  # as checked when the block was made

    def norm_after(self, part: Part, sign: int) -> Norm | None:
        """The norm of the stream that `part` has just changed, if the block reads that stream next.

        In forward (sign 1) f comes first, in backward (sign -1) g.
        """
        if part != ("f" if sign > 0 else "g"):
            return None
        return self.norm_of("g" if sign > 0 else "f")

    def call_part(
        self,
        part: Part,
        value: Tensor,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        normed: Normed | None = None,
    ) -> tuple[Any, tuple[Any, ...]]:
        """f or g on `value`, with the extra arguments if they are routed to it: (residual, auxiliary)."""
        module = self.f if part == "f" else self.g
        norm = self.norm_of(part)
        if norm is not None:
            value = normalise(value, norm, normed)
        if self.compute_dtype is not None:
            value = value.to(self.compute_dtype)
        result = module(value, *args, **kwargs) if self.route in (part, "both") else module(value)
        if isinstance(result, tuple) and result:
            return result[0], tuple(result[1:])
        return result, ()

    def forward(self, x1: Tensor, x2: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], SequenceRun):  # a call by the block's sequence, with carriers
            return args[0].run_block(self, x1, x2, args[1:], kwargs)
        with contextlib.nullcontext() if torch.compiler.is_compiling() else turn:
            return self._plain(x1, x2, args, kwargs)

    def _plain(self, x1: Tensor, x2: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        residual, auxiliary_f = self.call_part("f", x2, args, kwargs)
        y1 = x1 + residual
        residual, auxiliary_g = self.call_part("g", y1, args, kwargs)
        return y1, x2 + residual, *auxiliary_f, *auxiliary_g


class ReversibleSequence(nn.Module):
    """Reversible blocks one after another, with the activation memory of a single one.

        y1 = x1 + f(x2), y2 = x2 + g(y1) for each block

    The two streams are updated in place; the backward pass rebuilds each block's input from its output and
    runs the block again. Gradients reach inputs, parameters and extra arguments through the ordinary autograd
    graph, with one node for each block. So hooks, `torch.autograd.grad`, `retain_graph`,
    DistributedDataParallel, `torch.utils.checkpoint` and FSDP2 (`fully_shard` on blocks, and
    `cast_forward_inputs=False` in a mixed-precision policy) work as with other modules. For each block, the
    state of the random number generators before f and before g, autocast's settings, the training mode of
    each module and references to the arguments are kept, so `eval()` between forward and backward changes
    nothing.

    Threads may share a sequence: the blocks of all sequences run one at a time, in forward and in backward.
    Where another thread draws from torch's global generator during a run, the backward pass raises.

    Under `torch.compile` a sequence runs as without it, and the model before and after it is compiled;
    `block.f.compile()` and `block.g.compile()` compile its parts. `torch.export` takes what `plain` computes,
    in floating point for "exact" too.

    A call takes x, then any extra arguments for f and g. x is (..., 2 d), two streams side by side, or a pair
    of floating-point tensors of one shape. Tensors among the extra arguments, also within tuples, lists and
    dicts, get gradients. The result has x's form. If some f or g returned a tuple, the result is (streams,
    auxiliary), where auxiliary has for each block the tuple of what its f and its g returned after the
    residual.

    Source: Gomez et al., "The Reversible Residual Network" (arXiv 1707.04585), as used in Kitaev et al.,
    "Reformer" (arXiv 2001.04451), section 3.

    Args:
        blocks: (f, g) pairs of modules, or `ReversibleBlock`s.
        residual: "float" keeps streams in the input's dtype (float32 under autocast); a rebuilt activation
            then differs from the first one by rounding, which grows with depth. "exact" keeps streams in
            fixed point (int32), where a rebuilt activation equals the first one to the last bit.
        scale: for "exact", the steps per unit of the streams, a power of two from 2**-60 to 2**60; values
            must stay below 2**31 / scale. None chooses it in each call from the input, so that streams may
            grow to 256 times its largest value, or to 256 if that value is below 1.
        route, compute_dtype: those of the blocks that are given as pairs, see `ReversibleBlock`.
        preserve_random_state: whether to recompute with the random numbers of the first run, as dropout
            requires.
        keep_layouts: whether to keep what modules choose through `remember` (LSH attention's layouts), so
            that rounding in a rebuilt activation cannot change a hash. For "float" only: "exact" has no
            rounding.
        backend: the back end of the steps in fixed point and of those that normalise: "auto", "reference",
            "native" or "triton". Steps in fixed point give the same bits on all.

    Raises:
        TypeError, ValueError: blocks, input or settings are not accepted.
        RuntimeError: a block changed its input in place, or uses a tensor from outside whose gradient would
            be lost; a parameter changed between forward and backward; another thread drew random numbers
            during a run; a second derivative is asked for.
        NotImplementedError: a transform of `torch.func` is applied.
        FloatingPointError: with "exact", values of an earlier call left the representable range (see
            `check`).

    >>> layers = ReversibleSequence([(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)])
    >>> layers(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        blocks: Iterable[Any],
        *,
        residual: Residual = "float",
        scale: float | None = None,
        route: Route = "f",
        compute_dtype: torch.dtype | None = None,
        preserve_random_state: bool = True,
        keep_layouts: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if residual not in get_args(Residual):
            raise ValueError(f"residual must be one of {get_args(Residual)}, got {residual!r}")
        if scale is not None:
            if residual != "exact":
                raise ValueError('scale belongs to residual="exact"; leave it out with residual="float"')
            if not scale > 0 or math.frexp(scale)[0] != 0.5 or not 2.0**-60 <= scale <= 2.0**60:
                raise ValueError(f"scale must be a power of two from 2**-60 to 2**60, got {scale}")
        if backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
        if keep_layouts and residual == "exact":
            raise ValueError(
                'keep_layouts is for residual="float"; leave it out with residual="exact", which rebuilds '
                "layouts bit for bit"
            )
        self.blocks = nn.ModuleList(
            _as_block(block, index, route, compute_dtype) for index, block in enumerate(blocks)
        )
        self.residual = residual
        self.scale = scale
        self.preserve_random_state = preserve_random_state
        self.keep_layouts = keep_layouts
        self.backend = backend
        # Not buffers, as DistributedDataParallel would overwrite each process's flags with the first one's.
        self._flags: dict[torch.device, Tensor] = {}

    def extra_repr(self) -> str:
        return f"residual={self.residual!r}" + ("" if self.scale is None else f", scale={self.scale}")

    def forward(self, x: TensorOrPair, *args: Any, **kwargs: Any) -> Any:
        # An exported program has no backward pass that would rebuild anything.
        if torch.compiler.is_exporting():
            return self.plain(x, *args, **kwargs)
        return self._run(x, *args, **kwargs)

    # torch.compile can trace neither the streams that change in place beside the graph nor the carriers,
    # which share one element; so it compiles nothing of a run, the blocks' steps included.
    @torch.compiler.disable
    def _run(self, x: TensorOrPair, *args: Any, **kwargs: Any) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise NotImplementedError(
                "torch.func's transforms (grad, vjp, jvp, vmap) cannot pass through a ReversibleSequence, "
                "whose streams change in place; use backward() or torch.autograd.grad, or call "
                "ReversibleSequence.plain(...)"
            )
        first, second, joined = _two_streams(x)
        self._refuse_sharded_parts()
        run = SequenceRun(
            self._stream_format(first),
            blocks=len(self.blocks),
            keep_random_state=self.preserve_random_state,
            keep_layouts=self.keep_layouts,
        )
        first, second = Enter.apply(run, first, second)
        auxiliary = []
        for block in self.blocks:
            first, second, *tensors = block(first, second, run, *args, **kwargs)
            auxiliary.append(run.auxiliary[-1].fill(tensors))
        results = Leave.apply(run, joined, first, second)
        return _with_auxiliary(results[0] if joined else results, auxiliary)

    def plain(self, x: TensorOrPair, *args: Any, **kwargs: Any) -> Any:
        """The same blocks in floating point with autograd's own graph, whose memory grows with depth.

        For comparison, and where second derivatives are needed. Arguments and results are those of a call.
        """
        first, second, joined = _two_streams(x)
        dtype = _stream_dtype(first)
        first, second = first.to(dtype), second.to(dtype)
        auxiliary = []
        for block in self.blocks:
            first, second, *of_block = block(first, second, *args, **kwargs)
            auxiliary.append(tuple(of_block))
        return _with_auxiliary(torch.cat((first, second), dim=-1) if joined else (first, second), auxiliary)

    def check(self) -> None:
        """Raises FloatingPointError if values since the last check were not finite or left the range.

        This concerns residual="exact" only. It waits for the device. Each call of the sequence checks the
        calls before it in the same way.
        """
        for device, flag in self._flags.items():
            if flag.item():
                flag.zero_()
                raise FloatingPointError(
                    f'residual="exact": a value on {device} was not finite or left the range of the '
                    "fixed-point streams in an earlier step, whose results are wrong. The range is "
                    "2**31 / scale: "
                    + (
                        "256 times the larger of 1 and the largest input, as scale is automatic; give a "
                        "smaller scale"
                        if self.scale is None
                        else f"{2.0**31 / self.scale:g}, as scale is {self.scale:g}; give a smaller one"
                    )
                )

    def _stream_format(self, first: Tensor) -> StreamFormat:
        dtype = _stream_dtype(first)
        if self.residual == "float":
            normalises = any(block.norm_f is not None or block.norm_g is not None for block in self.blocks)
            backend = resolve_backend(self.backend, first.device, dtype) if normalises else "reference"
            return FloatFormat(dtype, backend)
        self.check()
        flag = self._flags.get(first.device)
        if flag is None:
            flag = self._flags[first.device] = torch.zeros(1, dtype=torch.int32, device=first.device)
        return FixedPointFormat(dtype, self.scale, flag, resolve_backend(self.backend, first.device, dtype))

    def _refuse_sharded_parts(self) -> None:
        fsdp = sys.modules.get("torch.distributed.fsdp")
        sharded = getattr(fsdp, "FSDPModule", None)
        if sharded is None:
            return
        for index, block in enumerate(self.blocks):
            for name, module in block.named_modules():
                if name and isinstance(module, sharded):
                    raise RuntimeError(
                        f"fully_shard was applied to {name!r} within block {index}: its gradients would be "
                        "lost, as the block runs its parts again on its own. Apply fully_shard to the block"
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_flags": {}}


def _as_block(block: Any, index: int, route: Route, compute_dtype: torch.dtype | None) -> ReversibleBlock:
    if isinstance(block, ReversibleBlock):
        return block
    if isinstance(block, tuple | list | nn.ModuleList | nn.Sequential) and len(block) == 2:
        return ReversibleBlock(block[0], block[1], route=route, compute_dtype=compute_dtype)
    size = f" of length {len(block)}" if hasattr(block, "__len__") else ""
    raise TypeError(
        f"block {index} must be a pair of modules (f, g) or a ReversibleBlock, got "
        f"{type(block).__name__}{size}"
    )


def _two_streams(x: Any) -> tuple[Tensor, Tensor, bool]:
    """The two streams of an input, and whether they came side by side in one tensor."""
    if isinstance(x, Tensor):
        if x.dim() == 0 or x.shape[-1] % 2 or x.shape[-1] == 0:
            raise ValueError(
                "the input's last dimension must be even, to split into two streams, got shape "
                f"{tuple(x.shape)}; or pass a pair of tensors (x1, x2)"
            )
        first, second = x.chunk(2, dim=-1)
    elif isinstance(x, tuple | list) and len(x) == 2 and all(isinstance(item, Tensor) for item in x):
        first, second = x
        if first.shape != second.shape:
            raise ValueError(
                f"the two streams must have one shape, got {tuple(x[0].shape)} and {tuple(x[1].shape)}"
            )
        if first.dtype != second.dtype or first.device != second.device:
            raise ValueError(
                f"the two streams must agree in dtype and device, got {first.dtype} on {first.device} and "
                f"{second.dtype} on {second.device}"
            )
    else:
        raise TypeError(f"the input must be a tensor (..., 2 d) or a pair of tensors, got {type(x).__name__}")
    if not first.is_floating_point():
        raise TypeError(f"the streams must be floating point, got {first.dtype}")
    return first, second, isinstance(x, Tensor)


def _stream_dtype(stream: Tensor) -> torch.dtype:
    """The input's dtype; at least float32 under autocast, as sums of many residuals need the precision."""
    autocast = AutocastState(stream.device).enabled
    return torch.float32 if autocast and stream.dtype.itemsize < 4 else stream.dtype


def _with_auxiliary(streams: TensorOrPair, auxiliary: list[tuple[Any, ...]]) -> Any:
    return (streams, auxiliary) if any(auxiliary) else streams
