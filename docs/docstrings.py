"""How the API pages read the package's docstrings: a Griffe extension for mkdocstrings.

Docstrings are written for the reader of the source. Three of their habits would come out wrong as Markdown:
doctests that stand in the text, formulas set off by indentation or by nothing, and results written as
`-> out (B, H, L, D)` at the start of a line.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

RESULT = re.compile(r"(?m)^(\s*)(?:-> |→ )")
SECTIONS = re.compile(r"(?m)^(\s*)(Example|Shapes):$")


def as_markdown(text: str) -> str:
    """The same docstring with doctests in fenced blocks, results named, and every section a known one."""
    text = SECTIONS.sub(
        lambda found: found[1] + ("Examples:" if found[2] == "Example" else "**Shapes**\n"), text
    )
    text = RESULT.sub(r"\n\1**Returns** ", text)
    lines: list[str] = []
    in_doctest = in_examples = False
    for line in text.splitlines():
        stripped = line.strip()
        if stripped == "Examples:":
            in_examples = True
        if stripped.startswith(">>>") and not in_doctest and not in_examples:
            in_doctest = True
            lines += ["", "```pycon"]
        elif in_doctest and not stripped:
            in_doctest = False
            lines.append("```")
        lines.append(line)
    if in_doctest:
        lines.append("```")
    return "\n".join(lines)


class ReadableDocstrings(Extension):
    """Rewrites each docstring before its sections are parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = as_markdown(obj.docstring.value)
