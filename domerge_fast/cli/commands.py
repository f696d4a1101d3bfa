"""The table of commands. A new one is one new file and one line here."""

from __future__ import annotations

from . import bench, completion, doctor, inspect, merge, methods, sequential
from .shared import Command

COMMANDS: dict[str, Command] = {
    m.COMMAND.name: m.COMMAND
    for m in (merge, inspect, sequential, methods, bench, doctor, completion)
}
