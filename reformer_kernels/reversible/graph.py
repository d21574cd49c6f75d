"""The autograd nodes of a reversible sequence: one to enter, one a block, one to leave.

The activations do not travel on the graph. Its edges carry zero-stride tensors of the activations' shape and
dtype ("carriers"), so that gradients flow through the ordinary engine, block by block, to parameters, hooks
and whatever comes before; the two streams live in the `Run` beside the graph and are updated in place. In
backward, a node takes the streams as they were after its block, subtracts what the block added, and leaves
them as they were before it. The last streams are kept by one more node, off the graph (`_Hold`), whose saved
tensors any block's node can reach: so gradients may start at any block, as they do when only an auxiliary
loss is used.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from reformer_kernels.reversible import recomputation as _replay
from reformer_kernels.reversible.streams import StreamKind, Streams

if TYPE_CHECKING:
    from reformer_kernels.reversible.blocks import ReversibleBlock

# y1 = x1 + f(x2), y2 = x2 + g(y1): which stream a part changes, and which it reads.
PARTS = ("f", "g")
TENSOR = object()  # stands for a tensor in a list of leaves whose tensors are kept apart
CHANGES = {"f": 0, "g": 1}
READS = {"f": 1, "g": 0}


@dataclass(frozen=True, slots=True)
class ArgumentSpec:
    """The extra arguments of a call without their tensors."""

    structure: Any
    constants: list[Any]  # TENSOR where a tensor goes

    def fill(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = fill_tensors(self.structure, self.constants, tensors)
        return args, kwargs


def fill_tensors(structure: Any, constants: Sequence[Any], tensors: Iterable[Tensor]) -> Any:
    """The pytree whose leaves are `constants`, with `tensors` in order where those are TENSOR."""
    remaining = iter(tensors)
    leaves = [next(remaining) if constant is TENSOR else constant for constant in constants]
    return pytree.tree_unflatten(leaves, structure)


def take_tensors(tree: Any) -> tuple[Any, list[Any], list[Tensor]]:
    """Structure, constants and tensors of a pytree: see `fill_tensors`."""
    leaves, structure = pytree.tree_flatten(tree)
    constants = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return structure, constants, [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@dataclass(slots=True)
class PartRecord:
    """What the second run of f or g needs of the first."""

    random: _replay.RandomState | None
    kept: _replay.Kept | None
    unplaced: list[int] = field(default_factory=list)  # parameters that the part reads from elsewhere


@dataclass(slots=True)
class BlockRecord:
    """What rebuilding a block's input needs; no activation."""

    block: ReversibleBlock
    arguments: list[Tensor]
    versions: list[int]
    spec: ArgumentSpec
    parameters: _replay.Parameters
    autocast: _replay.AutocastState
    parts: dict[str, PartRecord] = field(default_factory=dict)


class Run:
    """One call of a sequence: what its nodes share.

    It refers to no tensor with a graph: the nodes own it, and a path back to them would never be freed.
    """

    def __init__(self, kind: StreamKind, *, preserve_random_state: bool, keep_layouts: bool) -> None:
        self.kind = kind
        self.preserve_random_state = preserve_random_state
        self.keep_layouts = keep_layouts
        self.recording = torch.is_grad_enabled()
        self.differentiable = False  # some block takes part in the graph
        self.streams: Streams | None = None  # while the forward pass runs
        self.records: list[BlockRecord] = []
        # For each block, the structure of what it returned besides residuals, and what of that is no tensor
        # (see `fill_tensors`).
        self.auxiliary: list[tuple[Any, list[Any]]] = []
        self._hold: Tensor | None = None  # its node saves the last streams; torch 2.6 frees that without it
        self._released = False
        self._slot: tuple[int, int, Streams] | None = None  # (graph task, level, the streams at that level)

    def hold(self, saved: Sequence[Tensor]) -> None:
        self.streams = None
        with torch.enable_grad():
            self._hold = _Hold.apply(torch.zeros((), requires_grad=True), *saved)

    def drop_slot(self) -> None:
        self._slot = None

    @contextlib.contextmanager
    def streams_after(self, index: int) -> Iterator[Streams]:
        """The streams as block `index` left them; the body must rebuild what they were before it.

        Within one backward pass they come from the block above; a pass that starts here, or was cut short,
        starts from the last streams. If the body raises, the half-rebuilt streams are dropped.
        """
        task = torch._C._current_graph_task_id()
        slot, self._slot = self._slot, None
        if slot is None or slot[0] != task or slot[1] < index + 1:
            slot = (task, len(self.records), self._last_streams())
        _, level, streams = slot
        while level > index + 1:
            level -= 1
            _rebuild(self, level, streams)
        yield streams
        if index > 0:
            self._slot = (task, index, streams)

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
            # What autograd does for its own nodes; this node is not on the graph, so it is up to us.
            self._hold, self._released = None, True
        # A pass that ends above block 0 (the rest is frozen) leaves a slot, which nothing else would free.
        reference = weakref.ref(self)
        torch.autograd.Variable._execution_engine.queue_callback(functools.partial(_drop_slot, reference))
        return self.kind.resume(saved)


