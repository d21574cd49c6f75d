"""Hugging Face Reformers: run our kernels in a loaded model, or read and write its checkpoints.

Only `accelerate` and `restore` import transformers, when they are called.
"""

from reformer_kernels.hf.acceleration import accelerate, restore
from reformer_kernels.hf.checkpoint import from_pretrained, save_pretrained
from reformer_kernels.hf.conversion import load_state_dict, state_dict

__all__ = [
    "accelerate",
    "from_pretrained",
    "load_state_dict",
    "restore",
    "save_pretrained",
    "state_dict",
]
