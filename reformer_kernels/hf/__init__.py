"""Hugging Face Reformer models: put the kernels under a loaded model, in place.

Nothing here imports transformers before a function that needs it is called.
"""

from .acceleration import Acceleration, accelerate, restore

__all__ = ["Acceleration", "accelerate", "restore"]
