"""The encoder-decoder: a causal decoder that attends to what an encoder made of the source."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reformer_kernels.models.config import ReformerConfig
from reformer_kernels.models.encoder import Reformer
from reformer_kernels.models.evaluation import evaluation_copy
from reformer_kernels.models.files import Saveable
from reformer_kernels.models.language_model import ReformerLM


class ReformerEncoderDecoder(Saveable):
    """A `Reformer` over the source, and a `ReformerLM` over the target whose layers attend to it.

    Args:
        encoder: the configuration of the encoder, not causal.
        decoder: the configuration of the decoder, causal, with cross_attention "full" or "lsh". With "lsh",
            the windows of a target token on the source follow the ratio of source and target lengths. They
            depend on how long the target is (not on what later tokens are), so `generate` refuses it.

    Raises:
        ValueError: the two configurations do not fit each other.

    >>> sizes = {"vocab_size": 50, "d_model": 32, "layers": ("lsh",), "num_heads": 2}
    >>> model = ReformerEncoderDecoder(
    ...     ReformerConfig(**sizes), ReformerConfig(**sizes, causal=True, cross_attention="full")
    ... )
    >>> source, target = torch.zeros(1, 90, dtype=torch.int64), torch.zeros(1, 20, dtype=torch.int64)
    >>> model(source, target).shape, model(source, target, labels=target).shape
    (torch.Size([1, 20, 50]), torch.Size([]))
    """

    def __init__(self, encoder: ReformerConfig, decoder: ReformerConfig) -> None:
        super().__init__()
        if encoder.causal or encoder.cross_attention is not None:
            raise ValueError("the encoder must have causal=False and cross_attention=None")
        if not decoder.causal or decoder.cross_attention is None:
            raise ValueError('the decoder must have causal=True and cross_attention="full" or "lsh"')
        if decoder.size_of_memory != encoder.d_out:
            raise ValueError(
                f"the decoder expects a memory of width {decoder.size_of_memory}, the encoder's is "
                f"{encoder.d_out}; give the decoder memory_dim={encoder.d_out}"
            )
        self.encoder = Reformer(encoder)
        self.decoder = ReformerLM(decoder)

    def config_dict(self) -> dict[str, Any]:
        return {"encoder": self.encoder.config_dict(), "decoder": self.decoder.config_dict()}

    @classmethod
    def from_config_dict(cls, config: dict[str, Any]) -> ReformerEncoderDecoder:
        sides = (ReformerConfig.from_dict(config[side]) for side in ("encoder", "decoder"))
        return cls(*sides)

    def tie_weights(self) -> None:
        self.decoder.tie_weights()

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        *,
        labels: Tensor | None = None,
        shift_labels: bool | None = None,
        source_padding_mask: Tensor | None = None,
        target_padding_mask: Tensor | None = None,
        n_hashes: int | None = None,
    ) -> Tensor:
        """Compute the logits of the target's next tokens, or the loss where labels are given.

        Args:
            source: (B, L_s) int64, of any length.
            target: (B, L) int64, of any length.
            labels, shift_labels: as for `ReformerLM`.
            source_padding_mask: (B, L_s) bool, True = padding.
            target_padding_mask: (B, L) bool, True = padding.
            n_hashes: hash rounds of all LSH layers in this call; None takes the configurations'.

        Returns:
            logits (B, L, V); with labels, the mean cross entropy in nats, a float32 scalar.
        """
        memory = self.encoder(source, key_padding_mask=source_padding_mask, n_hashes=n_hashes)
        out: Tensor = self.decoder(
            target,
            labels=labels,
            shift_labels=shift_labels,
            key_padding_mask=target_padding_mask,
            n_hashes=n_hashes,
            memory=memory,
            memory_padding_mask=source_padding_mask,
        )
        return out

    def generate(
        self,
        source: Tensor,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        source_padding_mask: Tensor | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Continue each row of the target `prompt` (B, L), given the source: see `generation.generate`.

        Needs cross_attention "full". The source is encoded once, with `source_padding_mask` as in the call.
        """
        with torch.no_grad():
            memory = evaluation_copy(self.encoder)(source, key_padding_mask=source_padding_mask)
        return self.decoder.generate(
            prompt, max_new_tokens, memory=memory, memory_padding_mask=source_padding_mask, **options
        )
