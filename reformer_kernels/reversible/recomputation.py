"""What a recomputation must put back so that a module's second run equals its first.

That is the state of the random number generators (`RandomState`), autocast's settings (`AutocastState`), and
the parameters, the buffers and the training modes that the first run used (`ModuleTensors`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomStateStore:
    """Room for the states of the CPU's generator that a run keeps, made before the first block runs.

    A state takes 5 KB and lives until backward. Allocated one by one, between activations of megabytes that
    are freed, they would keep the heap from giving those megabytes back: with 48 layers the process grew by
    hundreds of MiB.
    """

    __slots__ = ("_rows", "_used")

    def __init__(self, count: int) -> None:
        size = torch.get_rng_state().numel()
        self._rows = torch.empty((max(1, count), size), dtype=torch.uint8, device="cpu")
        self._used = 0

    def keep(self) -> Tensor:
        """The generator's present state, in a row of the store."""
        if self._used == self._rows.shape[0]:
            self._rows, self._used = torch.empty_like(self._rows), 0
        row = self._rows[self._used].copy_(torch.get_rng_state())
        self._used += 1
        return row


class RandomState:
    """The state of torch's random number generators: the CPU's, and those of the devices of `tensors`.

    With a `store` the CPU's is kept there.
    """

    __slots__ = ("cpu", "device_type", "devices", "states")

    def __init__(self, tensors: Sequence[Tensor], store: RandomStateStore | None = None) -> None:
        self.cpu = torch.get_rng_state() if store is None else store.keep()
        self.device_type = next(
            (t.device.type for t in tensors if t.device.type not in ("cpu", "meta")), None
        )
        self.devices: list[int] = []
        self.states: list[Tensor] = []
        if self.device_type is not None:
            self.devices, self.states = get_device_states(*tensors)

    def digest(self) -> bytes:
        """A hash of the state, for comparison at a fraction of its 5 KB."""
        hashed = hashlib.blake2b(digest_size=16)
        for state in (self.cpu, *self.states):
            hashed.update(state.numpy().tobytes())  # generator states are always on the CPU
        return hashed.digest()

    def restore(self) -> None:
        torch.set_rng_state(self.cpu.clone())  # torch reads a view from the start of its storage
        if self.device_type is not None:
            set_device_states(self.devices, self.states, device_type=self.device_type)


@contextlib.contextmanager
def random_state_preserved(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Puts torch's generators back to their present state at the end, also after an exception."""
    before = RandomState(tensors)
    try:
        yield
    finally:
        before.restore()


class AutocastState:
    """The present settings of autocast, for the CPU and for one device."""

    __slots__ = ("settings",)

    def __init__(self, device: torch.device) -> None:
        device_types = ["cpu"] if device.type in ("cpu", "meta") else ["cpu", device.type]
        self.settings = [
            (device_type, torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type))
            for device_type in device_types
        ]

    @property
    def enabled(self) -> bool:
        return any(enabled for _, enabled, _ in self.settings)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """A context with autocast as it was when this was made, but without its cache of cast weights.

        A reversible block runs on aliases of its parameters, each used for one run only: cached casts would
        never be used again, and would hold a second copy of every weight until autocast ends.
        """
        with contextlib.ExitStack() as stack:
            for device_type, enabled, dtype in self.settings:
                if enabled or torch.is_autocast_enabled(device_type):
                    stack.enter_context(
                        torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)
                    )
            yield


