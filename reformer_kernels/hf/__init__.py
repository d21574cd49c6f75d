"""Hugging Face Reformers: put our kernels under a loaded model, or read and write its checkpoints.

Nothing here imports transformers before `accelerate` or `restore` is called.
"""

from reformer_kernels.hf.acceleration import Acceleration, accelerate, restore
from reformer_kernels.hf.checkpoint import from_pretrained, save_pretrained
from reformer_kernels.hf.conversion import load_state_dict, state_dict

__all__ = [
    "Acceleration",
    "accelerate",
    "from_pretrained",
    "load_state_dict",
    "restore",
    "save_pretrained",
    "state_dict",
]
