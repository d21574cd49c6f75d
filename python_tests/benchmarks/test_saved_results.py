"""`bench compare` and `bench plot`: what changed between two results, and pictures of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from reformer_kernels.benchmarks import plots, results, tables
from reformer_kernels.benchmarks.compare import Change, compare
from reformer_kernels.benchmarks.plots import Line
from reformer_kernels.cli import app

RECORDS = Path(__file__).resolve().parents[2] / "bench" / "results"


def row(name: str, length: int, median: float, *, ours: bool = True, **more: Any) -> dict[str, Any]:
    figures = {"n": 9, "p20": 0.97 * median, "median": median, "p80": 1.03 * median}
    sizes = {"length": length, "n_hashes": 4, "batch": 1, "heads": 8, "dtype": "float32", "device": "cpu"}
    rest = {"working_memory_bytes": 1024 * length, "ratios": {}, "memory_ratios": {}, "causal": True}
    return (
        {"operation": "lsh", "name": name, "ours": ours, "phase": "forward"} | sizes | figures | rest | more
    )


def document(rows: list[dict[str, Any]]) -> results.Document:
    return {
        "schema": 2,
        "operation": rows[0]["operation"],
        "started": "2026-01-02T03:04:05",
        "machine": {"cpu": "a CPU", "threads": 2},
        "commit": "abc",
        "versions": {"torch": "2.9"},
        "rates": {"matmul_gflops": 100.0, "copy_gbs": 10.0},
        "settings": {},
        "rows": rows,
        "checks": [],
        "left_out": [],
        "notes": [],
    }


def lengths() -> results.Document:
    """Ours grows linearly and SDPA quadratically; they cross at 2048."""
    ours = [row("trax()", length, length * 1e-6) for length in (512, 1024, 4096, 8192)]
    others = [
        row("torch SDPA", length, length**2 / 2048 * 1e-6, ours=False, n_hashes=None)
        for length in (512, 1024, 4096, 8192)
    ]
    return document(ours + others)


def save(path: Path, content: results.Document) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["bench", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def plain(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_a_change_is_one_beyond_the_spread() -> None:
    before = row("trax()", 512, 1.0)
    assert Change(before, row("trax()", 512, 1.05)).verdict == "same"
    assert Change(before, row("trax()", 512, 1.2)).verdict == "slower"
    assert Change(before, row("trax()", 512, 0.8)).verdict == "faster"
    assert Change(before, row("trax()", 512, 1.2, p20=1.0)).verdict == "same"
    assert Change(before, row("trax()", 512, 1.01, p20=1.01, p80=1.01)).verdict == "same"
    assert Change(before, row("trax()", 512, 1.5, n=1)).verdict == "unknown"
    memory = Change(row("trax()", 2048, 1.0), row("trax()", 2048, 1.0, working_memory_bytes=2**22))
    assert memory.memory == 2 and memory.memory_changed
    assert not Change(before, row("trax()", 512, 1.0, working_memory_bytes=None)).memory_changed


def test_rows_match_by_all_that_is_not_measured() -> None:
    before = document([row("trax()", 512, 1.0), row("trax()", 1024, 1.0)])
    after = document([row("trax()", 512, 2.0, variant=""), row("trax()", 512, 1.0, n_hashes=1)])
    found = compare(before, after)
    assert [change.time for change in found.changes] == [2.0]
    assert (found.only_before, found.only_after, found.warnings) == (1, 1, [])
    after["machine"] = {"cpu": "another", "threads": 2}
    after["rates"] = {"matmul_gflops": 50.0}
    warnings = " ".join(compare(before, after).warnings)
    assert "the cpu differs: a CPU before, another after" in warnings and "not in the same state" in warnings


def test_compare_command(tmp_path: Path) -> None:
    before = lengths()
    after = copy.deepcopy(before)
    after["rows"][1] |= {name: 2 * after["rows"][1][name] for name in ("p20", "median", "p80")}
    a, b = save(tmp_path / "a.json", before), save(tmp_path / "b.json", after)
    result = invoke("compare", a, b)
    assert result.exit_code == 0
    assert "1.02 ms 2.05 ms 2.0x slower" in plain(result.output)
    assert "0 faster, 1 slower, 7 the same within the noise; memory changed in 0." in plain(result.output)
    assert "torch SDPA" not in result.output
    assert "torch SDPA" in invoke("compare", a, b, "--all").output
    assert all(len(line) <= 100 for line in result.output.splitlines())


def test_compare_files_that_do_not_match(tmp_path: Path) -> None:
    a = save(tmp_path / "a.json", lengths())
    b = save(tmp_path / "b.json", document([row("chunked", 512, 1.0, operation="ffn")]))
    result = invoke("compare", a, b)
    assert result.exit_code == 0
    assert "No row is in both: a.json has 8 rows of lsh, b.json 1 of ffn" in plain(result.output)
    (tmp_path / "c.json").write_text("{")
    for path, message in (
        (tmp_path / "c.json", "is not a readable JSON file"),
        (tmp_path / "none.json", "is not a readable JSON file"),
        (Path(save(tmp_path / "d.json", {"tables": {}})), "has no rows that 'reformer-kernels bench --json'"),
        (Path(save(tmp_path / "e.json", document([row("trax()", 1, 1.0)]) | {"rows": []})), "has no rows"),
    ):
        result = invoke("compare", a, str(path))
        assert result.exit_code == 2 and message in plain(result.output)


def test_old_records_are_read() -> None:
    files = sorted(RECORDS.glob("*-lsh-*.json"))
    assert files
    for file in files:
        found = results.read(file)
        assert found["operation"] == "lsh"
        assert {r["name"] for r in found["rows"] if not r["ours"]} <= {
            "torch SDPA",
            "Hugging Face",
            "reformer_pytorch",
        }
    assert invoke("compare", str(files[0]), str(files[0])).exit_code == 0


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_command(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plot{suffix}"
    result = invoke("plot", save(tmp_path / "a.json", lengths()), str(file))
    assert result.exit_code == 0, result.output
    content = file.read_bytes()
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
    else:
        text = content.decode()
        words = (
            "trax()",
            "torch SDPA",
            "sequence length (tokens)",
            "time of one call",
            "peak working memory",
        )
        for word in (*words, "a CPU, 2 threads", "commit abc", "2,000 tokens", "4 hash rounds", "8K"):
            assert word in text, word


def test_plots_of_other_axes_and_of_one_value(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = document([row("trax()", 512, 1.0), row("torch SDPA", 512, 1.0, ours=False, n_hashes=None)])
    plots.draw([one], tmp_path / "one.svg")
    sizes = [
        row("chunked", 512, 1.0, operation="ffn", d_ff=d_ff, variant=variant)
        for d_ff in (64, 128)
        for variant in ("gelu", "relu")
    ]
    plots.draw([document(sizes)], tmp_path / "two.svg")
    text = (tmp_path / "two.svg").read_text()
    assert "feed-forward size" in text and "chunked, gelu" in text and "512 tokens" in text
    free = [row("nn.MultiheadAttention", 512, 1.0, operation="mha", ours=False, n_hashes=None)]
    rounds = [row("LSH", 512, 1.0, operation="mha", n_hashes=n_hashes) for n_hashes in (1, 4)]
    plots.draw([document(rounds + free)], tmp_path / "rounds.svg")
    assert "hash rounds" in (tmp_path / "rounds.svg").read_text()
    without = [r | {"working_memory_bytes": None} for r in sizes]
    plots.draw([document(without)], tmp_path / "three.svg")
    assert "peak working memory" not in (tmp_path / "three.svg").read_text()


def test_plots_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = save(tmp_path / "a.json", lengths())
    b = save(tmp_path / "b.json", document([row("chunked", 512, 1.0, operation="ffn")]))
    for arguments, message in (
        ([a, str(tmp_path / "plot.jpg")], "a plot must end in .png or .svg, got 'plot.jpg'"),
        ([a], "give the results and then the file to draw"),
        ([a, b, str(tmp_path / "plot.png")], "a plot shows one operation, got results of ffn, lsh"),
        ([a, "/nowhere/plot.png"], "the folder /nowhere does not exist"),
    ):
        result = invoke("plot", *arguments)
        assert result.exit_code == 2 and message in plain(result.output)
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    result = invoke("plot", a, str(tmp_path / "plot.png"))
    assert result.exit_code == 2 and "pip install matplotlib" in plain(result.output)
    assert invoke("lsh", "--plot", str(tmp_path / "plot.png")).exit_code == 2


def test_crossings_are_interpolated_on_logarithmic_axes() -> None:
    x = [512.0, 1024.0, 4096.0]
    ours = Line("ours", True, x=x, y=[length * 1e-6 for length in x])
    other = Line("other", False, x=x, y=[length**2 / 2048 * 1e-6 for length in x])
    ((length, seconds),) = plots.crossings(ours, other)
    assert (length, seconds) == pytest.approx((2048, 2048e-6))
    assert plots.crossings(other, ours) == []
    slow = Line("slow", True, x=x, y=[1.0, 1.0, 1e-9])
    assert plots.fastest_of([ours, slow]).y == [*ours.y[:2], 1e-9]


def test_labels() -> None:
    assert [plots.short_count(n) for n in (100, 1024, 1536, 2**20)] == ["100", "1K", "1536", "1M"]
    assert [plots.time_label(t) for t in (2.0, 0.001, 1e-5)] == ["2 s", "1 ms", "10 µs"]
    assert [tables.seconds(t) for t in (2.0, 0.0123, 1e-5)] == ["2.00 s", "12.3 ms", "10.0 us"]
    assert [tables.memory(n) for n in (None, 512, 3 * 2**20, 2**30)] == [
        "",
        "0.50 KiB",
        "3.00 MiB",
        "1.00 GiB",
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_tables_fit_the_terminal(width: int) -> None:
    from rich.console import Console

    ratios = dict.fromkeys(("torch SDPA", "Hugging Face", "reformer_pytorch"), 12.3)
    rows = [row("window=bucket", 1024, 1.0, ratios=ratios, phase="forward+backward")]
    others = [row(name, 1024, 1.0, ours=False, phase="forward+backward") for name in ratios]
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    tables.print_results(document(rows + others), console)
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines)
    assert any("window=bucket" in line and "1.00 s" in line for line in lines)
    assert any("vs SDPA" in line for line in lines) == (width >= 60)
    assert not any("…" in line for line in lines)
