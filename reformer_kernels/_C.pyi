# The compiled module: see csrc/bindings.cpp, and csrc/kernels.h for what its structs and functions mean.
from typing import Any

def __getattr__(name: str) -> Any: ...
