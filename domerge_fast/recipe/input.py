"""An adapter, the base model or features, as a recipe names them."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..storage import hub
from ..storage.find import find, has

__all__ = ["Input", "located"]


@dataclass(frozen=True)
class Input:
    """An adapter, or the base model: its path, or its name where a path would tell too much, and
    the SHA-256 of its files by their names ({} where it has none, or they are not known)."""

    name: str
    files: Mapping[str, str] = field(default_factory=dict)

    def plain(self) -> Any:
        return {"name": self.name, "files": dict(self.files)} if self.files else self.name

    def absolute(self) -> Input:
        if hub.is_id(self.name):
            return self
        return dataclasses.replace(self, name=os.path.abspath(self.name))

    @classmethod
    def of(cls, option: str, plain: Any) -> Input:
        """From a path, or a mapping of `name` and `files`. OptionError."""
        if isinstance(plain, cls):
            return plain
        if isinstance(plain, (str, os.PathLike)):
            plain = {"name": os.fspath(plain)}
        if not isinstance(plain, Mapping) or not plain.keys() <= {"name", "files"}:
            raise OptionError(option, f"{str(plain)[:40]!r} is no path", "give one")
        name, files = plain.get("name"), plain.get("files", {})
        if not isinstance(name, str) or not name or "\0" in name:
            raise OptionError(option, f"{str(name)[:40]!r} is no folder", "give its path")
        if not isinstance(files, Mapping) or not all(map(_is_sum, files.items())):
            problem = f"the files of {name!r} are no names with their SHA-256"
            raise OptionError(option, problem, "leave 'files' out, or restore it")
        return cls(name, dict(files))


def _is_sum(item: tuple[Any, Any]) -> bool:
    name, digest = item
    is_name = isinstance(name, str) and os.path.basename(name) == name != ""
    return is_name and bool(re.fullmatch("[0-9a-f]{64}", str(digest)))


def located(x: Input, beside: Path, under: Path | None) -> Input:
    place = (under or beside) / x.name
    if under is None and hub.is_id(x.name) and not os.path.lexists(place):
        refuse = functools.partial(_elsewhere, x.name)
        if not x.files or has(hub.local(x.name, [*x.files], refuse), x.files):
            return x
    if x.files and under is None and not has(place, x.files):
        raise _elsewhere(x.name, "is not here as the recipe's files were")
    if x.files and under is not None:
        place = find(x.name, x.files, under)
    return dataclasses.replace(x, name=os.fspath(place))


def _elsewhere(name: str, problem: str, remedy: str = "") -> OptionError:
    remedy = "say below which folder they are (--adapters DIR)"
    return OptionError("adapters", f"{name!r} {problem}", remedy)
