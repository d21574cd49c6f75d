"""A process of `python -m bench.fuzz`: runs cases of one target, and keeps in a file which one it is at.

python -m bench.fuzz.worker TARGET CASES SEED_TEXT CURRENT_FILE RESULT_FILE
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from bench.fuzz.runner import fuzz, reproduction
from bench.fuzz.targets import TARGETS


def main() -> None:
    name, cases, seed_text, current, result = sys.argv[1:]
    target = TARGETS[name]

    def remember(case: object) -> None:
        Path(current).write_text(reproduction(target, case))

    outcome = fuzz(target, int(cases), seed_text, remember)
    Path(result).write_text(json.dumps(dataclasses.asdict(outcome)))


if __name__ == "__main__":
    main()
