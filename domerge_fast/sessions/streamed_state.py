"""What the folder of a streamed merge (streamed.py) says beside its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..job import versions
from ..recipe import Recipe
from . import disk

__all__ = ["STREAMED", "Addition", "StreamedState"]

STREAMED = disk.Kind(
    "streamed",
    "streamed merge",
    "check the path, or start one there",
    "start again",
    "streamed.json",
)


@dataclass(frozen=True)
class Addition:
    """Of adapters that were added at once. again: modules of which those before were read, too.
    passes: at most, of a descent. left: to its optimum, at most, as estimated, as a share of f.
    few: whether it may be some times that, because a module has few adapters."""

    adapters: int
    again: int
    passes: int
    left: float
    few: bool = False


@dataclass(frozen=True)
class StreamedState:
    """modules: how many adapters each has."""

    recipe: Recipe
    adapters: tuple[Mapping[str, Any], ...] = ()
    modules: Mapping[str, int] = field(default_factory=dict)
    additions: tuple[Addition, ...] = ()

    def write(self, fresh: Path) -> None:
        plain = {
            "versions": versions(),
            "recipe": self.recipe.plain(),
            "adapters": self.adapters,
            "modules": self.modules,
            "additions": [dataclasses.asdict(x) for x in self.additions],
        }
        disk.seal(STREAMED, fresh, plain)

    @classmethod
    def read(cls, folder: Path) -> StreamedState:
        """OptionError unless a streamed merge is there."""
        plain = disk.read(STREAMED, folder)
        try:
            adapters, modules = plain["adapters"], plain["modules"]
            known = [(x["name"], x["place"], {**x["files"]}) for x in adapters]
            found = cls(
                Recipe.of_plain(plain["recipe"]),
                tuple(adapters),
                {name: int(count) for name, count in modules.items()},
                tuple(Addition(**x) for x in plain["additions"]),
            )
            if len(found.recipe.weights or ()) != len(known) or bool(known) != bool(modules):
                raise ValueError("adapters, weights and modules do not go together")
        except (KeyError, TypeError, ValueError, AttributeError, OptionError) as error:
            problem = f"{disk.STATE} is damaged ({type(error).__name__}: {error})"
            raise disk.refusing(folder)(problem, STREAMED.remedy) from error
        return found
