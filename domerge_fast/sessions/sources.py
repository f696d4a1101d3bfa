"""The adapters that a session was made from, as its folder says of them, and read again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..adapters import Adapter
from ..errors import AdapterError
from ..formats import load
from ..reading import Source
from ..storage.digests import Digests

__all__ = ["listed", "loaded", "place"]


def place(source: Source) -> str | None:
    """Where an adapter was read from, from anywhere; None for one in memory."""
    if isinstance(source, Adapter):
        return None
    path = os.fspath(source)
    return os.path.abspath(path) if os.path.lexists(path) else path


def listed(
    names: Sequence[str], places: Sequence[str | None], adapters: Sequence[Adapter]
) -> list[dict[str, Any]]:
    """What `loaded` takes, for a JSON file: names, places, and the sums of the files."""
    with Digests(dict.fromkeys(file for x in adapters for file in x.inputs)) as sums:
        return [
            {"name": name, "place": where, "files": sums.of(x.inputs)}
            for name, where, x in zip(names, places, adapters)
        ]


def loaded(entries: Iterable[Mapping[str, Any]], made: str, again: str) -> list[Adapter]:
    """The adapters as they were. made: what happened to them, again: what would do it anew, for an
    AdapterError about one that has changed, or was in memory."""
    entries, found = list(entries), []
    for entry in entries:
        if entry["place"] is None:
            problem = f"was in memory when it was {made}"
            raise AdapterError(entry["name"], None, problem, f"{again} it again, from a folder")
        found.append(load(entry["place"]))
    with Digests(dict.fromkeys(file for x in found for file in x.inputs)) as sums:
        for entry, adapter in zip(entries, found):
            if sums.of(adapter.inputs) != entry["files"]:
                problem = f"is not what was {made} any more"
                raise AdapterError(entry["name"], None, problem, f"restore it, or {again} again")
    return found