def _drop_slot(reference: weakref.ref[Run]) -> None:
    run = reference()
    if run is not None:
        run.drop_slot()


def _graph_is_kept() -> bool:
    asks = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asks is None else bool(asks())


def carrier(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape that takes one element's memory; its values mean nothing."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def is_carrier(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and not any(tensor.stride())


class _Hold(torch.autograd.Function):
    """Saves tensors as autograd does: with its check for changes in place and its saved-tensor hooks."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *saved: Tensor) -> Tensor:
        ctx.save_for_backward(*saved)
        return anchor.clone()


class Enter(torch.autograd.Function):
    """The caller's two streams to carriers; copies them into the run's streams."""

    @staticmethod
    def forward(ctx: Any, run: Run, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        run.streams = run.kind.start(first, second)
        return (
            carrier(first.shape, run.kind.dtype, first.device),
            carrier(second.shape, run.kind.dtype, second.device),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads


class Leave(torch.autograd.Function):
    """Carriers to the results that the caller gets."""

    @staticmethod
    def forward(ctx: Any, run: Run, joined: bool, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.joined = joined
        assert run.streams is not None
        results, saved = run.kind.finish(run.streams, joined)
        run.streams = None
        if run.differentiable:
            run.hold(saved)
            # Aliases: what is held must not be the very tensors to which autograd gives this node as history.
            results = tuple(result.detach() for result in results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.joined:
            grads = (None, None) if grads[0] is None else grads[0].chunk(2, dim=-1)
        return None, None, *grads


class Step(torch.autograd.Function):
    """One block: carriers, arguments and parameters to carriers and auxiliary results."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        block: ReversibleBlock,
        parameters: _replay.Parameters,
        spec: ArgumentSpec,
        n_arguments: int,
        first: Tensor,
        second: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.run, ctx.index, ctx.n_arguments = run, len(run.auxiliary), n_arguments
        assert run.streams is not None
        outer = tensors[:n_arguments]
        arguments = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in outer]
        record = BlockRecord(
            block=block,
            arguments=arguments,
            versions=[_replay.version(argument) for argument in arguments],
            spec=spec,
            parameters=parameters,
            autocast=_replay.AutocastState(first.device),
        )
        differentiable = run.recording and any(ctx.needs_input_grad)
        auxiliary = _first_run(run, ctx.index, record, run.streams, differentiable)
        if run.recording:
            run.records.append(record)
            run.differentiable |= differentiable
        structure, constants, results = take_tensors(auxiliary)
        run.auxiliary.append((structure, constants))
        ctx.mark_non_differentiable(*(result for result in results if not result.requires_grad))
        return (
            carrier(first.shape, first.dtype, first.device),
            carrier(second.shape, second.dtype, second.device),
            *(result.detach() if result.requires_grad else result for result in results),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        run: Run = ctx.run
        none = (None,) * 5
        needs = ctx.needs_input_grad[len(none) :]
        if all(grad is None for grad in grads):
            return (*none, *(None for _ in needs))
        second_order = torch.is_grad_enabled()
        with torch.no_grad(), run.streams_after(ctx.index) as streams:
            results = _second_run(run, ctx.index, streams, list(grads), needs)
        if second_order:
            results = _refuse_second_order(results)
        return (*none, *results)


class _NoSecondOrder(torch.autograd.Function):
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


def _refuse_second_order(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    with torch.enable_grad():
        anchor = torch.zeros((), requires_grad=True)
        passed = iter(_NoSecondOrder.apply(anchor, *(grad for grad in grads if grad is not None)))
    return [None if grad is None else next(passed) for grad in grads]


def _call_part(
    record: BlockRecord, name: str, index: int, value: Tensor, streams: Streams
) -> tuple[Tensor, tuple[Any, ...]]:
    """f or g on a stream's value: the residual, checked, and whatever else it returned."""
    norm = record.block.norm_of(name)
    normed = None if norm is None else streams.normed(READS[name], norm)
    args, kwargs = record.spec.fill(record.arguments)
    with record.autocast.applied():
        residual, auxiliary = record.block.call_part(name, value, args, kwargs, normed)
    what = f"{name} of block {index}"
    if not isinstance(residual, Tensor):
        raise TypeError(
            f"{what} must return a tensor, or a tuple whose first item is one; it returned "
            f"{type(residual).__name__}"
        )
    if residual.shape != value.shape:
        raise ValueError(
            f"{what} must keep the shape of its input {tuple(value.shape)}; it returned "
            f"{tuple(residual.shape)}"
        )
    if residual.device != value.device:
        raise ValueError(f"{what} moved its input from {value.device} to {residual.device}")
    expected = record.block.compute_dtype or value.dtype
    casts = record.autocast.enabled and residual.is_floating_point()
    if residual.dtype != expected and not casts:
        raise TypeError(
            f"{what} must keep the dtype of its input, {expected}, except under autocast; it returned "
            f"{residual.dtype}"
        )
    return residual, auxiliary


def _first_run(
    run: Run, index: int, record: BlockRecord, streams: Streams, differentiable: bool
) -> tuple[Any, ...]:
    """Adds f and g to the streams; returns their auxiliary results, which share no memory with the
    streams."""
    collected: list[Any] = []
    parameters = record.parameters
    # Aliases, so that the graph of this run ends at leaves that are known to be the block's own.
    inner = parameters.aliases() if differentiable else parameters.distinct
    replaced = parameters.replaced_by(inner, buffers=False) if differentiable else contextlib.nullcontext()
    with replaced:
        for name in PARTS:
            value = streams.value(READS[name])
            before = _replay.version(value)
            part = PartRecord(None, None)
            record.parts[name] = part
            if run.recording and run.preserve_random_state:
                part.random = _replay.RandomState([value, *record.arguments])
            if run.recording and run.keep_layouts:
                part.kept = _replay.Kept()
            leaf = value.detach()
            graph = _replay.graph_without_memory() if differentiable else contextlib.nullcontext()
            with graph, _replay.keeping(part.kept, again=False):
                residual, auxiliary = _call_part(
                    record, name, index, leaf.requires_grad_() if differentiable else leaf, streams
                )
            if differentiable:
                known = [leaf, *inner, *record.arguments]
                part.unplaced = _check_leaves(
                    f"{name} of block {index}", residual, auxiliary, known, parameters
                )
            if _replay.version(value) != before:
                raise RuntimeError(
                    f"{name} of block {index} changed its input in place (an activation with inplace=True?): "
                    "the input is a residual stream, which must stay as it is"
                )
            collected.extend(_detached_from(streams, auxiliary))
            streams.update(CHANGES[name], residual.detach(), 1, record.block.norm_after(name, 1))
    if differentiable:
        parameters.note_stateful_buffers()
    return tuple(collected)


def _detached_from(streams: Streams, auxiliary: Sequence[Any]) -> list[Any]:
    memory = {tensor.untyped_storage().data_ptr() for tensor in streams.memory()}

    def detach(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        shares = item.untyped_storage().data_ptr() in memory
        copy = item.detach().clone() if shares else item.detach()
        return copy.requires_grad_(item.requires_grad)

    return [pytree.tree_map(detach, item) for item in auxiliary]


def _check_leaves(
    what: str, residual: Tensor, auxiliary: Any, known: Sequence[Tensor], parameters: _replay.Parameters
) -> list[int]:
    """Raises if gradients would end outside the block; else the parameters reached outside their places."""
    outputs = [residual, *(leaf for leaf in pytree.tree_leaves(auxiliary) if isinstance(leaf, Tensor))]
    inside = {id(tensor) for tensor in known}
    originals = {id(parameter): number for number, parameter in enumerate(parameters.distinct)}
    unplaced = []
    for leaf in _replay.graph_leaves(outputs):
        if id(leaf) in inside:
            continue
        if id(leaf) not in originals:
            raise RuntimeError(
                f"{what} uses a tensor of shape {tuple(leaf.shape)} that requires a gradient (or was "
                "computed from one) but is neither its input, nor an argument, nor a parameter of the block, "
                "so its gradient would be lost. Pass it to the sequence as an argument, register it in the "
                "module, or detach it"
            )
        unplaced.append(originals[id(leaf)])
    return unplaced


@contextlib.contextmanager
def _as_in_first_run(run: Run, record: BlockRecord, index: int, streams: Streams) -> Iterator[list[Tensor]]:
    """The surroundings of a second run; gives the aliases that stand for the parameters."""
    record.parameters.check_unchanged(f"block {index}")
    for argument, expected in zip(record.arguments, record.versions, strict=True):
        if _replay.version(argument) != expected:
            raise RuntimeError(
                f"an argument of shape {tuple(argument.shape)} of the sequence was changed in place between "
                "the forward pass and its backward; give the sequence a copy"
            )
    aliases = record.parameters.aliases()
    tensors = [*streams.tensors, *record.arguments]
    random = (
        _replay.random_state_preserved(tensors) if run.preserve_random_state else contextlib.nullcontext()
    )
    with random, record.parameters.replaced_by(aliases, buffers=True):
        yield aliases


def _rebuild(run: Run, index: int, streams: Streams) -> None:
    """Takes the streams from after a block to before it, without gradients."""
    record = run.records[index]
    with _as_in_first_run(run, record, index, streams):
        for name in reversed(PARTS):
            part = record.parts[name]
            if part.random is not None:
                part.random.restore()
            leaf = streams.value(READS[name]).detach().requires_grad_()
            with _replay.graph_without_memory(), _replay.keeping(part.kept, again=True):
                residual, _ = _call_part(record, name, index, leaf, streams)
            streams.update(CHANGES[name], residual.detach(), -1, record.block.norm_after(name, -1))


def _second_run(
    run: Run, index: int, streams: Streams, grads: list[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Takes the streams from after a block to before it, and gradients likewise.

    grads: of the two streams after the block, then of its auxiliary tensors. Returns those of the two streams
    before it, then of the arguments and of the parameters, where `needs` asks for them.
    """
    record = run.records[index]
    of_streams = list(grads[:2])
    of_inputs: list[Tensor | None] = [None] * (len(needs) - 2)
    # Auxiliary tensors come in the order f's, g's; g runs first.
    of_auxiliary = list(grads[2:])
    with _as_in_first_run(run, record, index, streams) as aliases:
        inputs = [*record.arguments, *aliases]
        for name in reversed(PARTS):
            part = record.parts[name]
            if part.random is not None:
                part.random.restore()
            leaf = streams.value(READS[name]).detach().requires_grad_()
            with torch.enable_grad(), _replay.keeping(part.kept, again=True):
                residual, auxiliary = _call_part(record, name, index, leaf, streams)
            streams.update(CHANGES[name], residual.detach(), -1, record.block.norm_after(name, -1))
            tensors = [item for item in pytree.tree_leaves(auxiliary) if isinstance(item, Tensor)]
            split = len(of_auxiliary) - len(tensors) if name == "g" else 0
            given = [of_streams[CHANGES[name]], *of_auxiliary[split:]]
            del of_auxiliary[split:]
            # What g's gradient adds to stream 0 is needed for f; f's only for what comes before the block.
            wanted = [leaf] if name == "g" or any(needs[:2]) else []
            places = [place for place, needed in enumerate(needs[2:]) if needed]
            targets = [inputs[place] for place in places]
            for number in part.unplaced:
                places.append(len(record.arguments) + number)
                targets.append(record.parameters.distinct[number])
            found = _gradients([residual, *tensors], given, wanted + targets)
            if wanted:
                of_streams[READS[name]] = _sum(of_streams[READS[name]], found.pop(0))
            for place, grad in zip(places, found, strict=True):
                of_inputs[place] = _sum(of_inputs[place], grad)
    return [*of_streams, *of_inputs]


def _gradients(
    outputs: Sequence[Tensor], grads: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    pairs = [
        (output, grad.to(output.dtype))
        for output, grad in zip(outputs, grads, strict=True)
        if grad is not None and output.requires_grad
    ]
    if not pairs or not inputs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad([o for o, _ in pairs], inputs, [grad for _, grad in pairs], allow_unused=True)
    )


def _sum(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if total is None or grad is None:
        return grad if total is None else total
    return total + grad
