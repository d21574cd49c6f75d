"""Hugging Face: LSH attention under any model; Reformers accelerated, their checkpoints read and written.

Only `accelerate`, `restore` and `register_attention` import transformers, when they are called.
"""

from reformer_kernels.hf.acceleration import accelerate, restore
from reformer_kernels.hf.attention_registry import AttentionOptions, register_attention
from reformer_kernels.hf.checkpoint import from_pretrained, save_pretrained
from reformer_kernels.hf.conversion import load_state_dict, state_dict

__all__ = [
    "AttentionOptions",
    "accelerate",
    "from_pretrained",
    "load_state_dict",
    "register_attention",
    "restore",
    "save_pretrained",
    "state_dict",
]
