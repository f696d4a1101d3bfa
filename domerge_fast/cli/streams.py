"""What a command prints: standard streams may be closed, full, or unable to show a character."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import textwrap
import typing
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from ..errors import printable

__all__ = ["Unprintable", "coloured", "matrix", "show", "table", "tell", "usable", "wrap"]

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
        return max(NARROW, shutil.get_terminal_size((WIDTH, 24)).columns)
    return WIDTH


def coloured(text: str, code: str, stream: TextIO) -> str:
    """The text in a colour (a code of ANSI's), where the stream is a terminal that has some and
    nobody asked for none (NO_COLOR)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


def cells(text: str) -> int:
    """Columns of a terminal that a text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def wrap(text: str) -> list[str]:
    """A sentence as lines that fit the width."""
    return _wrapped(printable(text), width(), subsequent_indent="  ", break_long_words=False)


def _wrapped(text: str, most: int, **options: typing.Any) -> list[str]:
    """Lines of so many columns at most."""
    wide = cells(text) > len(text)
    return textwrap.wrap(
        text, max(1, most // 2) if wide else most, break_on_hyphens=False, **options
    )


def shorten(name: str, most: int) -> str:
    """A name of so many columns at most: what is too long loses its middle."""
    if cells(name) <= most:
        return name
    texts = (_without_middle(name, kept) for kept in range(most - 1, 0, -1))
    return next((text for text in texts if cells(text) <= most), "…")


def _without_middle(name: str, kept: int) -> str:
    tail = kept // 2
    return f"{name[: kept - tail]}…{name[len(name) - tail :]}"


def table(rows: Sequence[Sequence[str]], names: int | None = None) -> list[str]:
    """Lines of a table that fits the width: the widest columns are wrapped, but the one of `names`
    is shortened, and only then."""
    rows = [[printable(text) for text in row] for row in rows]
    widths = [max(cells(row[k]) for row in rows) for k in range(len(rows[0]))]
    room = width() - 2 * (len(widths) - 1)
    while sum(widths) > room and max(widths) > NARROW:
        at = widths.index(max(widths))
        if names is not None and widths[names] > NARROW:
            at = names
        widths[at] -= 1
    lines = []
    for row in rows:
        parts_of = [
            [shorten(text, most)] if k == names else _wrapped(text, most) or [""]
            for k, (text, most) in enumerate(zip(row, widths))
        ]
        for parts in itertools.zip_longest(*parts_of, fillvalue=""):
            padded = (part + " " * (most - cells(part)) for part, most in zip(parts, widths))
            lines.append("  ".join(padded).rstrip())
    return lines


def matrix(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table of which the first column is repeated where the others do not fit side by
    side."""
    widths = [max(cells(row[k]) for row in rows) for k in range(len(rows[0]))]
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
