"""The table of commands. A new one is one new file and one line here."""

from __future__ import annotations

from ..registry import Registry
from . import (
    bench,
    completion,
    doctor,
    formats,
    inspect,
    merge,
    methods,
    recipe,
    run,
    sequential,
)
from .shared import Command

__all__ = ["COMMANDS"]

COMMANDS = Registry(
    "command",
    Command,
    (
        m.COMMAND
        for m in (
            *(merge, run, recipe, inspect, sequential, methods, formats),
            *(bench, doctor, completion),
        )
    ),
)
