"""Train a byte-level language model with LSH attention, save it, and let it write.

    python examples/train_bytes.py                    # Python's own source; about 5 minutes on two cores
    python examples/train_bytes.py --text FOLDER      # your own text files
    python examples/train_bytes.py --small            # a few seconds, to see that it runs

Local layers see what is near, LSH layers find what is alike, wherever it is. Memory grows neither with depth
nor with the vocabulary: layers are reversible and the loss is computed in chunks.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor

from reformer_kernels import LSHConfig, ReformerConfig, ReformerLM


def read_bytes(folder: Path) -> Tensor:
    """All Python and text files of a folder (or one file), one after another, as numbers 0 to 255."""
    files = [folder] if folder.is_file() else sorted([*folder.glob("*.py"), *folder.glob("*.txt")])
    data = b"\n".join(file.read_bytes() for file in files)
    if not data:
        raise SystemExit(f"no text in {folder}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--output", type=Path, default=Path("bytes-model"), help="a folder for the model")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    length, width, layers, steps = (256, 64, 2, 5) if arguments.small else (4096, 256, 4, 150)

    torch.manual_seed(0)
    text = read_bytes(arguments.text)
    split = len(text) * 9 // 10
    training, held_out = text[:split], text[split : split + 4 * length]
    config = ReformerConfig(
        vocab_size=256,
        d_model=width,
        layers=("local", "lsh") * (layers // 2),
        causal=True,
        lsh=LSHConfig(n_hashes=4, window="bucket"),  # the same function in training and in generation
        max_length=length,
        token_context=4,  # an embedding holds the three bytes before its own too
    )
    model = ReformerLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} million parameters, {len(text) / 1e6:.1f} million bytes of text")

    start = time.perf_counter()
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, step / 20) * (1 - 0.9 * step / steps)
        offset = int(torch.randint(len(training) - length, ()))
        tokens = training[None, offset : offset + length]
        loss = model(tokens, labels=tokens)  # labels are shifted by the model
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // 15) == 0:
            seconds = time.perf_counter() - start
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits per byte, {seconds:.0f} s", flush=True)

    model.save(arguments.output)
    model = ReformerLM.load(arguments.output).eval()
    with torch.no_grad():
        losses = [float(model(part[None], labels=part[None])) for part in held_out.split(length)]
    print(f"held-out text: {sum(losses) / len(losses) / math.log(2):.3f} bits per byte")
    prompt = torch.tensor([list(b"def main(")])
    (new,) = model.generate(prompt, 20 if arguments.small else 200, temperature=0.8)
    print("def main(" + bytes(new.tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
