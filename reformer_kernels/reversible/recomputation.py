"""What a recomputation must put back so that a module's second run equals its first.

Used by the reversible layers: the random-number state and autocast as they were (`Ambient`), the parameters
that the first run used (`Parameters`), values that a module asked to keep (`remember`), and the check that
nothing outside these feeds gradients into the module (`foreign_leaves`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

T = TypeVar("T")


class RandomState:
    """The state of torch's generators: the CPU's, and those of the devices that hold `tensors`."""

    __slots__ = ("cpu", "device_type", "devices", "states")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.cpu = torch.get_rng_state()
        self.device_type = next(
            (t.device.type for t in tensors if t.device.type not in ("cpu", "meta")), None
        )
        self.devices: list[int] = []
        self.states: list[Tensor] = []
        if self.device_type is not None:
            self.devices, self.states = get_device_states(*tensors)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device_type is not None:
            set_device_states(self.devices, self.states, device_type=self.device_type)


@contextlib.contextmanager
def random_state_preserved(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Leaves torch's generators as they were, however the body ends."""
    before = RandomState(tensors)
    try:
        yield
    finally:
        before.restore()


class AutocastState:
    """Autocast's settings for the CPU and for one device."""

    __slots__ = ("settings",)

    def __init__(self, device: torch.device) -> None:
        kinds = ["cpu"] if device.type in ("cpu", "meta") else ["cpu", device.type]
        self.settings = [
            (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds
        ]

    @property
    def enabled(self) -> bool:
        return any(enabled for _, enabled, _ in self.settings)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Autocast as it was when this was made, without its cache of cast weights.

        A reversible block runs on aliases of its parameters, each used for one run: cached casts would never
        be found again and would hold a second copy of every weight until autocast ends.
        """
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.settings:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                    )
            yield


class Parameters:
    """A module's parameters and buffers as one run of it found them, and their places.

    `distinct` lists each parameter once, shared ones too.
    """

    __slots__ = ("buffers", "distinct", "places", "stateful", "versions")

    def __init__(self, module: nn.Module) -> None:
        index: dict[int, int] = {}
        self.distinct: list[Tensor] = []
        self.places: list[tuple[nn.Module, str, int]] = []
        self.buffers: list[tuple[nn.Module, str, Tensor, int]] = []
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is None:
                    continue
                if nn.parameter.is_lazy(parameter):
                    raise ValueError(
                        f"parameter {name!r} of {type(part).__name__} has no shape yet: run lazy modules "
                        "once on an example before they go into a ReversibleSequence"
                    )
                number = index.setdefault(id(parameter), len(self.distinct))
                if number == len(self.distinct):
                    self.distinct.append(parameter)
                self.places.append((part, name, number))
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    self.buffers.append((part, name, buffer, version(buffer)))
        self.versions = [version(parameter) for parameter in self.distinct]
        self.stateful: list[Tensor] = []

    def note_stateful_buffers(self) -> None:
        """Call after the first run: buffers that it changed must survive a second run unchanged."""
        self.stateful = [
            buffer
            for part, _, buffer, before in self.buffers
            # Running statistics change without being counted.
            if version(buffer) != before or isinstance(part, nn.modules.batchnorm._NormBase)
        ]

    def check_unchanged(self, what: str) -> None:
        for parameter, expected in zip(self.distinct, self.versions, strict=True):
            if version(parameter) != expected:
                raise RuntimeError(
                    f"a parameter of {what}, shape {tuple(parameter.shape)}, was changed in place between "
                    f"the forward pass and its backward (version {version(parameter)}, expected {expected}): "
                    "call backward before the optimizer steps"
                )

    def aliases(self) -> list[Tensor]:
        """Leaves that share the parameters' memory.

        Gradients of a run on aliases reach neither the hooks nor the `.grad` of the parameters themselves:
        the outer graph delivers them there, once.
        """
        return [_alias(parameter) for parameter in self.distinct]

    @contextlib.contextmanager
    def replaced_by(self, aliases: Sequence[Tensor], *, buffers: bool) -> Iterator[None]:
        """The module computes with `aliases`; with `buffers`, also with the first run's buffers."""
        before: list[tuple[dict[str, Any], str, Any, Any]] = []
        kept = [(buffer, buffer.clone()) for buffer in self.stateful] if buffers else []
        try:
            for part, name, number in self.places:
                before.append((part._parameters, name, part._parameters[name], aliases[number]))
                part._parameters[name] = aliases[number]  # type: ignore[assignment]
            if buffers:
                for part, name, buffer, _ in self.buffers:
                    before.append((part._buffers, name, part._buffers[name], None))
                    part._buffers[name] = buffer
            yield
        finally:
            for table, name, old, alias in before:
                # A parameter that the module replaced on its own is the module's new state.
                if alias is None or table.get(name) is alias:
                    table[name] = old
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)


def version(tensor: Tensor) -> int:
    """Counts in-place changes; 0 for inference tensors, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _alias(parameter: Tensor) -> Tensor:
    if not parameter.requires_grad:
        return parameter
    alias = parameter.detach()
    if isinstance(parameter, nn.Parameter):
        return nn.Parameter(alias)
    return alias.requires_grad_()


def graph_leaves(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors that the autograd graph of `outputs` reaches, outputs that are leaves included."""
    leaves: dict[int, Tensor] = {}
    seen = set()
    stack = []
    for output in outputs:
        if output.grad_fn is not None:
            stack.append(output.grad_fn)
        elif output.requires_grad:
            leaves[id(output)] = output
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            leaves[id(node.variable)] = node.variable  # type: ignore[attr-defined]
            continue
        stack.extend(following for following, _ in node.next_functions if following is not None)
    return list(leaves.values())


@contextlib.contextmanager
def graph_without_memory() -> Iterator[None]:
    """Autograd records, and saves nothing: for a run whose graph is looked at and thrown away.

    So a first run takes the same kernels as the second one, which differentiates, at the memory of a run
    without gradients (several torch functions choose their kernel by whether a gradient is needed).
    """
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_forget, _forgotten):
        yield


def _forget(tensor: Tensor) -> None:
    return None


def _forgotten(nothing: None) -> Tensor:
    raise RuntimeError(
        "a module inside a ReversibleSequence computed a gradient in its own forward pass, which is not "
        "supported"
    )


class Kept:
    """Values that a module's first run asked to keep with `remember`, in order."""

    __slots__ = ("position", "values")

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.position = 0


_active = threading.local()


@contextlib.contextmanager
def keeping(kept: Kept | None, *, again: bool) -> Iterator[None]:
    """Within, `remember` records into `kept` or, where `again`, replays from it. None: it just computes."""
    before = getattr(_active, "current", None)
    if kept is not None:
        kept.position = 0
    _active.current = None if kept is None else (kept, again)
    try:
        yield
    finally:
        _active.current = before


def is_keeping() -> bool:
    """Whether `remember` keeps anything in this call."""
    return getattr(_active, "current", None) is not None


def remember(make: Callable[[], T]) -> T:
    """`make()`, or in a recomputation the value that it gave in the first run.

    For discrete choices (hash layouts) that a rounding error in a rebuilt activation could flip. Only a
    `ReversibleSequence` made with `keep_layouts=True` keeps them; elsewhere this is `make()`. What is kept
    must carry no gradient.
    """
    current = getattr(_active, "current", None)
    if current is None:
        return make()
    kept, again = current
    if again:
        value = kept.values[kept.position]
        kept.position += 1
        return value
    value = make()
    kept.values.append(value)
    return value
