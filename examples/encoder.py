"""Put LSH attention into an existing `nn.TransformerEncoder` in the middle of its training.

    python examples/encoder.py            # 8192 tokens; about two minutes on two cores
    python examples/encoder.py --small    # a few seconds

The encoder guesses hidden bytes of Python's source. It starts on short sequences with full attention; then
`replace_attention` changes its layers in place, and the same weights and optimizer go on with long sequences.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer_kernels import LSHConfig, replace_attention
from reformer_kernels.modules import SinusoidalPositionalEmbedding

HIDDEN = 256
"""The token that stands for a hidden byte."""


class MaskedByteModel(nn.Module):
    """Any encoder would do: there is nothing of this package in it but the positions."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(HIDDEN + 1, width)
        self.positions = SinusoidalPositionalEmbedding(width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.positions(tokens.shape[1])))


def train(
    model: MaskedByteModel, optimizer: torch.optim.Optimizer, text: Tensor, length: int, steps: int, name: str
) -> None:
    start, losses = time.perf_counter(), []
    for _ in range(steps):
        offset = int(torch.randint(len(text) - length, ()))
        target = text[None, offset : offset + length]
        hidden = torch.rand(target.shape) < 0.15
        loss = F.cross_entropy(model(target.masked_fill(hidden, HIDDEN))[hidden], target[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / math.log(2))
    seconds, last = (time.perf_counter() - start) / steps, losses[-5:]
    print(f"{name}, {length} tokens: {sum(last) / len(last):.2f} bits a hidden byte, {seconds:.2f} s a step")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    short, long, width, layers = (64, 512, 32, 1) if small else (512, 8192, 128, 2)

    torch.manual_seed(0)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8).long()
    model = MaskedByteModel(width, heads=4, layers=layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    train(model, optimizer, text, short, 3 if small else 100, "full attention")
    train(model, optimizer, text, long, 1 if small else 3, "full attention")

    x = torch.randint(256, (1, short))
    before = model(x)
    print(replace_attention(model, config=LSHConfig(n_hashes=4), full_attention_threshold=short))
    assert torch.allclose(model(x), before, atol=1e-5), "up to the threshold nothing changes"
    train(model, optimizer, text, long, 2 if small else 20, "LSH attention")


if __name__ == "__main__":
    main()
