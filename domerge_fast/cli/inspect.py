"""domerge-fast inspect: tables of how much adapters interfere."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Iterator

from ..errors import printable
from . import shared, streams

if typing.TYPE_CHECKING:
    from ..results.report import Interference, OnInputs

__all__ = ["COMMAND"]

BOLD = "1"
MOST_SHOWN = 12
"""Modules in the table of cosines with a direction; JSON has all."""


def fill(parser: argparse.ArgumentParser) -> None:
    shared.add_sources(parser, "no progress")
    parser.add_argument("--against", metavar="ADAPTER", help="cosines with this adapter's update")
    help = "how far they move outputs on other tasks' inputs, of 'osrm features'"
    parser.add_argument("--features", metavar="FILE", help=help)
    said = "of the adapters: details, full or norms (default: full)"
    parser.add_argument("--report", help=said)
    shared.add_pages(parser)
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from .. import api

    shared.check_pages(args)
    given = shared.given(args)
    found = api.inspect(given.pop("adapters"), progress=shared.shows_progress(args), **given)
    shared.write_pages(args, found)
    shared.show(args, found.to_dict(), lambda: _lines(found))
    return 0


def _lines(found: Interference) -> Iterator[str]:
    numbers = [str(i) for i in range(1, len(found.adapters) + 1)]
    head = ("", "adapter", "norm of ΔW", "least of a module", "median", "largest")
    rows = [
        (k, name, *(f"{v:.4g}" for v in (norm, *spread)))
        for k, name, norm, spread in zip(
            numbers, map(printable, found.adapters), found.norms, found.spread
        )
    ]
    yield from streams.table([head, *rows], names=1)
    titles = (
        "overlap of row spaces (A): 0 orthogonal, 1 the same",
        "overlap of column spaces (B): 0 orthogonal, 1 the same",
        "cosine between the updates",
    )
    for title, table in zip(titles, found.tables or ()):
        cells = [(k, *(f"{v:.3f}" for v in row)) for k, row in zip(numbers, table)]
        said = streams.coloured(title, BOLD, sys.stdout)
        yield from ("", said, *streams.matrix([("", *numbers), *cells]))
    if found.direction:
        yield from ("", *_along(found))
    if found.on_inputs:
        yield from ("", *_on_inputs(found.on_inputs))
    if found.notes:
        yield from ("", *shared.notes(found.notes))


def _along(found: Interference) -> Iterator[str]:
    """The cosines with a direction: of all modules, and of those where one goes farthest."""
    assert found.direction
    modules = found.direction.modules
    yield f"cosine with {printable(found.direction.name)}"
    numbers = [str(i) for i in range(1, len(found.adapters) + 1)]
    farthest = sorted(modules, key=lambda n: -max(abs(x or 0.0) for x in modules[n]))[:MOST_SHOWN]
    rows = [("all modules", found.direction.cosine), *((n, modules[n]) for n in farthest)]
    cells = [(printable(n), *("" if x is None else f"{x:.3f}" for x in row)) for n, row in rows]
    yield from streams.table([("module", *numbers), *cells], names=0)


def _on_inputs(found: OnInputs) -> Iterator[str]:
    """How far the adapters move outputs on other tasks' inputs: of all modules, and of those where
    one does most."""
    yield f"moved on the inputs of {', '.join(map(printable, found.tasks))}, its own left out:"
    yield "1 as on inputs without a preferred direction"
    numbers = [str(i) for i in range(1, len(found.moved) + 1)]
    modules = found.modules
    farthest = sorted(modules, key=lambda n: -max(x or 0.0 for x in modules[n]))[:MOST_SHOWN]
    rows = [("all modules", found.moved), *((n, modules[n]) for n in farthest)]
    cells = [(printable(n), *("" if x is None else f"{x:.3g}" for x in row)) for n, row in rows]
    yield from streams.table([("module", *numbers), *cells], names=0)


COMMAND = shared.Command("inspect", "show how much adapters interfere", fill, run)
