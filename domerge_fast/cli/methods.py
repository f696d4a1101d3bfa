"""domerge-fast methods: what there is to choose from."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping

from . import shared, streams

if typing.TYPE_CHECKING:
    from ..lists import MethodInfo

__all__ = ["COMMAND"]


def run(args: argparse.Namespace) -> int:
    from .. import lists

    found = lists.list_methods()
    plain = {name: dataclasses.asdict(row) for name, row in found.items()}
    shared.show(args, plain, lambda: _lines(found))
    return 0


def _lines(found: Mapping[str, MethodInfo]) -> list[str]:
    rows = [("method", "returns", "what it does")]
    for name, row in found.items():
        needs = f"; needs {row.needs}" if row.needs else ""
        source = f" ({row.source})" if row.source else ""
        rows.append((name, row.returns, f"{row.summary}{source}; {row.cost}{needs}"))
    return streams.table(rows)


COMMAND = shared.Command("methods", "list the merge methods", shared.add_json, run)
