"""The names of methods, steps, forms, formats and runtimes, and the methods' options, known without
importing these: torch takes a second, help none.

    python -m domerge_fast.cli.flags        # writes flags.json anew, after a method has changed
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..registry import are_added

__all__ = ["add_method_options", "known"]

STORED = Path(__file__).with_name("flags.json")
KINDS = {"bool": bool, "float": float, "int": int, "str": str}


@dataclass(frozen=True)
class Flag:
    """An option of methods: defaults by the names of those that have it."""

    name: str
    kind: str
    help: str
    choices: tuple[str, ...]
    defaults: dict[str, Any]


@dataclass(frozen=True)
class Flags:
    """methods: their names. pre, post: those of steps. forms: what is
    written. formats: those that are written. runtimes: their names."""

    methods: tuple[str, ...]
    pre: tuple[str, ...]
    post: tuple[str, ...]
    forms: tuple[str, ...]
    formats: tuple[str, ...]
    runtimes: tuple[str, ...]
    options: tuple[Flag, ...]


def known() -> Flags:
    """What the tables say where they are loaded or longer than ours; otherwise what is stored."""
    if "domerge_fast.methods" in sys.modules or are_added(
        "method", "pre", "post", "format", "runtime"
    ):
        return of_tables()
    plain = json.loads(STORED.read_text(encoding="utf-8"))
    options = tuple(Flag(**x | {"choices": tuple(x["choices"])}) for x in plain.pop("options"))
    return Flags(**{name: tuple(words) for name, words in plain.items()}, options=options)


def of_tables() -> Flags:
    from ..formats import FORMATS
    from ..formats.format import FORMS
    from ..methods import TABLE
    from ..methods.steps import POST, PRE
    from ..recipe import SVC
    from ..runtimes import RUNTIMES

    found: dict[str, Flag] = {}
    for method in TABLE.values():
        kinds = typing.get_type_hints(method.options)
        for field in dataclasses.fields(method.options):
            help, words = field.metadata["help"], tuple(field.metadata["choices"])
            new = Flag(field.name, kinds[field.name].__name__, help, words, {})
            found.setdefault(field.name, new).defaults[method.name] = field.default
    steps = tuple(PRE), (SVC, *POST)
    formats = tuple(name for name, row in FORMATS.items() if row.write)
    names = formats, tuple(RUNTIMES)
    return Flags(tuple(TABLE), *steps, FORMS, *names, tuple(found.values()))


def store() -> None:
    text = json.dumps(dataclasses.asdict(of_tables()), indent=1, ensure_ascii=False)
    STORED.write_text(text + "\n", encoding="utf-8")


def add_method_options(parser: argparse.ArgumentParser, options: tuple[Flag, ...]) -> None:
    """A group of flags for the methods that share them."""
    for methods in dict.fromkeys(tuple(x.defaults) for x in options):
        group = parser.add_argument_group(f"options of {', '.join(methods)}")
        for option in options:
            if tuple(option.defaults) == methods:
                _add(group, option)


def _add(group: argparse._ArgumentGroup, option: Flag) -> None:
    values = option.defaults
    alike = len(set(values.values())) == 1
    default = (
        next(iter(values.values())) if alike else ", ".join(f"{v} {k}" for k, v in values.items())
    )
    flag, help = f"--{option.name.replace('_', '-')}", f"{option.help} (default: {default})"
    if option.kind == "bool":
        action = argparse.BooleanOptionalAction
        group.add_argument(flag, action=action, default=argparse.SUPPRESS, help=help)
        return
    metavar = "|".join(option.choices) or option.kind.upper()
    kind = KINDS[option.kind]
    group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=help)


if __name__ == "__main__":
    store()
