"""What a command prints: standard streams may be closed, full, or unable to show a character."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

__all__ = ["Unprintable", "matrix", "show", "table", "tell", "usable", "wrap"]

WIDTH = 80
"""Columns of what is no terminal."""

NARROW = 13
"""Columns that a column of a table gets at least."""


class Unprintable(Exception):
    """Standard output takes no more; the cause is the OSError."""


@contextlib.contextmanager
def usable() -> Iterator[None]:
    """sys.stdout and sys.stderr as text files for as long as the block runs: closed ones lead
    nowhere, and what stdout cannot encode is replaced by "?"."""
    _occupy()
    before = sys.stdout, sys.stderr
    errors = getattr(sys.stdout, "errors", None)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
        _set_errors(sys.stdout, "replace")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            _set_errors(sys.stdout, errors)
            sys.stdout, sys.stderr = before


def _occupy() -> None:
    """No file that is opened later may stand where something prints to a standard stream."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _set_errors(stream: TextIO, errors: str | None) -> None:
    if errors is not None and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors=errors)


def show(lines: Iterable[str]) -> None:
    """Print lines to standard output, now. Unprintable."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except OSError as error:
        _abandon(sys.stdout)
        raise Unprintable from error


def tell(line: str) -> None:
    """Print a line to standard error, if that takes one: the exit code tells the rest."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _abandon(sys.stderr)


def _abandon(stream: TextIO) -> None:
    """Nothing may be left to write at exit, where it would fail again."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()


def width() -> int:
    """Columns that a line may have."""
    if sys.stdout is not None and sys.stdout.isatty():
        return shutil.get_terminal_size((WIDTH, 24)).columns
    return WIDTH


def wrap(text: str) -> list[str]:
    """A sentence as lines that fit the width."""
    return textwrap.wrap(
        text, width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def shorten(name: str, most: int) -> str:
    """A name of at most so many characters: what is too long loses its middle."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail]}…{name[len(name) - tail :]}"


def table(rows: Sequence[Sequence[str]], names: int | None = None) -> list[str]:
    """Lines of a table that fits the width: the widest columns are wrapped, but the one of `names`
    is shortened, and only then."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    room = width() - 2 * (len(widths) - 1)
    while sum(widths) > room and max(widths) > NARROW:
        at = widths.index(max(widths))
        if names is not None and widths[names] > NARROW:
            at = names
        widths[at] -= 1
    lines = []
    for row in rows:
        cells = [
            [shorten(text, most)]
            if k == names
            else textwrap.wrap(text, most, break_on_hyphens=False) or [""]
            for k, (text, most) in enumerate(zip(row, widths))
        ]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            lines.append("  ".join(p.ljust(w) for p, w in zip(parts, widths)).rstrip())
    return lines


def matrix(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of which the first column is repeated where the others do not fit side by
    side."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines: list[str] = []
    begin = 1
    while begin < len(widths):
        room, end = width() - widths[0], begin
        while end < len(widths) and (end == begin or room >= 2 + widths[end]):
            room -= 2 + widths[end]
            end += 1
        lines += table([(row[0], *row[begin:end]) for row in rows])
        begin = end
    return lines
