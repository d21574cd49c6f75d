#!/usr/bin/env python3
"""Checks and times everything on a machine with a GPU, in one command.

    python bench/validate_gpu.py                       # within 8 minutes: bench/results/<gpu>.json and .md
    python bench/validate_gpu.py --steps correctness,race
    python bench/validate_gpu.py --resume              # the steps that an earlier run did not end
    python bench/validate_gpu.py --dry-run --output DIR     # tries every step here, in Triton's interpreter

It builds the package, checks every operation and option against the float64 reference, and looks for races,
host synchronisation and bad addresses. It times every operation beside its predicted time, SDPA's back ends,
FlexAttention, `torch.sort` and the machine's own rates, and measures tiles (`<gpu>-tiles.json`, for
REFORMER_TILES). The steps run in processes of their own, the most important first. Results are written after
every row, so that a run that is cut short keeps what it has. The exit code is 1 where a check failed or a
step did not end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
DRY_RUN = "--dry-run" in sys.argv[1:]
if DRY_RUN:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from validation.context import Context  # noqa: E402
from validation.results import Results, StepResult  # noqa: E402
from validation.steps import DEVICE_ERROR, STEPS, Step, rows_of  # noqa: E402

BUDGET_SECONDS = 480.0
MAX_RESTARTS = 5
"""How many processes of one step that die are started again."""

OWN_PROCESS_IN_A_DRY_RUN = ("environment",)
"""Steps with processes of their own also in a dry run. One is enough to try how that works; the others run in
this process, as each further one would import torch again."""


class StepRunner:
    """Runs a step in its processes and collects their rows."""

    def __init__(self, step: Step, context: Context, results: Results, environment: dict[str, str]) -> None:
        self.step, self.context, self.results, self.environment = step, context, results, environment
        self.result = results.steps[step.name]
        self.lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.errors: dict[int, list[str]] = {}
        self.rows_of: dict[int, int] = {}
        self.ended: set[int] = set()

    def run(self, seconds: float) -> None:
        start, self.result.status = time.perf_counter(), "running"
        shards = min(self.step.shards, os.cpu_count() or 1)
        restarts = 0
        for shard in range(shards):
            self._start(shard, shards)
        while self.processes:
            try:
                shard, line = self.lines.get(timeout=max(0.0, seconds - (time.perf_counter() - start)))
            except queue.Empty:
                self._stop()
                self.result.status, self.result.reason = "cut short", f"out of time after {seconds:.0f} s"
                break
            if line is None:
                if shard in self.ended:
                    self.processes.pop(shard)
                    continue
                reason = self._died(shard)
                if self.step.shards > 1 and restarts < MAX_RESTARTS:
                    restarts += 1
                    self._start(shard, shards)
                else:
                    self.result.status, self.result.reason = "failed", reason
            elif line.startswith("ROW "):
                self.rows_of[shard] += 1
                self.result.rows.append(json.loads(line[4:]))
                self.result.seconds = time.perf_counter() - start
                self.results.write()
            elif line.startswith("END"):
                self.ended.add(shard)
        self.result.seconds = time.perf_counter() - start
        if self.result.status == "running":
            self.result.status = "done"

    def _start(self, shard: int, shards: int) -> None:
        after = self.rows_of.setdefault(shard, 0)
        command = [sys.executable, "-m", "validation.steps", self.step.function]
        command += ["--context", json.dumps(dataclasses.asdict(self.context))]
        command += ["--shard", str(shard), "--shards", str(shards), "--after", str(after)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.processes[shard] = process
        self.errors[shard] = []
        threading.Thread(target=self._read, args=(shard, process), daemon=True).start()

    def _read(self, shard: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None and process.stderr is not None
        errors, stderr = self.errors[shard], process.stderr
        follower = threading.Thread(target=lambda: errors.extend(stderr), daemon=True)
        follower.start()
        for line in process.stdout:
            self.lines.put((shard, line))
        process.wait()
        follower.join(timeout=5)
        self.lines.put((shard, None))

    def _died(self, shard: int) -> str:
        """Why a process ended early. Adds a row that says so, unless the process reported a device error."""
        process = self.processes.pop(shard)
        if process.returncode == DEVICE_ERROR:
            return "the device failed"
        errors = " ".join("".join(self.errors[shard][-4:]).split())
        reason = f"the process ended with code {process.returncode}: {errors[-500:]}"
        self.result.rows.append({"check": f"process {shard}", "ok": False, "reason": reason})
        self.rows_of[shard] += 1
        self.results.write()
        return reason

    def _stop(self) -> None:
        for process in self.processes.values():
            os.killpg(process.pid, 9)  # together with the processes that it started
            process.wait()
        self.processes.clear()


def run_here(step: Step, context: Context, results: Results) -> None:
    """Runs a step in this process."""
    result, start = results.steps[step.name], time.perf_counter()
    for row in rows_of(step.function, context):
        result.rows.append(row)
        results.write()
    result.status, result.seconds = "done", time.perf_counter() - start


def device_name() -> str:
    """The name of the first GPU as part of a file name, "" where there is none.

    Another process asks for it, because a CUDA context would stay in this one.
    """
    program = "import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return re.sub(r"[^a-z0-9]+", "-", done.stdout.strip().lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny problems in Triton's interpreter, on the CPU"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help="time for all steps together")
    parser.add_argument(
        "--steps", help="run only these, separated by commas: " + ", ".join(s.name for s in STEPS)
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the steps that an earlier run of this commit ended"
    )
    arguments = parser.parse_args()
    steps = [step for step in STEPS if arguments.steps is None or step.name in arguments.steps.split(",")]
    if not steps:
        parser.error(
            f"--steps must name some of {', '.join(step.name for step in STEPS)}, got {arguments.steps!r}"
        )
    name = "dry-run" if arguments.dry_run else device_name()
    if not name:
        print("torch finds no CUDA device; --dry-run tries the steps without one", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    context = Context(dry_run=arguments.dry_run, folder=str(arguments.output.resolve()), name=name)
    results = Results(arguments.output / name, arguments.dry_run, sys.argv[1:])
    results.steps = {step.name: StepResult(step.about) for step in steps}
    if arguments.resume:
        try:
            kept = results.resume()
        except ValueError as error:
            parser.error(str(error))
        print(f"Kept {', '.join(kept) or 'no step'}")
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "bench")]))
    start = time.perf_counter()
    for step in steps:
        if results.steps[step.name].status == "done":
            continue
        left = arguments.seconds - (time.perf_counter() - start)
        if left < 5:
            results.steps[step.name].reason = "no time left"
            continue
        if step.name == "headline, swept":
            swept = Path(context.folder) / f"{context.name}-tiles.json"
            if not swept.exists():
                results.steps[step.name].reason = "the sweep chose no tiles"
                continue
            environment = environment | {"REFORMER_TILES": str(swept)}
        print(f"{step.name}: {step.about}", flush=True)
        if arguments.dry_run and step.name not in OWN_PROCESS_IN_A_DRY_RUN:
            run_here(step, context, results)
        else:
            StepRunner(step, context, results, environment).run(min(step.seconds, left))
        result = results.steps[step.name]
        print(f"  {result.status}, {len(result.rows)} rows, {len(result.failures)} failed", flush=True)
        for row in result.failures:
            reason = row.get("reason") or row.get("wrong") or row
            print(f"  FAILED {row['check']}: {reason}", flush=True)
        results.write()
    print(f"Wrote {results.path.with_suffix('.json')} and {results.path.with_suffix('.md')}")
    return 0 if all(result.ok for result in results.steps.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
