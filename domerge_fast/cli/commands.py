"""The table of commands. A new one is one new file and one line here."""

from __future__ import annotations

from ..registry import Registry
from . import (
    bench,
    check,
    completion,
    convert,
    doctor,
    explore,
    formats,
    inspect,
    merge,
    methods,
    osrm,
    plan,
    recipe,
    run,
    runtimes,
    sequential,
    streamed,
    tune,
)
from .shared import Command

__all__ = ["COMMANDS"]

COMMANDS = Registry(
    "command",
    Command,
    (
        m.COMMAND
        for m in (
            *(merge, run, recipe, inspect, check, convert, sequential, streamed),
            *(methods, formats, runtimes),
            *(explore, osrm, tune, plan, bench, doctor, completion),
        )
    ),
)
