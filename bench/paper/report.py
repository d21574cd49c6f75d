"""Figures and tables of docs/paper.md, from the result files of the experiments."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.paper.records import Record, by_variant, read_records
from reformer_kernels._files import write_atomically

DOCS = Path(__file__).parents[2] / "docs"
TABLES = Path(__file__).parents[1] / "results" / "paper" / "tables.md"

TABLE_2 = {
    "full": (100.0, 94.8, 92.5, 76.9, 52.5),
    "4": (0.8, 100.0, 99.9, 99.4, 91.9),
    "2": (0.8, 100.0, 99.9, 98.1, 86.8),
    "1": (0.8, 99.9, 99.6, 94.8, 77.9),
}
"""The paper's Table 2, in percent: evaluated with full attention, 8, 4, 2 and 1 hash rounds."""

EVALUATED = ("full", "8", "4", "2", "1")

TITLES = {
    "sharing": "Figure 3, left: shared query-keys",
    "reversible": "Figure 3, right: reversible layers",
    "hashes": "Figure 4: hash rounds",
    "rules": "Which keys a query sees",
}


def write(files: Sequence[Path]) -> None:
    """Draw docs/images/paper-*.svg and write the tables that docs/paper.md includes."""
    sections = []
    for file in files:
        experiment = file.name.split("-")[0]
        settings, runs = read_records(file)
        if experiment == "duplication":
            lines = duplication_table(runs)
        elif experiment in TITLES:
            lines = language_table(runs)
            draw_curves(file, experiment, runs)
        elif experiment == "time":
            lines = time_table(runs)
            draw_time(file, runs)
        else:
            lines = memory_table(runs)
        sections.append("\n".join([f"**{file.stem}** ({origin(runs)})", "", *lines, "", sizes(settings), ""]))
    write_atomically(TABLES, "\n".join(sections))
    print(f"{TABLES}: {len(sections)} tables")


def origin(runs: Record) -> str:
    """The machine, the commits and the versions that runs came from."""
    places = [run["provenance"] for run in runs.values()]
    machines = sorted({f"{p['machine']['cpu']}, {p['machine']['threads']} threads" for p in places})
    commits = sorted({str(p["commit"]) for p in places})
    torches = sorted({p["versions"]["torch"] for p in places})
    return f"{'; '.join(machines)}; commit {', '.join(commits)}; torch {', '.join(torches)}"


def sizes(settings: Record) -> str:
    shown = {k: v for k, v in settings.items() if k not in ("text", "evaluated", "trained")}
    return "Settings: " + ", ".join(f"{k} {v}" for k, v in shown.items()) + "."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and the smallest and largest where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def duplication_table(runs: Record) -> list[str]:
    rows = []
    for variant, seeds in by_variant(runs):
        percent = [
            spread([100 * seed["accuracy"][rounds] for seed in seeds], 1)
            + f"; paper {TABLE_2[variant][column]}"
            for column, rounds in enumerate(EVALUATED)
        ]
        rows.append([f"trained with {name_of(variant)}, {len(seeds)} seeds", *percent])
    return table(["accuracy, %", *(f"evaluated with {name_of(rounds)}" for rounds in EVALUATED)], rows)


def name_of(rounds: str) -> str:
    return "full attention" if rounds == "full" else f"LSH-{rounds}"


def language_table(runs: Record) -> list[str]:
    rows, reference = [], 0.0
    for variant, seeds in by_variant(runs):
        bits = [seed["points"][-1]["bits"] for seed in seeds]
        mean = statistics.mean(bits)
        reference = reference or mean
        seconds = statistics.mean(seed["points"][-1]["seconds"] for seed in seeds)
        steps = seeds[0]["points"][-1]["step"]
        rows.append(
            [
                variant,
                str(len(bits)),
                spread(bits, 4),
                f"{100 * (mean / reference - 1):+.2f}%",
                f"{1000 * seconds / steps:.0f} ms",
            ]
        )
    return table(["variant", "seeds", "bits per byte", "against the first row", "time of a step"], rows)


def draw_curves(file: Path, experiment: str, runs: Record) -> None:
    """Bits per byte against steps and against seconds, the mean over seeds with their range."""
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for variant, seeds in by_variant(runs):
        points = list(zip(*(seed["points"] for seed in seeds), strict=True))
        steps = [at[0]["step"] for at in points]
        bits = [[point["bits"] for point in at] for at in points]
        seconds = [statistics.mean(point["seconds"] for point in at) for at in points]
        mean = [statistics.mean(at) for at in bits]
        (line,) = by_step.plot(steps, mean, label=variant)
        by_time.plot(seconds, mean, color=line.get_color())
        by_step.fill_between(steps, [min(at) for at in bits], [max(at) for at in bits], alpha=0.2)
    by_step.set(xlabel="steps", ylabel="bits per byte, held-out text", title=TITLES[experiment])
    by_time.set(xlabel="seconds of training")
    by_step.legend(frameon=False, fontsize=8)
    save(figure, (by_step, by_time), file)


def time_table(runs: Record) -> list[str]:
    names = list(next(iter(runs.values()))["seconds"])
    rows = [[length, *(f"{run['seconds'][name]:.2f} s" for name in names)] for length, run in runs.items()]
    return table(["length", *names], rows)


def draw_time(file: Path, runs: Record) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    lengths = [int(length) for length in runs]
    for name in next(iter(runs.values()))["seconds"]:
        axes.plot(lengths, [run["seconds"][name] for run in runs.values()], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="length, at a constant number of tokens", ylabel="seconds, forward", title="Figure 5")
    axes.legend(frameon=False, fontsize=8)
    save(figure, (axes,), file)


def memory_table(runs: Record) -> list[str]:
    rows = [[*key.split(", "), f"{run['bytes'] / 2**20:.1f} MiB"] for key, run in runs.items()]
    return table(["of", "variant", "length or layers", "peak, forward and backward"], rows)


def save(figure: plt.Figure, every: Sequence[Axes], file: Path) -> None:
    for axes in every:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    image = DOCS / "images" / f"paper-{file.stem}.svg"
    figure.savefig(image, metadata={"Date": None})
    plt.close(figure)
    print(image)
