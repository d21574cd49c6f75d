"""The autograd nodes of a reversible sequence: one that enters it, one for each block, one that leaves it.

The activations do not travel on the graph. Its edges are zero-stride tensors ("carriers") with the
activations' shape and dtype, so gradients flow through autograd's ordinary engine, block by block, to
parameters, hooks and whatever comes before. The two streams live beside the graph, in the `SequenceRun`, and
are updated in place: in backward, a node takes the streams as they were after its block, subtracts what the
block added, and leaves them as they were before it. One more node (`_Hold`), which is not on the graph, saves
the last streams. The node of any block can reach it, so gradients may start at any block, as they do when
only an auxiliary loss is used.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reformer_kernels.reversible.arguments import TreeWithoutTensors, take_tensors
from reformer_kernels.reversible.block_runs import PARTS, Block, BlockRecord, first_run, rebuild, second_run
from reformer_kernels.reversible.recomputation import AutocastState, ModuleTensors, RandomStateStore
from reformer_kernels.reversible.streams import StreamFormat, Streams
from reformer_kernels.reversible.turns import turn


class SequenceRun:
    """One call of a sequence: what its nodes share.

    It refers to no tensor that has a graph: the nodes own it, so a path back to them would be a cycle that is
    never freed.
    """

    def __init__(
        self, stream_format: StreamFormat, *, blocks: int, keep_random_state: bool, keep_layouts: bool
    ) -> None:
        self.stream_format = stream_format
        self.recording = torch.is_grad_enabled()
        self.random_states: RandomStateStore | None = None
        if keep_random_state and self.recording:
            self.random_states = RandomStateStore(len(PARTS) * blocks)
        self.keep_layouts = keep_layouts and self.recording
        self.differentiable = False  # becomes True when a block takes part in the graph
        self.streams: Streams | None = None  # during the forward pass only
        self.records: list[BlockRecord] = []
        self.auxiliary: list[TreeWithoutTensors] = []  # what each block returned besides its streams
        # A result of the node that saves the last streams, as torch 2.6 frees the node without one.
        self._hold: Tensor | None = None
        self._released = False
        # Of the present backward pass: its graph task, how many blocks the streams are past, the streams.
        self._rebuilt: tuple[int, int, Streams] | None = None

    def run_block(
        self, block: Any, first: Tensor, second: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """Runs a block, an `nn.Module` with the methods of `Block`, on the streams.

        Takes and returns carriers. What the block's parts returned besides residuals follows: its tensors
        here, the rest in `auxiliary`.
        """
        for tensor in (first, second):
            if not _is_carrier(tensor) or tensor.dtype != self.stream_format.dtype:
                raise RuntimeError(
                    f"block {len(self.auxiliary)} got an input that something changed on the way from the "
                    f"sequence (dtype {tensor.dtype}, expected {self.stream_format.dtype}). With FSDP2 mixed "
                    "precision, use MixedPrecisionPolicy(..., cast_forward_inputs=False) on blocks; with "
                    "hooks, leave inputs alone"
                )
        constants, arguments = take_tensors((tuple(args), dict(kwargs)))
        with turn:
            module_tensors = ModuleTensors(block)
            results: tuple[Tensor, ...] = _Step.apply(
                self,
                block,
                module_tensors,
                constants,
                len(arguments),
                first,
                second,
                *arguments,
                *module_tensors.parameters,
            )
        return results

    def hold(self, saved: Sequence[Tensor]) -> None:
        """Saves what the backward pass starts from."""
        with torch.enable_grad():
            self._hold = _Hold.apply(torch.zeros((), requires_grad=True), *saved)

    def drop_rebuilt_streams(self) -> None:
        self._rebuilt = None

    @contextlib.contextmanager
    def streams_after(self, index: int) -> Iterator[Streams]:
        """The streams as block `index` left them; the body must take them to before the block.

        Within one backward pass they come from the block after it. A pass that starts at this block, or that
        was cut short, begins with the last streams. If the body raises, half-rebuilt streams are dropped.
        """
        task = torch._C._current_graph_task_id()
        rebuilt, self._rebuilt = self._rebuilt, None
        if rebuilt is None or rebuilt[0] != task or rebuilt[1] < index + 1:
            rebuilt = (task, len(self.records), self._last_streams())
        _, blocks_passed, streams = rebuilt
        while blocks_passed > index + 1:
            blocks_passed -= 1
            rebuild(self.records[blocks_passed], streams)
        yield streams
        if index > 0:
            self._rebuilt = (task, index, streams)

    def _last_streams(self) -> Streams:
        if self._released:
            raise RuntimeError(
                "Trying to backward through a ReversibleSequence a second time, after its saved outputs were "
                "freed: give the first backward retain_graph=True"
            )
        assert self._hold is not None  # made by the forward pass, dropped only when released
        node: Any = self._hold.grad_fn
        saved = node.saved_tensors
        if not _graph_is_kept():
            # Autograd does this for the nodes on the graph, of which this is none.
            self._hold, self._released = None, True
        # A pass that ends above block 0, as the rest is frozen, leaves streams that nothing else would free.
        reference = weakref.ref(self)
        torch.autograd.Variable._execution_engine.queue_callback(
            functools.partial(_drop_rebuilt_streams, reference)
        )
        return self.stream_format.resume(saved)


def _drop_rebuilt_streams(reference: weakref.ref[SequenceRun]) -> None:
    run = reference()
    if run is not None:
        run.drop_rebuilt_streams()


def _graph_is_kept() -> bool:
    """Whether the present backward pass was started with retain_graph=True."""
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keep_graph is None else bool(keep_graph())


def _carrier(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape with the memory of one element; its values mean nothing."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def _is_carrier(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and not any(tensor.stride())


class _Hold(torch.autograd.Function):
    """Saves tensors as autograd does: with its check for changes in place and its saved-tensor hooks."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        return anchor.clone()


