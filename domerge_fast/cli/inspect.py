"""domerge-fast inspect: tables of how much adapters interfere."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterator

from ..errors import printable
from . import shared, streams

if typing.TYPE_CHECKING:
    from ..results.report import Interference

__all__ = ["COMMAND"]


def fill(parser: argparse.ArgumentParser) -> None:
    shared.add_sources(parser, "no progress")
    shared.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from .. import api

    given = shared.given(args)
    found = api.inspect(given.pop("adapters"), progress=shared.shows_progress(args), **given)
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
    for title, table in (
        ("overlap of row spaces (A): 0 orthogonal, 1 the same", found.rows),
        ("overlap of column spaces (B): 0 orthogonal, 1 the same", found.columns),
        ("cosine between the updates", found.cosine),
    ):
        cells = [(k, *(f"{v:.3f}" for v in row)) for k, row in zip(numbers, table)]
        yield from ("", title, *streams.matrix([("", *numbers), *cells]))
    if found.notes:
        yield from ("", *shared.notes(found.notes))


COMMAND = shared.Command("inspect", "show how much adapters interfere", fill, run)
