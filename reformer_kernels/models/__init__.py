"""Whole models: the encoder, the language model, the encoder-decoder, task heads and generation."""

from reformer_kernels.models.config import ReformerConfig
from reformer_kernels.models.encoder_decoder import ReformerEncoderDecoder
from reformer_kernels.models.heads import ReformerClassifier, ReformerQuestionAnswering
from reformer_kernels.models.reformer import Reformer, ReformerLM

__all__ = [
    "Reformer",
    "ReformerClassifier",
    "ReformerConfig",
    "ReformerEncoderDecoder",
    "ReformerLM",
    "ReformerQuestionAnswering",
]
