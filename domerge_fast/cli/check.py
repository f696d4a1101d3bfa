"""domerge-fast check: whether a program takes the files of an adapter."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterator

from ..errors import printable
from . import shared, streams

if typing.TYPE_CHECKING:
    from ..api import Check

__all__ = ["COMMAND"]

REFUSED = 2


def fill(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder or file")
    shared.add_runtime(parser, required=True)
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from .. import api

    found = api.check(args.adapter, args.runtime)
    shared.show(args, found.plain(), lambda: _lines(found))
    if found.ok:
        return 0
    problem = f"{printable(found.path)!r} is not what {found.runtime} takes"
    streams.tell(f"domerge-fast: error: {problem}; demands not met: {len(found.misses)}")
    return REFUSED


def _lines(found: Check) -> Iterator[str]:
    if found.ok:
        yield f"{printable(found.path)}: {found.runtime} takes it"
    for miss in found.misses:
        yield from streams.wrap(f"{printable(miss.what)}: {miss.why}; {miss.remedy}")
    if not found.ok:
        how = f"'domerge-fast merge {printable(found.path)} -o OUT --for {found.runtime}'"
        yield from streams.wrap(
            f"{how} writes what it takes, with the options that are named above"
        )
    yield from shared.notes(found.notes)


COMMAND = shared.Command("check", "tell what a program would not take of an adapter", fill, run)
