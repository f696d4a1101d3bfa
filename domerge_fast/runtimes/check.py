"""Whether the files of an adapter are what a runtime takes."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from ..adapters import Adapter
from ..errors import AdapterError
from ..formats import load
from ..formats.names.join import models_of
from ..formats.names.models import STYLES
from . import RUNTIMES, told
from .demands import Miss, misses
from .facts import of_adapter
from .runtime import Runtime

__all__ = ["Check", "check"]


@dataclass(frozen=True)
class Check:
    """misses: what the runtime demands and the files do not have. notes: what whoever starts it has
    to know."""

    path: str
    format: str
    runtime: str
    misses: tuple[Miss, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.misses

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ok": self.ok}


def check(path: str | os.PathLike[str], runtime: str) -> Check:
    """All that a runtime, of `list_runtimes()`, demands and the files of an adapter do not have.

    Reads its config and headers; writes nothing. AdapterError as `load`; OptionError for an unknown
    runtime.
    """
    row = RUNTIMES.choose("runtime", runtime)
    adapter = load(path)
    facts = of_adapter(adapter)
    found = tuple(misses(row, facts))
    notes = (*(told(row, facts) if not found else ()), *_of_names(row, adapter))
    return Check(os.fspath(path), facts.format, row.name, found, notes)


def _of_names(runtime: Runtime, adapter: Adapter) -> tuple[str, ...]:
    """Whose modules' names they are, where a runtime passes over those that it does not know."""
    if not runtime.skips or not adapter.style or adapter.style.names not in STYLES:
        return ()
    try:
        models = models_of([adapter])
    except AdapterError as error:
        strange = f"{error.module!r} is in no table of names here"
        return (f"{strange}, and {runtime.title} passes over names that it does not know",)
    return (f"its modules are those of {' or '.join(model.title for model in models)}",)
