"""domerge-fast formats: what adapters are read from, and merges written as."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping

from . import shared, streams

if typing.TYPE_CHECKING:
    from ..lists import FormatInfo

__all__ = ["COMMAND"]


def run(args: argparse.Namespace) -> int:
    from .. import lists

    found = lists.list_formats()
    plain = {name: dataclasses.asdict(row) for name, row in found.items()}
    shared.show(args, plain, lambda: _lines(found))
    return 0


def _lines(found: Mapping[str, FormatInfo]) -> list[str]:
    rows: list[tuple[str, ...]] = [("format", "form", "read", "written", "what it is")]
    for name, row in found.items():
        off = f"; off: {row.why_not}" if row.why_not else ""
        does = ("yes" if can else "no" for can in (row.reads, row.writes))
        rows.append((name, row.form, *does, f"{row.summary}{off}"))
    return streams.table(rows)


COMMAND = shared.Command("formats", "list the formats of files", shared.add_json, run)
