"""The experiments of the Reformer paper (arXiv 2001.04451), one command each.

    python -m bench.paper duplication
    python -m bench.paper hashes --seeds 0 --text enwik8
    python -m bench.paper report

A command that is interrupted goes on where it was when it is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from bench.paper import duplication, language, speed
from bench.paper.records import Records, RecordsError
from reformer_kernels.training.text import TextError, load_text

RESULTS = Path(__file__).parents[1] / "results" / "paper"

EXPERIMENTS = {
    "duplication": "Table 2: copying, by hash rounds of training and of evaluation",
    "sharing": "Figure 3, left: one projection for queries and keys against two",
    "reversible": "Figure 3, right: reversible layers against one residual stream",
    "hashes": "Figure 4: 1 to 16 hash rounds against full attention",
    "rules": "which keys a query should see: the rules of the paper, trax, reformer_pytorch and ours",
    "time": "Figure 5: time of attention by length, at a constant number of tokens",
    "memory": "Tables 1 and 3: memory by length and by depth",
}
LANGUAGE = ("sharing", "reversible", "hashes", "rules")
SPEED = ("time", "memory")


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m bench.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, text in EXPERIMENTS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--preset",
            choices=list(duplication.PRESETS),
            default="cpu",
            help="cpu: minutes to an hour or two on two cores; paper: the paper's sizes, for a GPU; smoke: "
            "seconds, whether it runs",
        )
        command.add_argument("--output", type=Path, help="the result file (default: in bench/results/paper/)")
        command.add_argument("--threads", type=positive, help="CPU threads")
        if name in SPEED:
            command.add_argument("--device", default="cpu", help="such as cuda")
        else:
            command.add_argument("--seeds", type=numbers, help="such as 0,1,2")
            command.add_argument("--steps", type=positive, help="training steps")
        if name in LANGUAGE:
            command.add_argument("--text", type=Path, help="a file or folder (default: Python's own source)")
            command.add_argument("--length", type=positive, help="bytes in a sequence")
            command.add_argument("--only", help="variants, separated by semicolons")
    command = commands.add_parser("report", help="draw the figures and write the tables of docs/paper.md")
    command.add_argument("files", nargs="*", type=Path, help="result files (default: bench/results/paper/)")
    return root


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if given.experiment == "report":
        from bench.paper import report

        report.write(given.files or sorted(RESULTS.glob("*.json")))
        return 0
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        run(given)
    except (RecordsError, TextError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def run(given: argparse.Namespace) -> None:
    """Run an experiment, or what of it is missing in its result file."""
    module: Any = duplication if given.experiment == "duplication" else language
    settings: Any = (speed if given.experiment in SPEED else module).PRESETS[given.preset]
    changes = {name: getattr(given, name, None) for name in ("seeds", "steps", "length")}
    settings = dataclasses.replace(settings, **{k: v for k, v in changes.items() if v is not None})
    text = None
    if given.experiment in LANGUAGE:
        text = load_text(given.text, settings.length)
        settings = language.with_text(settings, text)
    output = given.output or RESULTS / f"{given.experiment}-{given.preset}.json"
    # More seeds may join a file; everything else decides what a record is.
    described = dataclasses.asdict(settings)
    described.pop("seeds", None)
    records = Records(output, given.experiment, described)
    if given.experiment == "duplication":
        duplication.run(settings, records, say)
    elif given.experiment == "time":
        speed.run_time(settings, given.device, records, say)
    elif given.experiment == "memory":
        speed.run_memory(settings, given.device, records, say)
    else:
        assert text is not None
        language.run(given.experiment, settings, text, records, say, chosen(given))
    print(f"{output} is complete")


def chosen(given: argparse.Namespace) -> dict[str, language.Variant]:
    """The variants that --only names, or all."""
    variants = language.EXPERIMENTS[given.experiment]
    if given.only is None:
        return variants
    names = [name.strip() for name in given.only.split(";")]
    if unknown := [name for name in names if name not in variants]:
        raise ValueError(f"--only must name some of {'; '.join(variants)}; got {'; '.join(unknown)}")
    return {name: variants[name] for name in names}


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
