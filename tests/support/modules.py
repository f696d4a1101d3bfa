"""The lists of modules in tests/data/modules."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "data/modules"
FILES = sorted(path.stem for path in FOLDER.glob("*.txt"))


def modules(name: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every module of a list."""
    lines = (FOLDER / f"{name}.txt").read_text("utf-8").splitlines()
    words = (line.split() for line in lines)
    return {x: (int(m), int(n)) for pattern, m, n in words for x in spelled_out(pattern)}


def spelled_out(pattern: str) -> Iterator[str]:
    """A pattern with its ranges of numbers spelled out."""
    if found := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        for number in range(int(found[1]), int(found[2]) + 1):
            yield from spelled_out(pattern[: found.start()] + str(number) + pattern[found.end() :])
    else:
        yield pattern
