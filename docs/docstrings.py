"""Docstrings of this package as reStructuredText, for Sphinx.

What an argument is stands in a docstring as `name: what it is`, continued further in; blocks that
are indented after an empty line are code; nothing is markup but backticks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

TERM = re.compile(r"(\w+(?:, \w+)*): (.*)")
MARKUP = re.compile(r"(``?)([^`]+)\1|([\\*|_`])")


def restructured(lines: Sequence[str]) -> list[str]:
    """The same text; terms become definitions, code literal blocks."""
    found: list[str] = []
    kind = before = ""
    for line in lines:
        term = TERM.fullmatch(line)
        if not line.strip():
            found.append("")
        elif line.startswith("    ") and before and kind == "term":
            found.append(f"    {escaped(line.strip())}")
        elif line.startswith("    "):
            if kind != "code":
                found += ["::", ""]
            kind = "code"
            found.append(line)
        elif term and (not before or kind == "term"):
            kind = "term"
            found += [f"**{escaped(term[1])}**", f"    {escaped(term[2])}"]
        else:
            if kind in ("term", "code"):
                found.append("")
            kind = "text"
            found.append(escaped(line))
        before = line.strip()
    return found


def escaped(text: str) -> str:
    """Backticks as literals, all other markup as the characters that it is."""
    return MARKUP.sub(lambda x: f"``{x[2]}``" if x[2] else f"\\{x[3]}", text)
