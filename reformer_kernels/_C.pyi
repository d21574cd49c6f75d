# The compiled module. csrc/bindings.cpp defines it; csrc/kernels.h says what its structs and functions mean.
from typing import Any

def __getattr__(name: str) -> Any: ...
