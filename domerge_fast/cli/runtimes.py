"""domerge-fast runtimes: the programs that outputs are made for, and what they demand."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator, Mapping

from . import shared, streams

if typing.TYPE_CHECKING:
    from ..lists import RuntimeInfo

__all__ = ["COMMAND"]


def run(args: argparse.Namespace) -> int:
    from .. import lists

    found = lists.list_runtimes()
    plain = {name: dataclasses.asdict(row) for name, row in found.items()}
    shared.show(args, plain, lambda: _lines(found))
    return 0


def _lines(found: Mapping[str, RuntimeInfo]) -> Iterator[str]:
    for name, row in found.items():
        yield f"{name}: {row.title}" + (f"; off: {row.why_not}" if row.why_not else "")
        rows = [*row.demands.items(), ("read in", row.source)]
        yield from streams.table([(f"  {what}", words) for what, words in rows])


COMMAND = shared.Command("runtimes", "list programs and what they demand", shared.add_json, run)
