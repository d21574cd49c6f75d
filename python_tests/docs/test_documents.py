"""README.md and docs/ hold what they promise: their Python blocks run, and the README stays short."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import reformer_kernels
from reformer_kernels import functional, hf, models, modules, reversible

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
NOT_RUN = "# not run: "
"""The first line of a block that the tests leave out, with the reason after it."""

LONGEST_README = 150
LONGEST_BLOCK = 20

BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, block in enumerate(BLOCK.findall(page.read_text()), 1)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_block(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block runs by itself, as somebody who copies it would run it."""
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) <= LONGEST_BLOCK, f"{len(lines)} lines:\n{block}"
    if lines[0].startswith(NOT_RUN):
        pytest.skip(lines[0].removeprefix(NOT_RUN))
    monkeypatch.chdir(tmp_path)  # for the files that a block writes
    torch.manual_seed(0)
    exec(compile(block, "block", "exec"), {"__name__": "block"})


def test_readme_is_short() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= LONGEST_README
    assert len(BLOCK.findall(readme)) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links and images name files that exist."""
    targets = re.findall(
        r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    )
    for target in targets:
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_public_names() -> None:
    names = {
        "LSHConfig", "MultiheadAttention", "LSHSelfAttention", "LocalSelfAttention", "ChunkedFeedForward",
        "ReversibleSequence", "AxialPositionalEmbedding", "Reformer", "ReformerLM", "replace_attention",
    }  # fmt: skip
    functions = {
        "sample_rotations", "lsh_hash", "bucket_sort", "lsh_layout", "attend", "lsh_attention",
        "local_attention", "lsh_cross_attention", "chunked_feed_forward", "linear_cross_entropy",
    }  # fmt: skip
    for module, wanted in ((reformer_kernels, names), (functional, functions)):
        assert wanted <= set(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
    for name in ("load_state_dict", "from_pretrained", "accelerate"):
        assert callable(getattr(hf, name))


def test_api_pages_cover_the_public_names() -> None:
    """The pages in docs/api show what these packages export, and two values by name."""
    documented = {"LSHConfig", "Layout", "functional"}
    for package in (functional, modules, reversible, models, hf):
        documented |= set(package.__all__)
        pages = [page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")]
        assert any(f"::: {package.__name__}\n" in page for page in pages)
    assert set(reformer_kernels.__all__) <= documented


def test_measurements_are_those_of_the_results() -> None:
    """docs/measurements.md is what docs/measurements.py writes."""
    page = runpy.run_path(str(ROOT / "docs" / "measurements.py"))["page"]()
    assert page == (ROOT / "docs" / "measurements.md").read_text(), "run: python docs/measurements.py"