class ModuleTensors:
    """The parameters, buffers and training modes of a module and its submodules, as they are before a run.

    Attributes:
        parameters: each parameter once, shared ones too.
        owners: the module, the name and the index in `parameters` of each registration of a parameter.
        buffers: the module, the name, the buffer and its version.
        modes: each module, and whether it was in training mode.
        stateful: the buffers that the first run changes, see `note_stateful_buffers`.
        versions: the version of each parameter.
    """

    __slots__ = ("buffers", "modes", "owners", "parameters", "stateful", "versions")

    def __init__(self, module: nn.Module) -> None:
        indices: dict[int, int] = {}
        self.parameters: list[Tensor] = []
        self.owners: list[tuple[nn.Module, str, int]] = []
        self.buffers: list[tuple[nn.Module, str, Tensor, int]] = []
        self.modes: list[tuple[nn.Module, bool]] = []
        for submodule in module.modules():
            self.modes.append((submodule, submodule.training))
            for name, parameter in submodule._parameters.items():
                if parameter is None:
                    continue
                if nn.parameter.is_lazy(parameter):
                    raise ValueError(
                        f"parameter {name!r} of {type(submodule).__name__} has no shape yet: run lazy "
                        "modules once on an example before they go into a ReversibleSequence"
                    )
                index = indices.setdefault(id(parameter), len(self.parameters))
                if index == len(self.parameters):
                    self.parameters.append(parameter)
                self.owners.append((submodule, name, index))
            for name, buffer in submodule._buffers.items():
                if buffer is not None:
                    self.buffers.append((submodule, name, buffer, version(buffer)))
        self.versions = [version(parameter) for parameter in self.parameters]
        self.stateful: list[Tensor] = []

    def note_stateful_buffers(self) -> None:
        """To be called after the first run: the second run must leave what it changed as it is."""
        self.stateful = [
            buffer
            for submodule, _, buffer, before in self.buffers
            # The running statistics of batch norm change without a change of version.
            if version(buffer) != before or isinstance(submodule, nn.modules.batchnorm._NormBase)
        ]

    @contextlib.contextmanager
    def buffers_kept(self, changed: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """A context for a part of the first run; adds each buffer that it changes, and its old value.

        Copies of the others live no longer than the run.
        """
        before = [(buffer, version(buffer), buffer.detach().clone()) for _, _, buffer, _ in self.buffers]
        yield
        changed += [(buffer, value) for buffer, expected, value in before if version(buffer) != expected]

    def check_unchanged(self, what: str) -> None:
        """Raises RuntimeError if a parameter, or a buffer that the first run only read, was changed since."""
        for parameter, expected in zip(self.parameters, self.versions, strict=True):
            if version(parameter) != expected:
                raise RuntimeError(
                    f"a parameter of {what}, shape {tuple(parameter.shape)}, was changed in place between "
                    f"the forward pass and its backward (version {version(parameter)}, expected {expected}): "
                    "call backward before the optimizer steps"
                )
        own = {id(buffer) for buffer in self.stateful}
        for submodule, name, buffer, expected in self.buffers:
            if id(buffer) not in own and version(buffer) != expected:
                raise RuntimeError(
                    f"buffer {name!r} of {type(submodule).__name__} in {what} was changed in place between "
                    "the forward pass and its backward, so that recomputation would give wrong gradients: "
                    "change it after backward, or assign a new tensor to it"
                )

    def aliases(self) -> list[Tensor]:
        """Leaf tensors that share the parameters' memory.

        Gradients of a run on aliases do not reach the hooks and the `.grad` of the parameters themselves:
        the outer graph delivers them there, once.
        """
        return [_alias(parameter) for parameter in self.parameters]

    @contextlib.contextmanager
    def replaced_by(self, aliases: Sequence[Tensor], *, again: bool) -> Iterator[None]:
        """A context in which the module uses `aliases` and, when it runs `again`, the first run's state.

        That state is the buffers and the training mode of each submodule. A mode that was changed since, as
        by `model.eval()`, is put back at the end.
        """
        before: list[tuple[dict[str, Any], str, Any, Any]] = []
        changed_modes: list[nn.Module] = []
        saved = [(buffer, buffer.clone()) for buffer in self.stateful] if again else []
        try:
            for submodule, name, index in self.owners:
                before.append((submodule._parameters, name, submodule._parameters[name], aliases[index]))
                submodule._parameters[name] = aliases[index]  # type: ignore[assignment]
            if again:
                for submodule, training in self.modes:
                    if submodule.training != training:
                        changed_modes.append(submodule)
                        submodule.training = training
                for submodule, name, buffer, _ in self.buffers:
                    before.append((submodule._buffers, name, submodule._buffers[name], None))
                    submodule._buffers[name] = buffer
            yield
        finally:
            for submodule in changed_modes:
                submodule.training = not submodule.training
            for table, name, old, alias in before:
                # A parameter that the module itself replaced during the run is its new state.
                if alias is None or table.get(name) is alias:
                    table[name] = old
            with torch.no_grad():
                for buffer, value in saved:
                    buffer.copy_(value)


def version(tensor: Tensor) -> int:
    """The number of changes in place so far; 0 for inference tensors, which do not count them."""
    return 0 if tensor.is_inference() else tensor._version


def _alias(parameter: Tensor) -> Tensor:
    if not parameter.requires_grad:
        return parameter
    alias = parameter.detach()
    if isinstance(parameter, nn.Parameter):
        return nn.Parameter(alias)
    return alias.requires_grad_()
