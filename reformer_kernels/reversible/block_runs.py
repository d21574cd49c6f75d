"""The two runs of a reversible block: the first in the forward pass, the second in the backward pass.

A block computes y1 = x1 + f(x2), y2 = x2 + g(y1) in place on its two streams. The second run takes the
streams from y back to x, one part after the other (x2 = y2 - g(y1), x1 = y1 - f(x2)), and differentiates each
part on the way. Both runs go through `_call_part`, so they compute the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from reformer_kernels.reversible.arguments import TreeWithoutTensors, tensors_of
from reformer_kernels.reversible.fused_norm import Norm, Normed
from reformer_kernels.reversible.recomputation import (
    AutocastState,
    ModuleTensors,
    RandomState,
    RandomStateStore,
    random_state_preserved,
    version,
)
from reformer_kernels.reversible.remembered_values import RememberedValues, remembering
from reformer_kernels.reversible.streams import Streams

Part = Literal["f", "g"]

PARTS: tuple[Part, ...] = ("f", "g")
CHANGED_STREAM: dict[Part, int] = {"f": 0, "g": 1}
READ_STREAM: dict[Part, int] = {"f": 1, "g": 0}


class Block(Protocol):
    """What runs need of a block; `ReversibleBlock` is one."""

    compute_dtype: torch.dtype | None

    def norm_of(self, part: Part) -> Norm | None:
        """The norm of the input of `part`."""
        ...

    def norm_after(self, part: Part, sign: int) -> Norm | None:
        """The norm of the stream that `part` has just changed, if the block reads that stream next."""
        ...

    def call_part(
        self,
        part: Part,
        value: Tensor,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        normed: Normed | None = None,
    ) -> tuple[Any, tuple[Any, ...]]:
        """`part` on a stream's value: the residual, and whatever else it returned."""
        ...


@dataclass(slots=True)
class PartRecord:
    """What the second run of f or g needs from the first."""

    random: RandomState | None = None
    random_digest_after: bytes | None = None
    remembered: RememberedValues | None = None
    # Buffers that the first run changed, such as those of spectral norm, and their values before it.
    changed_buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    # Indices of the parameters that the part reads past their owners, from a reference of its own.
    read_elsewhere: list[int] = field(default_factory=list)


@dataclass(slots=True)
class BlockRecord:
    """What rebuilding a block's input needs; no activation is among it."""

    name: str
    block: Block
    tensors: ModuleTensors
    arguments: list[Tensor]
    constants: TreeWithoutTensors  # the other arguments: (args, kwargs)
    autocast: AutocastState
    random_states: RandomStateStore | None  # None: random numbers may differ in the second run
    keep_layouts: bool
    argument_versions: list[int] = field(init=False)
    parts: dict[Part, PartRecord] = field(init=False)

    def __post_init__(self) -> None:
        self.argument_versions = [version(argument) for argument in self.arguments]
        self.parts = {part: PartRecord() for part in PARTS}


def first_run(record: BlockRecord, streams: Streams, differentiable: bool) -> tuple[Any, ...]:
    """Takes the streams from before the block to after it, and fills in `record`.

    Returns what f and g returned besides their residuals; it shares no memory with the streams.
    """
    collected: list[Any] = []
    module_tensors = record.tensors
    # Aliases, so that the graph of this run ends at leaves that are known to be the block's own.
    parameters = module_tensors.aliases() if differentiable else module_tensors.parameters
    replaced = (
        module_tensors.replaced_by(parameters, again=False) if differentiable else contextlib.nullcontext()
    )
    with replaced:
        for part in PARTS:
            value = streams.value(READ_STREAM[part])
            before = version(value)
            part_record = record.parts[part]
            if record.random_states is not None:
                part_record.random = RandomState([value, *record.arguments], record.random_states)
            if record.keep_layouts:
                part_record.remembered = RememberedValues()
            leaf = value.detach()
            graph = _graph_without_saved_tensors() if differentiable else contextlib.nullcontext()
            kept = (
                module_tensors.buffers_kept(part_record.changed_buffers)
                if differentiable
                else contextlib.nullcontext()
            )
            with kept, graph, remembering(part_record.remembered, replay=False):
                residual, auxiliary = _call_part(
                    record, part, leaf.requires_grad_() if differentiable else leaf, streams
                )
            if record.random_states is not None:
                state = RandomState([value, *record.arguments])
                part_record.random_digest_after = state.digest()
            if differentiable:
                known = [leaf, *parameters, *record.arguments]
                part_record.read_elsewhere = _check_leaves(
                    f"{part} of {record.name}", [residual, *tensors_of(auxiliary)], known, module_tensors
                )
            if version(value) != before:
                raise RuntimeError(
                    f"{part} of {record.name} changed its input in place (an activation with inplace=True?): "
                    "the input is a residual stream, which must stay as it is"
                )
            collected.extend(_detached_from(streams, auxiliary))
            norm = record.block.norm_after(part, 1)
            streams.update(CHANGED_STREAM[part], residual.detach(), 1, norm)
    if differentiable:
        module_tensors.note_stateful_buffers()
    return tuple(collected)


