"""Put the kernels under a Reformer of Hugging Face transformers, and see that only its speed changes.

    python examples/accelerate_hugging_face.py            # 4096 tokens; under a minute on two cores
    python examples/accelerate_hugging_face.py --small    # a few seconds

Needs transformers: pip install transformers
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from torch import Tensor
from transformers import ReformerConfig, ReformerModelWithLMHead

from reformer_kernels import hf


def make_model(length: int) -> ReformerModelWithLMHead:
    """Random weights; `ReformerModelWithLMHead.from_pretrained(folder)` would do as well.

    The hash seed is fixed and nothing is dropped out, so that two runs can be compared.
    """
    config = ReformerConfig(
        is_decoder=True,
        attn_layers=["local", "lsh"] * 2,
        num_hashes=4,
        hash_seed=0,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
        max_position_embeddings=length,
        axial_pos_shape=[length // 64, 64],
    )
    return ReformerModelWithLMHead(config).train()


def timed(model: ReformerModelWithLMHead, tokens: Tensor) -> tuple[Tensor, Tensor, float]:
    """Logits, the gradient of the word embeddings, and the seconds that both took."""
    model.zero_grad()
    start = time.perf_counter()
    out = model(tokens, labels=tokens)
    out.loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    return out.logits.detach(), gradient.clone(), time.perf_counter() - start


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    length = 256 if parser.parse_args().small else 4096

    torch.manual_seed(0)
    model = make_model(length)
    tokens = torch.randint(model.config.vocab_size, (1, length))
    logits, gradient, before = timed(model, tokens)
    print(hf.accelerate(model))
    fast_logits, fast_gradient, after = timed(model, tokens)
    print(f"logits differ by {difference(fast_logits, logits):.1e}", end=", ")
    print(f"gradients by {difference(fast_gradient, gradient):.1e}")
    print(f"forward and backward: {before:.2f} s before, {after:.2f} s after ({before / after:.1f}x)")

    hf.restore(model)  # the layers are transformers' own again
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ours = hf.from_pretrained(folder)  # the other way: a ReformerLM of this package
    print(f"{type(ours).__name__}: logits {tuple(ours(tokens[:, :77]).shape)}")


if __name__ == "__main__":
    main()
