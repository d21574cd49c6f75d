"""Plots of a benchmark's results: time and memory against length, beside what ours is compared with.

They are drawn from the JSON form of `results.py`, so saved results can be drawn too. matplotlib is imported
only when a plot is drawn.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reformer_kernels.benchmarks.registry import AXES
from reformer_kernels.benchmarks.results import Document

Row = dict[str, Any]
Styles = dict[str, dict[str, Any]]

SUFFIXES = (".png", ".svg")

OUR_COLOURS = ("#0b6e99", "#d1495b", "#5f8f3e", "#8e5ea2", "#c77d0a")
PEER_COLOURS = ("#3d3d3d", "#8a8a8a", "#b8a06a", "#9ab0bf")
PEER_STYLES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "D", "^", "v")
INK, PAPER, GRID = "#222222", "#ffffff", "#dddddd"

AXIS_TITLES = {
    "length": "sequence length (tokens)",
    "layers": "layers",
    "d_ff": "feed-forward size",
    "vocabulary": "vocabulary (tokens)",
    "n_hashes": "hash rounds",
}
PHASE_TITLES = {
    "forward": "Forward",
    "forward+backward": "Forward and backward",
    "training step": "Training step",
}
SIZE_WORDS = {
    "batch": "batch {}",
    "heads": "{} heads",
    "head_dim": "head size {}",
    "width": "width {}",
    "layers": "{} layers",
    "d_ff": "d_ff {}",
    "vocabulary": "vocabulary {}",
    "n_hashes": "{} hash rounds",
    "chunk_length": "chunk {}",
    "length": "{} tokens",
    "dtype": "{}",
}


class PlotError(Exception):
    """The plot cannot be drawn; the message says why."""


@dataclass
class Line:
    """One call's times or memory by the value on the horizontal axis."""

    name: str
    is_ours: bool
    call: str = ""
    sizes: tuple[Any, ...] = ()
    """What varies beside the horizontal axis and the number of hash rounds."""
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


