"""The predicted times of the shapes that are timed, so that they stand beside the measured ones.

Kernels are compiled, and their machine code is read, in a process that is not Triton's interpreter. Its
answers are kept in a file beside the results.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reformer_kernels._files import write_atomically
from reformer_kernels.gpu import machine_code
from reformer_kernels.gpu.architectures import architecture_of
from reformer_kernels.gpu.cost_model import Shape
from reformer_kernels.gpu.machine_code import MachineCode
from reformer_kernels.gpu.prediction import SHARES, PassTime, predict_call
from reformer_kernels.gpu.specializations import Specialization
from validation.calls import BOTH, FORWARD, dtype_of, shape_of
from validation.context import Context, Row, attempt

PASSES = {
    ("attend", FORWARD): ("attention_forward",),
    ("attend", BOTH): ("attention_forward", "attention_backward"),
    ("lsh_attention", FORWARD): ("hash", "sort", "attention_forward"),
    ("lsh_attention", BOTH): ("hash", "sort", "attention_forward", "attention_backward"),
    ("local", FORWARD): ("attention_forward",),
    ("local", BOTH): ("attention_forward", "attention_backward"),
    ("lsh_hash", None): ("hash",),
    ("bucket_sort", None): ("sort",),
}
"""The passes of each timed operation and phase."""


def questions(context: Context) -> list[tuple[str, Shape]]:
    """The kinds of attention and shapes that the timed steps take."""
    if context.dry_run:
        return [("local", dataclasses.replace(shape_of(context), n_hashes=1))]
    lengths = (16384, 65536, 1024, 2048, 3072, 4096)
    listed = [("paper", Shape(length=length)) for length in lengths]
    listed += [
        ("paper", Shape(n_hashes=1)),
        ("paper", Shape(head_dim=128)),
        ("paper", Shape(chunk_length=128)),
    ]
    listed += [("paper", Shape(bits=32)), ("paper", Shape(heads=1, length=2**20))]
    return [*listed, ("trax", Shape()), ("bucket", Shape()), ("local", Shape(n_hashes=1))]


def prediction_steps(context: Context) -> Iterator[Row]:
    """Predicts the time of every pass of every shape, in a process that compiles."""

    def ask() -> Row:
        architecture = "sm_90" if context.dry_run else architecture_of(context.device)
        asked = [{"preset": preset, **dataclasses.asdict(shape)} for preset, shape in questions(context)]
        done = subprocess.run(
            [sys.executable, "-m", "validation.predicted", architecture],
            input=json.dumps(asked),
            env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
            | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return {"ok": False, "reason": done.stderr[-600:]}
        write_atomically(predictions_file(context), done.stdout)
        return {"shapes": len(asked), "architecture": architecture}

    yield attempt("predictions", ask)


def predictions_file(context: Context) -> Path:
    return Path(context.folder) / f"{context.name}-predictions.json"


class Predictions:
    """The answers of `prediction_steps`, to be looked up by what was timed."""

    def __init__(self, context: Context) -> None:
        file = predictions_file(context)
        self.rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []

    def of(self, operation: str, phase: str | None, preset: str | None, shape: Shape) -> Row:
        """The predicted microseconds at each share of the perfect rate of issue; empty where not known."""
        names = PASSES.get((operation, phase))
        asked = {"preset": preset, **dataclasses.asdict(shape)}
        found = next((row for row in self.rows if row["asked"] == asked), None)
        if names is None or found is None:
            return {}
        return {
            f"predicted_us_at_{100 * share:.0f}%": round(
                1e6 * sum(found["passes"].get(name, {}).get(str(share), 0.0) for name in names), 2
            )
            for share in SHARES
        }


def main() -> None:
    """Answers the questions on standard input, for the architecture that is the argument."""
    architecture = sys.argv[1]
    codes: dict[Specialization, MachineCode] = {}

    def read(specialization: Specialization) -> MachineCode:
        if specialization not in codes:
            codes[specialization] = machine_code.read(specialization)
        return codes[specialization]

    answers = []
    for asked in json.load(sys.stdin):
        fields = dict(asked)
        preset = fields.pop("preset")
        shape = Shape(**fields)
        passes: list[PassTime] = predict_call(shape, dtype_of(shape), preset, architecture, read)
        answers.append(
            {
                "asked": asked,
                "passes": {
                    one.name: {str(share): one.device_seconds(share) for share in SHARES} for one in passes
                },
                "instructions": {
                    kernel.kernel: kernel.instructions for one in passes for kernel in one.kernels
                },
            }
        )
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
