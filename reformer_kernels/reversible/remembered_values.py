"""Values that a recomputation takes over from the first run, such as the layouts of LSH attention."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class RememberedValues:
    """The values that one run of a module gave to `remember`, in order."""

    __slots__ = ("next_index", "values")

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.next_index = 0


_current = threading.local()


@contextlib.contextmanager
def remembering(values: RememberedValues | None, *, replay: bool) -> Iterator[None]:
    """A context in which `remember` adds to `values` or, with `replay`, returns them one after another.

    With None, `remember` only computes.
    """
    before = getattr(_current, "values_and_replay", None)
    if values is not None:
        values.next_index = 0
    _current.values_and_replay = None if values is None else (values, replay)
    try:
        yield
    finally:
        _current.values_and_replay = before


def is_remembering() -> bool:
    """Whether `remember` would keep or replay a value now."""
    return getattr(_current, "values_and_replay", None) is not None


def remember(make: Callable[[], T]) -> T:
    """`make()` in a first run; in a recomputation, the value that it returned in the first run.

    This is for discrete choices, such as the layouts of LSH attention, which a rounding error in a rebuilt
    activation could change. Only a `ReversibleSequence` made with `keep_layouts=True` keeps them; elsewhere
    the result is `make()`. The value must not carry a gradient, and `make` must not
    draw from torch's global generator, as the recomputation does not call it.
    """
    current = getattr(_current, "values_and_replay", None)
    if current is None:
        return make()
    remembered, replay = current
    if replay:
        value = remembered.values[remembered.next_index]
        remembered.next_index += 1
        return value
    value = make()
    remembered.values.append(value)
    return value
