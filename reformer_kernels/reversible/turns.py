"""Runs of reversible blocks in several threads take turns.

A run puts aliases in the place of its module's parameters, and a recomputation puts back the module's
buffers, its training modes and torch's random number generators. All threads of a process see these, so a run
that overlapped another would read the wrong ones, and lose gradients or give wrong ones.
"""

from __future__ import annotations

import os
import threading


class _Turn:
    """A lock that a thread may take again while it holds it, as blocks within blocks do."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """To be called in a forked child, where a thread that held the lock does not exist."""
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


turn = _Turn()
"""A context manager: the body runs while no other thread is in one."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=turn.renew)
