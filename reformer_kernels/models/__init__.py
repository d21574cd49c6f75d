"""Whole models: the encoder, the language model, the encoder-decoder, task heads and generation."""

from reformer_kernels.models.config import ReformerConfig
from reformer_kernels.models.encoder import Reformer
from reformer_kernels.models.encoder_decoder import ReformerEncoderDecoder
from reformer_kernels.models.files import CheckpointError
from reformer_kernels.models.generation import Decoder
from reformer_kernels.models.heads import ReformerClassifier, ReformerQuestionAnswering
from reformer_kernels.models.language_model import ReformerLM

__all__ = [
    "CheckpointError",
    "Decoder",
    "Reformer",
    "ReformerClassifier",
    "ReformerConfig",
    "ReformerEncoderDecoder",
    "ReformerLM",
    "ReformerQuestionAnswering",
]
