"""Draws time against length, beside the peers, from one result of `reformer-kernels bench lsh`.

    python docs/plots.py bench/results/<machine>-<commit>-lsh-4hashes.json --longest 8192

The result needs several lengths (`--seq-lens 512,1024,...`) and the peers. It writes
images/time-against-length.svg, which README.md and the pages show.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

IMAGES = Path(__file__).parent / "images"

# Name in the result, label, colour, line: ours in blue and solid, peers in other colours.
LINES = (
    ("torch SDPA", "torch SDPA (full attention)", "#c62828", "--"),
    ("Hugging Face", "Hugging Face LSHSelfAttention", "#ef8f00", "--"),
    ("reformer_pytorch", "reformer_pytorch LSHAttention", "#6d4c41", "--"),
    ("trax()", "reformer-kernels, Hugging Face's rule", "#5c9ce6", "-"),
    ("paper()", "reformer-kernels, the paper's rule", "#0d47a1", "-"),
)


def tokens(length: float, _: Any = None) -> str:
    return f"{length / 1024:g}K" if length >= 1024 else f"{length:g}"


def seconds(value: float, _: Any = None) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(7.2, 3.9), layout="constrained")
    for name, title, colour, style in LINES:
        points = [(row["length"], row["median"]) for row in rows if row["name"] == name]
        axes.plot(*zip(*points, strict=True), style, color=colour, label=title, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(tokens))
    axes.yaxis.set_major_formatter(FuncFormatter(seconds))
    axes.set_xticks(sorted({row["length"] for row in rows}))
    axes.minorticks_off()
    axes.set_xlabel("sequence length in tokens")
    axes.set_ylabel("forward + backward")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--longest", type=int, help="draw no longer sequences than this")
    arguments = parser.parse_args()
    rows = [
        row
        for row in json.loads(arguments.result.read_text())["rows"]
        if row["phase"] == "forward+backward" and row["length"] <= (arguments.longest or row["length"])
    ]
    # The same file from the same numbers, so that a change shows in a diff.
    plt.rcParams.update({"svg.hashsalt": "reformer-kernels", "font.size": 10})
    draw(rows, IMAGES / "time-against-length.svg")


if __name__ == "__main__":
    main()