def check_plot_file(file: Path) -> None:
    """Raises PlotError where `draw` could not write such a file."""
    if file.suffix.lower() not in SUFFIXES:
        raise PlotError(f"a plot must end in .png or .svg, got {file.name!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError("plots need matplotlib; install it with: pip install matplotlib")


def draw(documents: Sequence[Document], file: Path) -> None:
    """Draw the results of one operation, from one run or several, to a PNG or SVG file.

    A column for each pass shows its times above its memory. Where no more than one value varies beside the
    horizontal axis, lines carry it in their names; a circle marks where ours becomes faster than a peer.

    Raises:
        PlotError: the file's suffix, a missing matplotlib, or results of different operations.
    """
    check_plot_file(file)
    operations = sorted({document["operation"] for document in documents})
    if len(operations) != 1:
        raise PlotError(f"a plot shows one operation, got results of {', '.join(operations)}")
    rows = [row for document in documents for row in document["rows"]]
    axis = _horizontal(rows)
    phases = [phase for phase in PHASE_TITLES if any(row["phase"] == phase for row in rows)]
    with_memory = any(row["working_memory_bytes"] is not None for row in rows)

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = _style()
    with plt.rc_context(style):
        height = 7.6 if with_memory else 4.6
        figure, axes = plt.subplots(
            2 if with_memory else 1,
            len(phases),
            figsize=(max(5.4, 4.9 * len(phases)), height),
            squeeze=False,
            sharex=True,
            sharey="row",
        )
        try:
            styles = _styles(_lines(rows, axis, rows, "time"))
            for column, phase in enumerate(phases):
                chosen = [row for row in rows if row["phase"] == phase]
                panel = axes[0][column]
                lines = _lines(chosen, axis, rows, "time")
                _draw_panel(panel, lines, styles, mark_crossings=axis == "length")
                panel.set_title(PHASE_TITLES[phase])
                if with_memory:
                    _draw_panel(axes[1][column], _lines(chosen, axis, rows, "memory"), styles)
                axes[-1][column].set_xlabel(AXIS_TITLES[axis])
            axes[0][0].set_ylabel("time of one call")
            _label_scale(axes[0][0], 10, time_label)
            if with_memory:
                axes[1][0].set_ylabel("peak working memory")
                _label_scale(axes[1][0], 2, memory_label)
            values = sorted({float(row[axis]) for row in rows if row[axis] is not None})
            _label_values(axes[0][0], values)
            _finish(figure, axes[0][0], operations[0], rows, documents, axis, height)
            figure.savefig(file, dpi=160, facecolor=PAPER)
        finally:
            plt.close(figure)


def _horizontal(rows: Sequence[Row]) -> str:
    """The field on the horizontal axis: the length where it varies, else the first other that does."""
    names = [name for name in AXES.values() if name in AXIS_TITLES]
    varying = [name for name in names if len({row.get(name) for row in rows} - {None, 0}) > 1]
    return next(iter(varying), "length")


def _words(name: str, value: Any) -> str:
    """A size in words, such as "4 hash rounds"."""
    text = SIZE_WORDS.get(name, "{}").format(value)
    return text.removesuffix("s") if value == 1 else text


def _varying(row: Row, axis: str, rows: Sequence[Row]) -> dict[str, Any]:
    """What varies between the rows beside the horizontal axis, with this row's values."""
    names = [name for name in AXES.values() if name != axis and row.get(name) not in (None, "")]
    return {name: row[name] for name in names if len({r.get(name) for r in rows} - {None, ""}) > 1}


def _lines(chosen: Sequence[Row], axis: str, rows: Sequence[Row], figure: str) -> list[Line]:
    """The lines of a panel; figure is "time" or "memory"."""
    lines: dict[str, Line] = {}
    values = sorted({float(row[axis]) for row in rows if row[axis] is not None})
    for row in sorted(chosen, key=lambda row: float(row[axis] or 0)):
        varying = _varying(row, axis, rows)
        words = [_words(name, value) for name, value in varying.items()]
        name = ", ".join([row["name"], *words])
        sizes = tuple(value for key, value in varying.items() if key != "n_hashes")
        line = lines.setdefault(name, Line(name, row["ours"], call=row["name"], sizes=sizes))
        if figure == "time":
            y, low, high = (row[key] for key in ("median", "p20", "p80"))
        elif row["working_memory_bytes"] is None:
            continue
        else:
            # Zero has no place on a logarithmic axis; less than a page is drawn as one.
            y = low = high = max(row["working_memory_bytes"], 4096)
        # A call without hash rounds is the same for any number of them.
        for x in values if row[axis] is None else [float(row[axis])]:
            line.x.append(x)
            line.y.append(y)
            line.low.append(low)
            line.high.append(high)
    return [line for line in lines.values() if line.x]


def _styles(lines: Sequence[Line]) -> Styles:
    """Style of each line, the same in all panels: colours tell calls apart, markers sizes."""
    ours = list(dict.fromkeys(line.call for line in lines if line.is_ours))
    others = list(dict.fromkeys(line.call for line in lines if not line.is_ours))
    seen: dict[str, int] = {}
    result: Styles = {}
    several = len(lines) > len(ours) + len(others)
    for line in lines:
        group = ours if line.is_ours else others
        index = group.index(line.call)
        nth = seen[line.call] = seen.get(line.call, -1) + 1
        colours = OUR_COLOURS if line.is_ours else PEER_COLOURS
        result[line.name] = {
            "color": colours[index % len(colours)],
            "linestyle": "-" if line.is_ours else PEER_STYLES[index % len(PEER_STYLES)],
            "marker": MARKERS[(nth if several else index) % len(MARKERS)],
            "linewidth": 2.0 if line.is_ours else 1.5,
            "zorder": 4 if line.is_ours else 3,
        }
        if not line.is_ours:
            result[line.name]["markerfacecolor"] = PAPER
    return result


def _draw_panel(
    panel: Any,
    lines: Sequence[Line],
    styles: Styles,
    *,
    mark_crossings: bool = False,
) -> None:
    for line in lines:
        style = styles[line.name]
        panel.plot(line.x, line.y, label=line.name, markersize=5, **style)
        panel.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.15, linewidth=0)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.grid(visible=True, which="major")
    if mark_crossings:
        _mark_crossings(panel, lines)


def _mark_crossings(panel: Any, lines: Sequence[Line]) -> None:
    """Circle the lengths from which the fastest of ours is faster than another line of the same sizes."""
    for other in (line for line in lines if not line.is_ours):
        fastest = fastest_of([line for line in lines if line.is_ours and line.sizes == other.sizes])
        points = crossings(fastest, other)
        if not points:
            continue
        x, y = points[-1]
        at_right = x > math.sqrt(other.x[0] * other.x[-1])
        panel.plot([x], [y], "o", markersize=11, markerfacecolor="none", markeredgecolor=INK, zorder=6)
        panel.annotate(
            f"{_rounded(x):,} tokens",
            (x, y),
            xytext=(-9 if at_right else 9, -14),
            horizontalalignment="right" if at_right else "left",
            textcoords="offset points",
            fontsize=8,
            color=INK,
            zorder=7,
        )


def fastest_of(lines: Sequence[Line]) -> Line:
    """The least of the lines at each x."""
    least: dict[float, float] = {}
    for line in lines:
        for x, y in zip(line.x, line.y, strict=True):
            least[x] = min(y, least.get(x, math.inf))
    values = sorted(least.items())
    return Line("the fastest of ours", True, x=[x for x, _ in values], y=[y for _, y in values])


