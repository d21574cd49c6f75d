"""Looks for faults in the public functions and operators with random cases.

    python -m bench.fuzz                                      # 200 cases of everything
    python -m bench.fuzz --functions attend,lsh_hash --cases 10000 --log fuzz.json
    python -m bench.fuzz --minutes 30 --log fuzz.json         # goes on where fuzz.json ends

Results and gradients are compared with the reference in float64, attention also with an oracle that shares
no code with it; on every instruction set that this machine can run, with strides, dtypes, masks, zeros,
denormals, NaN and infinities of all kinds. Malformed calls must be refused with a message. A failure is
shrunk and printed as a test. Cases run in processes of their own: one that a case ends is a failure too. The
log has the counts of each function and is written after each piece. The exit code is 1 where a case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PIECE = 500
"""Cases of one process."""

SECONDS = 1800
"""How long a piece may take before its process is ended, and the case that it was at is a failure."""


WORKER = ("-X", "faulthandler", "-m", "bench.fuzz.worker")


class Log:
    """The counts of each function, in a file where one is asked for. Threads share it."""

    def __init__(self, path: Path | None, seed: int) -> None:
        self.path, self.lock = path, threading.Lock()
        self.content: dict[str, Any] = {"schema": 1, "seed": seed, "functions": {}}
        if path is not None and path.exists():
            self.content = json.loads(path.read_text())
            if self.content.get("seed") != seed:
                raise SystemExit(f"{path} was made with --seed {self.content.get('seed')}, got {seed}")
        self.content |= {"machine": _machine(), "commit": _commit()}

    def cases(self, name: str) -> int:
        return int(self.content["functions"].get(name, {}).get("cases", 0))

    def failed(self) -> list[str]:
        return [name for name, row in self.content["functions"].items() if "reproduction" in row]

    def add(self, name: str, outcome: dict[str, Any]) -> None:
        """A piece that failed adds no cases, so that the next run repeats it."""
        with self.lock:
            row = self.content["functions"].setdefault(name, {"cases": 0, "seconds": 0.0})
            row.pop("reason", None)
            row.pop("reproduction", None)
            row["seconds"] = round(row["seconds"] + outcome["seconds"], 1)
            if outcome["reason"]:
                row |= {"reason": outcome["reason"], "reproduction": outcome["reproduction"]}
            else:
                row["cases"] += outcome["cases"]
            if self.path is not None:
                beside = self.path.with_suffix(".tmp")
                beside.write_text(json.dumps(self.content, indent=1, sort_keys=True) + "\n")
                beside.replace(self.path)


def run_piece(name: str, cases: int, seed_text: str) -> dict[str, Any]:
    """The outcome of cases that run in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        current, result = Path(folder, "case"), Path(folder, "result")
        command = [sys.executable, *WORKER, name, str(cases), seed_text, str(current), str(result)]
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            ended, errors = f"the process ended with code {done.returncode}", done.stderr[-3000:]
        except subprocess.TimeoutExpired:
            ended, errors = f"no result within {SECONDS} s", ""
        if result.exists():
            return json.loads(result.read_text())
        return {
            "cases": 0,
            "seconds": time.perf_counter() - start,
            "reason": f"{ended}\n{errors}",
            "reproduction": current.read_text() if current.exists() else "no case had begun",
        }


def pieces(log: Log, name: str, cases: int, deadline: float) -> Iterator[tuple[int, str]]:
    """What is left of a function: cases of the next piece, and the text that seeds them."""
    while log.cases(name) < cases and time.monotonic() < deadline:
        done = log.cases(name)
        yield min(PIECE, cases - done), f"{log.content['seed']} {done}"


def _machine() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, {len(names)} cores"


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--functions", help="only these, separated by commas (--list shows all)")
    parser.add_argument("--list", action="store_true", help="show what there is, and end")
    parser.add_argument("--cases", type=int, help="cases of each function, those of the log included (200)")
    parser.add_argument("--minutes", type=float, help="end after this time, whatever is left")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other cases (0)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="JSON of counts, gone on with if it exists")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (1)")
    arguments = parser.parse_args()

    from bench.fuzz.targets import TARGETS  # here, as importing torch takes a while

    if arguments.list:
        for target in TARGETS.values():
            print(f"{target.name}: {', '.join(target.covers) or target.check.__module__}")
        return 0
    names = list(TARGETS) if arguments.functions is None else arguments.functions.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"there is no {', '.join(unknown)}; --functions takes some of {', '.join(TARGETS)}")
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    log = Log(arguments.log, arguments.seed)
    unlimited = 2**62 if arguments.minutes is not None else 200
    cases = unlimited if arguments.cases is None else arguments.cases
    deadline = time.monotonic() + (60 * arguments.minutes if arguments.minutes is not None else 2.0**40)

    def one_piece(name: str) -> bool:
        """Whether a piece was run and passed."""
        for size, seed_text in pieces(log, name, cases, deadline):
            outcome = run_piece(name, size, seed_text)
            log.add(name, outcome)
            if outcome["reason"]:
                print(f"{name} FAILED\n{outcome['reason']}\n{outcome['reproduction']}", flush=True)
                return False
            print(f"{name}: {log.cases(name)} cases, {outcome['seconds']:.0f} s", flush=True)
            return True
        return False

    with ThreadPoolExecutor(arguments.jobs) as pool:
        while names:  # all in turn, so that time is shared
            names = [name for name, more in zip(names, list(pool.map(one_piece, names)), strict=True) if more]
    for name in log.failed():
        print(f"{name} FAILED after {log.cases(name)} cases", flush=True)
    return 1 if log.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
