"""Ctrl-C while the command line is still being imported ends the process at once and without a traceback.

Torch takes a second or two to import. Nothing is under way that Python could clean up, so the signal's own
default is right for that time; `begin` then gives Ctrl-C its usual meaning back. Only a process that runs the
command is touched, never a program that imports the package.
"""

from __future__ import annotations

import signal
import sys
from pathlib import PurePath

PACKAGE = "reformer_kernels"
SCRIPT = "reformer-kernels"


def is_command() -> bool:
    """Whether this process is the installed script or `python -m reformer_kernels`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # what Python sets while it looks for the module
        given = sys.orig_argv
        return PACKAGE in given and given[given.index(PACKAGE) - 1] == "-m"
    return PurePath(program).stem == SCRIPT


def begin() -> None:
    """Everything is imported: from here on Ctrl-C raises KeyboardInterrupt, as Python programs expect."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