def crossings(line: Line, other: Line) -> list[tuple[float, float]]:
    """Points from which `line` is below `other`, where it was above, by interpolation on logarithmic axes."""
    both = [
        (math.log(x), math.log(line.y[i]), math.log(other.y[other.x.index(x)]))
        for i, x in enumerate(line.x)
        if x in other.x
    ]
    points = []
    for (x0, a0, b0), (x1, a1, b1) in itertools.pairwise(both):
        if a0 > b0 and a1 <= b1:
            share = (a0 - b0) / ((a0 - b0) + (b1 - a1))
            points.append((math.exp(x0 + share * (x1 - x0)), math.exp(a0 + share * (a1 - a0))))
    return points


def _rounded(value: float) -> int:
    """Two significant digits: what an interpolation between powers of two can say."""
    scale = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return round(value / scale) * scale


def _label_values(panel: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    panel.xaxis.set_major_locator(FixedLocator(list(values)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())
    if len(values) == 1:
        panel.set_xlim(values[0] / 2, values[0] * 2)


def _label_scale(panel: Any, base: int, label: Callable[[float], str]) -> None:
    """Ticks at round values, a handful of them whatever the range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = panel.get_ylim()
    powers = math.log(high / low, base)
    if base == 10:
        locator = LogLocator(10, subs=(1.0, 2.0, 5.0) if powers < 1.7 else (1.0,))
    else:
        # Powers of 2, 4, 8 or more, so that at most about eight are shown.
        locator = LogLocator(2 ** max(1, math.ceil(powers / 8)))
    panel.yaxis.set_major_locator(locator)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    panel.yaxis.set_minor_formatter(NullFormatter())


def short_count(value: float) -> str:
    """4096 as "4K", 1048576 as "1M"; other numbers as they are."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if value >= size and value % size == 0:
            return f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def time_label(value: float) -> str:
    """Seconds in the unit that suits them: 0.001 as "1 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= 0.999 * size:
            return f"{value / size:g} {unit}"
    return f"{value / 1e-6:g} µs"


def memory_label(value: float) -> str:
    """Bytes in the unit that suits them: 1048576 as "1 MiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value / 2**10:g} KiB"


def _finish(
    figure: Any,
    panel: Any,
    operation: str,
    rows: Sequence[Row],
    documents: Sequence[Document],
    axis: str,
    height: float,
) -> None:
    """Title, legend and footer."""
    words = []
    for name in SIZE_WORDS:
        values = {row[name] for row in rows if row.get(name) not in (None, "", 0)}
        if name != axis and len(values) == 1:
            words.append(_words(name, values.pop()))
    if rows[0].get("causal") is not None:
        words.append("causal" if rows[0]["causal"] else "not causal")
    handles, labels = panel.get_legend_handles_labels()
    columns = min(len(labels), 3 if figure.get_size_inches()[0] > 7 else 2)
    lines_of_legend = math.ceil(len(labels) / columns)
    top, inch = 1.0, 1 / height
    figure.text(0.02, top - 0.12 * inch, f"bench {operation}", fontsize=14, fontweight="bold", va="top")
    figure.text(0.02, top - 0.42 * inch, ", ".join(words), fontsize=9, color="#555555", va="top")
    # Legends fill column after column; in this order the rows read from left to right.
    order = [i for column in range(columns) for i in range(column, len(labels), columns)]
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="upper left",
        bbox_to_anchor=(0.01, top - 0.6 * inch),
        ncols=columns,
        frameon=False,
    )
    footers = ["Medians; bands: 20th to 80th percentile; circles: from here our fastest call is faster"]
    footers += dict.fromkeys(_footer(document) for document in documents)
    figure.text(0.02, 0.09 * inch, "\n".join(footers), fontsize=7.5, color="#777777", va="bottom")
    below = (0.3 + 0.14 * (len(footers) - 1)) * inch
    figure.tight_layout(rect=(0.005, below, 1, top - (0.68 + 0.21 * lines_of_legend) * inch))


def _footer(document: Document) -> str:
    facts = document["machine"]
    processor, torch_version = facts.get("gpu", facts["cpu"]), document["versions"]["torch"]
    return (
        f"{processor}, {facts['threads']} threads · torch {torch_version} · commit {document['commit']} · "
        f"{document.get('started', '')[:10]}"
    )


def _style() -> dict[str, Any]:
    return {
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "axes.labelcolor": INK,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "text.color": INK,
        "xtick.color": "#555555",
        "ytick.color": "#555555",
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "legend.fontsize": 9,
        "svg.fonttype": "none",
    }
