"""Coefficients of adapters at any level, brought to one for each module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import options
from ..adapters.stems import joined, split
from ..errors import OptionError

__all__ = ["LEVELS", "Addresses", "Kappa"]

LEVELS = ("task", "layer", "module", "direction")

Kappa = Tensor | Sequence[Any] | Mapping[str, Any]
"""A tensor, numbers in lists, or numbers by pattern of the modules' names."""


@dataclass(frozen=True)
class Addresses:
    """What coefficients are of: modules by name, T adapters, and the stacked rank R of the module
    that has the most."""

    modules: tuple[str, ...]
    adapters: int
    rank: int

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The layers of the model that has the modules: "model.layers.3"; lists of layers in the
        order of the modules, their layers by number. A module outside of such lists is a layer."""
        return tuple(dict.fromkeys(name for _, name in sorted(map(self._place, self.modules))))

    @cached_property
    def _stems(self) -> dict[str, int]:
        return {stem: k for k, stem in enumerate(dict.fromkeys(map(_stem, self.modules)))}

    def _place(self, module: str) -> tuple[tuple[int, int], str]:
        stem, rest = split(module)
        number = rest.partition(".")[0]
        name = joined(stem, number) if rest else module
        return (self._stems[_stem(module)], int(number) if rest else 0), name

    @cached_property
    def layer_of(self) -> Tensor:
        """The layer's number of every module."""
        order = {name: k for k, name in enumerate(self.layers)}
        return torch.tensor([order[self._place(name)[1]] for name in self.modules])

    def expand(self, kappa: Kappa, level: str | None = None) -> Tensor:
        """[.., modules, T] of coefficients at a level, or [.., modules, R] of "direction".

        kappa: [T] for "task", [.., layers, T], [.., modules, T] or [.., modules, R]; or a mapping
        of patterns of modules' names to [T], of which every module matches one: the first counts.
        With the level named, "task" takes [.., T], too. level: None finds it by the shape: "task"
        of one dimension, then "module" and "layer" by T, and "direction". Gradients reach what is
        given. OptionError for what fits no level, and for what is not finite.
        """
        if isinstance(kappa, Mapping):
            return self._of_patterns(kappa)
        given = _tensor(kappa)
        if level is not None:
            options.choose("level", level, LEVELS)
        found = level or self._level(given)
        rows = {"layer": len(self.layers), "module": len(self.modules)}.get(found)
        rows = len(self.modules) if found == "direction" else rows
        width = self.rank if found == "direction" else self.adapters
        shape = (width,) if rows is None else (rows, width)
        if found is None or tuple(given.shape[-len(shape) :]) != shape:
            raise OptionError("kappa", f"is {list(given.shape)}", self._remedy(level))
        if found == "task":
            return given[..., None, :].expand(*given.shape[:-1], len(self.modules), width)
        if found == "layer":
            return given.index_select(-2, self.layer_of.to(given.device))
        return given

    def expand_one(self, kappa: Kappa, level: str | None, many: str) -> Tensor:
        """`expand` of the coefficients of one merge. many: what takes those of several."""
        found = self.expand(kappa, level)
        if found.dim() != 2:
            raise OptionError("kappa", f"is {list(found.shape)}: many merges", f"say {many}")
        return found

    def expand_many(self, kappas: Kappa, level: str | None) -> Tensor:
        """`expand` of the coefficients [N, ..] of several merges, [N, T] among them."""
        given = _tensor(kappas)
        if level is None and given.dim() == 2 and given.shape[1] == self.adapters:
            level = "task"
        found = self.expand(given, level)
        if found.dim() != 3 or not len(found):
            problem = f"is {list(given.shape)}, no merges at a level"
            raise OptionError("kappas", problem, "give [N, T], or [N, modules, T]")
        return found

    def _level(self, given: Tensor) -> str:
        if given.dim() < 2:
            return "task"
        rows, width = given.shape[-2:]
        if width == self.adapters and rows in (len(self.modules), len(self.layers)):
            return "module" if rows == len(self.modules) else "layer"
        return "direction"

    def _remedy(self, level: str | None) -> str:
        shapes = {
            "task": f"[{self.adapters}] for a level of all modules",
            "layer": f"[{len(self.layers)}, {self.adapters}] by layer",
            "module": f"[{len(self.modules)}, {self.adapters}] by module",
            "direction": f"[{len(self.modules)}, {self.rank}] by direction",
        }
        return f"give {shapes[level] if level else ', or '.join(shapes.values())}"

    def _of_patterns(self, kappa: Mapping[str, Any]) -> Tensor:
        rows = {pattern: _tensor(row) for pattern, row in kappa.items()}
        for pattern, row in rows.items():
            if tuple(row.shape) != (self.adapters,):
                problem = f"{pattern!r} has {list(row.shape)}"
                raise OptionError("kappa", problem, f"give it {self.adapters} numbers")
            if not any(fnmatchcase(name, pattern) for name in self.modules):
                problem = f"{pattern!r} matches no module"
                raise OptionError("kappa", problem, f"there is, for one, {self.modules[0]!r}")
        found: list[Tensor] = []
        for name in self.modules:
            own = next((row for pattern, row in rows.items() if fnmatchcase(name, pattern)), None)
            if own is None:
                raise OptionError("kappa", f"no pattern matches {name!r}", "add one, as '*', last")
            found.append(own)
        return torch.stack(found)


def _stem(module: str) -> str:
    stem, rest = split(module)
    return stem if rest else module


def _tensor(kappa: Any) -> Tensor:
    if not isinstance(kappa, Tensor):
        try:
            kappa = torch.tensor(kappa, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            problem = f"{str(kappa)[:40]!r} is no tensor of numbers"
            raise OptionError("kappa", problem, "give one number for each adapter") from error
    if not kappa.is_floating_point():
        kappa = kappa.double()
    if not bool(torch.isfinite(kappa.detach()).all()):
        raise OptionError("kappa", "has NaN or infinite numbers", "give finite ones")
    return kappa