def rebuild(record: BlockRecord, streams: Streams) -> None:
    """Takes the streams from after the block to before it, without gradients."""
    with _surroundings_of_first_run(record, streams):
        for part in reversed(PARTS):
            _undo_part(record, part, streams, _graph_without_saved_tensors())


def second_run(
    record: BlockRecord, streams: Streams, grads: list[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Takes the streams from after the block to before it, and the gradients likewise.

    Args:
        grads: the gradients of the two streams after the block, then of its auxiliary tensors.
        needs: whether a gradient is needed of the two streams before the block, of each argument, and of each
            parameter.

    Returns:
        The gradients of the two streams before the block, of the arguments and of the parameters; None where
        they are not needed, or are zero.
    """
    stream_grads = list(grads[:2])
    input_grads: list[Tensor | None] = [None] * (len(needs) - 2)
    # Auxiliary tensors come in the order f's, g's; g runs first.
    auxiliary_grads = list(grads[2:])
    with _surroundings_of_first_run(record, streams) as aliases:
        inputs = [*record.arguments, *aliases]
        for part in reversed(PARTS):
            leaf, residual, auxiliary = _undo_part(record, part, streams, torch.enable_grad())
            auxiliary_tensors = tensors_of(auxiliary)
            start = len(auxiliary_grads) - len(auxiliary_tensors) if part == "g" else 0
            output_grads = [stream_grads[CHANGED_STREAM[part]], *auxiliary_grads[start:]]
            del auxiliary_grads[start:]
            # f needs what g's gradient adds to stream 0; only blocks before this one need f's.
            stream_leaves = [leaf] if part == "g" or any(needs[:2]) else []
            indices = [index for index, needed in enumerate(needs[2:]) if needed]
            leaves = [inputs[index] for index in indices]
            for index in record.parts[part].read_elsewhere:
                indices.append(len(record.arguments) + index)
                leaves.append(record.tensors.parameters[index])
            results = _gradients([residual, *auxiliary_tensors], output_grads, stream_leaves + leaves)
            if stream_leaves:
                read = READ_STREAM[part]
                stream_grads[read] = _sum(stream_grads[read], results.pop(0))
            for index, grad in zip(indices, results, strict=True):
                input_grads[index] = _sum(input_grads[index], grad)
    return [*stream_grads, *input_grads]


def _undo_part(
    record: BlockRecord, part: Part, streams: Streams, graph: AbstractContextManager[Any]
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Runs f or g again, within `graph`, and subtracts its residual from the stream that it changed.

    Returns the leaf that it read, the residual and the auxiliary results.
    """
    part_record = record.parts[part]
    if part_record.random is not None:
        part_record.random.restore()
    with torch.no_grad():
        for buffer, value in part_record.changed_buffers:
            buffer.copy_(value)
    leaf = streams.value(READ_STREAM[part]).detach().requires_grad_()
    with graph, remembering(part_record.remembered, replay=True):
        residual, auxiliary = _call_part(record, part, leaf, streams)
    after = part_record.random_digest_after
    if after is not None and after != RandomState([leaf, *record.arguments]).digest():
        raise RuntimeError(
            f"{part} of {record.name} drew other random numbers in its recomputation than in its forward "
            "pass, so its gradients would be wrong. Another thread drew from torch's global generator at the "
            "same time, or the part draws a different amount each time. Let threads draw from "
            "torch.Generators of their own, or lock around forward and backward"
        )
    streams.update(CHANGED_STREAM[part], residual.detach(), -1, record.block.norm_after(part, -1))
    return leaf, residual, auxiliary


def _call_part(
    record: BlockRecord, part: Part, value: Tensor, streams: Streams
) -> tuple[Tensor, tuple[Any, ...]]:
    """f or g on a stream's value: the residual, checked, and whatever else it returned."""
    norm = record.block.norm_of(part)
    normed = None if norm is None else streams.normed(READ_STREAM[part], norm)
    args, kwargs = record.constants.fill(record.arguments)
    with record.autocast.applied():
        residual, auxiliary = record.block.call_part(part, value, args, kwargs, normed)
    what = f"{part} of {record.name}"
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


@contextlib.contextmanager
def _surroundings_of_first_run(record: BlockRecord, streams: Streams) -> Iterator[list[Tensor]]:
    """A context for a second run; gives the aliases that stand for the parameters."""
    record.tensors.check_unchanged(record.name)
    for argument, expected in zip(record.arguments, record.argument_versions, strict=True):
        if version(argument) != expected:
            raise RuntimeError(
                f"an argument of shape {tuple(argument.shape)} of the sequence was changed in place between "
                "the forward pass and its backward; give the sequence a copy"
            )
    aliases = record.tensors.aliases()
    random_state = (
        random_state_preserved([*streams.tensors, *record.arguments])
        if record.random_states is not None
        else contextlib.nullcontext()
    )
    with random_state, record.tensors.replaced_by(aliases, again=True):
        yield aliases


def _detached_from(streams: Streams, auxiliary: Sequence[Any]) -> list[Any]:
    """The auxiliary results without their graph, copied where they share memory with the streams."""
    memory = {tensor.untyped_storage().data_ptr() for tensor in streams.shared_memory()}

    def detach(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        shares = item.untyped_storage().data_ptr() in memory
        copy = item.detach().clone() if shares else item.detach()
        return copy.requires_grad_(item.requires_grad)

    return [pytree.tree_map(detach, item) for item in auxiliary]


def _check_leaves(
    what: str, outputs: Sequence[Tensor], known: Sequence[Tensor], module_tensors: ModuleTensors
) -> list[int]:
    """Raises RuntimeError if gradients of `outputs` would end at tensors outside the block.

    Returns the indices of the parameters that they reach past their aliases.
    """
    known_ids = {id(tensor) for tensor in known}
    parameter_indices = {id(parameter): index for index, parameter in enumerate(module_tensors.parameters)}
    read_elsewhere = []
    for leaf in _graph_leaves(outputs):
        if id(leaf) in known_ids:
            continue
        if id(leaf) not in parameter_indices:
            raise RuntimeError(
                f"{what} uses a tensor of shape {tuple(leaf.shape)} that requires a gradient (or was "
                "computed from one) but is neither its input, nor an argument, nor a parameter of the block, "
                "so its gradient would be lost. Pass it to the sequence as an argument, register it in the "
                "module, or detach it"
            )
        read_elsewhere.append(parameter_indices[id(leaf)])
    return read_elsewhere


def _graph_leaves(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors that the autograd graph of `outputs` reaches, outputs that are leaves included."""
    leaves: dict[int, Tensor] = {}
    visited = set()
    stack = []
    for output in outputs:
        if output.grad_fn is not None:
            stack.append(output.grad_fn)
        elif output.requires_grad:
            leaves[id(output)] = output
    while stack:
        node = stack.pop()
        if node in visited:
            continue
        visited.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves[id(node.variable)] = node.variable  # type: ignore[attr-defined]
            continue
        stack.extend(following for following, _ in node.next_functions if following is not None)
    return list(leaves.values())


@contextlib.contextmanager
def _graph_without_saved_tensors() -> Iterator[None]:
    """A context in which autograd records a graph, to be looked at and thrown away, but saves no tensors.

    Several torch functions choose their kernel by whether a gradient is needed. So a first run takes the same
    kernels as the second one, which differentiates, with the memory of a run without gradients.
    """
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_drop_tensor, _refuse_dropped_tensor):
        yield


def _drop_tensor(tensor: Tensor) -> None:
    return None


def _refuse_dropped_tensor(dropped: None) -> Tensor:
    raise RuntimeError(
        "a module inside a ReversibleSequence computed a gradient in its own forward pass, which is not "
        "supported"
    )


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