class Enter(torch.autograd.Function):
    """From the caller's two streams, which it copies into the run, to carriers."""

    @staticmethod
    def forward(ctx: Any, run: SequenceRun, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        run.streams = run.stream_format.start(first, second)
        return (
            _carrier(first.shape, run.stream_format.dtype, first.device),
            _carrier(second.shape, run.stream_format.dtype, second.device),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads


class Leave(torch.autograd.Function):
    """From carriers to the results for the caller: one tensor if joined, else two."""

    @staticmethod
    def forward(
        ctx: Any, run: SequenceRun, joined: bool, first: Tensor, second: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.joined = joined
        assert run.streams is not None
        results, saved = run.stream_format.finish(run.streams, joined)
        run.streams = None
        if run.differentiable:
            run.hold(saved)
            # Aliases, as what is held must not be the tensors whose history autograd sets to this node.
            results = tuple(result.detach() for result in results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.joined:
            grads = (None, None) if grads[0] is None else grads[0].chunk(2, dim=-1)
        return None, None, *grads


class _Step(torch.autograd.Function):
    """One block: from carriers, arguments and parameters to carriers and auxiliary results."""

    @staticmethod
    def forward(
        ctx: Any,
        run: SequenceRun,
        block: Block,
        module_tensors: ModuleTensors,
        constants: TreeWithoutTensors,
        n_arguments: int,
        first: Tensor,
        second: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        index = len(run.auxiliary)
        ctx.run, ctx.index = run, index
        assert run.streams is not None
        record = BlockRecord(
            name=f"block {index}",
            block=block,
            tensors=module_tensors,
            arguments=[
                argument.detach().requires_grad_(argument.requires_grad) for argument in tensors[:n_arguments]
            ],
            constants=constants,
            autocast=AutocastState(first.device),
            random_states=run.random_states,
            keep_layouts=run.keep_layouts,
        )
        differentiable = run.recording and any(ctx.needs_input_grad)
        auxiliary = first_run(record, run.streams, differentiable)
        if run.recording:
            run.records.append(record)
            run.differentiable |= differentiable
        without_tensors, results = take_tensors(auxiliary)
        run.auxiliary.append(without_tensors)
        ctx.mark_non_differentiable(*(result for result in results if not result.requires_grad))
        return (
            _carrier(first.shape, first.dtype, first.device),
            _carrier(second.shape, second.dtype, second.device),
            *(result.detach() if result.requires_grad else result for result in results),
        )

    # A compiled function that calls backward would otherwise compile the second run, whose streams change in
    # place under views of them.
    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run: SequenceRun = ctx.run
        none = (None,) * 5
        needs = ctx.needs_input_grad[len(none) :]
        if all(grad is None for grad in grads):
            return (*none, *(None for _ in needs))
        second_order = torch.is_grad_enabled()
        with torch.no_grad(), turn, run.streams_after(ctx.index) as streams:
            results = second_run(run.records[ctx.index], streams, list(grads), needs)
        if second_order:
            results = _refuse_second_derivatives(results)
        return (*none, *results)


class _NoSecondDerivative(torch.autograd.Function):
    """Passes gradients on; differentiating them raises."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.detach() for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "ReversibleSequence supports first derivatives only: its backward rebuilds activations in place, "
            "which cannot be differentiated again. Call ReversibleSequence.plain(...) where you need "
            "create_graph=True"
        )


def _refuse_second_derivatives(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    with torch.enable_grad():
        anchor = torch.zeros((), requires_grad=True)
        passed = iter(_NoSecondDerivative.apply(anchor, *(grad for grad in grads if grad is not None)))
    return [None if grad is None else next(passed) for grad in grads]
