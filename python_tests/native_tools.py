"""Helpers of the tests of native operators, which `reformer_kernels.testing` shares with bench/."""

from reformer_kernels.testing import isa, poisoned_memory, runnable_isas, torch_threads

__all__ = ["isa", "poisoned_memory", "runnable_isas", "torch_threads"]
