"""Whether adapters are of one base model, as far as their configs say."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import AdapterError
from .adapter import Adapter

__all__ = ["check_base", "states_base"]


def check_base(adapters: Sequence[Adapter], base_model: str | None) -> None:
    """AdapterError unless all that state a base model, and a revision, state the same.

    ``base_model`` states it for all: then nothing is compared. Paths are compared as the folders
    that they lead to; names on the Hub as they are.
    """
    if base_model is not None:
        return
    for field, what in (
        ("base_model_name_or_path", "base model"),
        ("revision", "base model revision"),
    ):
        stated = [
            (adapter, value) for adapter in adapters if (value := getattr(adapter.config, field))
        ]
        for adapter, value in stated[1:]:
            first, expected = stated[0]
            if value == expected or (what == "base model" and _place(value) == _place(expected)):
                continue
            problem = f"its {what} is {value!r}, that of adapter {first.name!r} is {expected!r}"
            if value.casefold() == expected.casefold():
                problem += " (only upper and lower case differ)"
            remedy = "merge adapters of one base, or say base_model=... if they are the same"
            raise AdapterError(adapter.name, None, problem, remedy)


def states_base(adapters: Sequence[Adapter], base_model: str | None) -> bool:
    """Whether all adapters are known to be of one base model, once `check_base` has passed."""
    return base_model is not None or all(a.config.base_model_name_or_path for a in adapters)


def _place(name: str) -> str:
    """The folder that a name leads to, or the name without what means nothing in a path."""
    return os.path.realpath(name) if os.path.isdir(name) else os.path.normpath(name)
