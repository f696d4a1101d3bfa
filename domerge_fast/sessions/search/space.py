"""What a search may choose: of which groups of modules, which numbers between which bounds.

A *group* is modules that get one method, a *cell* those of a group that get the same numbers: all
of it, or one of its parts (attention and MLP, say). A candidate is a number for each `Choice`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ... import options
from ...adapters.stems import split
from ...errors import OptionError, printable, some

__all__ = ["Candidate", "Choice", "Layout", "Space"]

REST = "rest"
"""The group of modules that lie in no layer, or that no pattern finds."""
NOTHING = "nothing"
"""What a group picks to stay as the base model has it."""


@dataclass(frozen=True)
class Space:
    """The candidates of a search.

    groups: "task" (one for the whole model), "layers:K" (of K decoder layers each), "layer",
        "module", or {pattern: name}, of which the first that a module's name fits counts; what
        lies in no layer, or fits none, is the group "rest".
    parts: {pattern: name} within every group, which get numbers of their own.
    method: names of the prepared merges that each group chooses from; None: all of those given.
    weight: bounds of each adapter's coefficient. 1 for all, where that is within them, is what the
        prepared merge is at first, and is tried first.
    scale: bounds of a factor on a cell's merged update; None: 1.
    density: bounds of the share of entries that methods with a density keep, within 0 and 1; None:
        what each was prepared with.
    pick: instead of numbers, every group picks one adapter alone (merged by the first prepared
        merge: "linear" gives it as it is), one of the prepared merges as it is, or nothing.
    """

    groups: str | Mapping[str, str] = "task"
    parts: Mapping[str, str] = field(default_factory=dict)
    method: Sequence[str] | None = None
    weight: tuple[float, float] = (0.0, 2.0)
    scale: tuple[float, float] | None = None
    pick: bool = False
    density: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _bounds("weight", self.weight)
        if self.scale is not None:
            _bounds("scale", self.scale)
        if self.density is not None:
            _bounds("density", self.density, 0.0, 1.0)
        for name, given in (("groups", self.groups), ("parts", self.parts)):
            if isinstance(given, Mapping):
                for pattern, group in given.items():
                    if not all(isinstance(x, str) and x for x in (pattern, group)):
                        raise OptionError(name, f"{pattern!r}: {group!r}", "give texts")
        if isinstance(self.groups, str):
            _group_length(self.groups)

    def layout(
        self,
        modules: Sequence[str],
        adapters: Sequence[str],
        methods: Sequence[str],
        density: float | None = None,
    ) -> Layout:
        """The choices there are for these modules, adapters and prepared merges. density: what is
        tried first, None for the middle of its bounds. OptionError."""
        allowed = tuple(methods) if self.method is None else tuple(self.method)
        for name in allowed:
            options.choose("method", name, methods)
        if not allowed or len(set(allowed)) < len(allowed):
            raise OptionError("method", f"{list(allowed)} is no choice", "name each once")
        if self.pick and (self.parts or self.scale or self.density):
            raise OptionError("pick", "is of whole groups", "leave parts, scale and density out")
        groups = _named("groups", self.groups, modules)
        parts = _named("parts", self.parts, modules) if self.parts else [""] * len(modules)
        cells = [f"{g}/{p}" if p else g for g, p in zip(groups, parts)]
        return Layout(
            tuple(modules),
            tuple(adapters),
            allowed,
            _order(groups),
            _order(cells),
            (self.weight[0], self.weight[1]),
            self.scale,
            self.pick,
            self.density,
            density,
        )


@dataclass(frozen=True)
class Choice:
    """One number, or one name of several. default: what the prepared merge has, or None where
    the bounds leave that out."""

    name: str
    low: float = 0.0
    high: float = 0.0
    names: tuple[str, ...] = ()
    default: float | str | None = None


@dataclass(frozen=True, eq=False)
class Candidate:
    """A merge that a search tries. methods: of every module, by the name of its prepared merge.
    weights: [modules, T] in float64. scales: [modules], factors on the merged updates. densities:
    [modules], None for what the methods were prepared with."""

    modules: tuple[str, ...]
    adapters: tuple[str, ...]
    methods: tuple[str, ...]
    weights: Tensor
    scales: Tensor
    densities: Tensor | None = None

    def of(self, method: str) -> Tensor:
        """The coefficients of one prepared merge, [modules, T]: 0 where another one has a
        module."""
        mine = torch.tensor([m == method for m in self.methods], dtype=torch.float64)
        return self.weights * mine[:, None]


@dataclass(frozen=True)
class Layout:
    """The choices of a space for given modules, adapters and prepared merges.

    groups, cells: of every module, its group's and its cell's number, by the names that these have.
    """

    modules: tuple[str, ...]
    adapters: tuple[str, ...]
    methods: tuple[str, ...]
    groups: tuple[tuple[str, ...], tuple[int, ...]]
    cells: tuple[tuple[str, ...], tuple[int, ...]]
    weight: tuple[float, float]
    scale: tuple[float, float] | None
    pick: bool
    density: tuple[float, float] | None = None
    usual_density: float | None = None

    @property
    def choices(self) -> tuple[Choice, ...]:
        if self.pick:
            names = (*self._alone, *self._whole, NOTHING)
            first = next(iter(self._whole))
            return tuple(Choice(f"{g} pick", names=names, default=first) for g in self.groups[0])
        found: list[Choice] = []
        if len(self.methods) > 1:
            found += (
                Choice(f"{g} method", names=self.methods, default=self.methods[0])
                for g in self.groups[0]
            )
        for cell in self.cells[0]:
            for name in _labels(self.adapters):
                found.append(_choice(f"{cell} weight of {name}", self.weight))
            if self.scale is not None:
                found.append(_choice(f"{cell} scale", self.scale))
            if self.density is not None:
                usual = self.usual_density
                usual = sum(self.density) / 2 if usual is None else usual
                found.append(_choice(f"{cell} density", self.density, usual))
        return tuple(found)

    @property
    def default(self) -> dict[str, float | str] | None:
        """The prepared merge as it is, where that is within the bounds."""
        known = {c.name: c.default for c in self.choices if c.default is not None}
        return known if len(known) == len(self.choices) else None

    def alone(self, adapter: int) -> dict[str, float | str] | None:
        """One adapter with the coefficient 1, the others 0, where that is within the bounds."""
        if self.pick:
            return {c.name: c.names[adapter] for c in self.choices}
        low, high = self.weight
        start = self.default
        if start is None or low > 0 or high < 1:
            return None
        for cell in self.cells[0]:
            for i, name in enumerate(_labels(self.adapters)):
                start[f"{cell} weight of {name}"] = float(i == adapter)
        return start

    def candidate(self, values: Mapping[str, float | str]) -> Candidate:
        """What a value for each choice makes."""
        if self.pick:
            return self._picked([str(values[c.name]) for c in self.choices])
        labels = _labels(self.adapters)
        weights = torch.tensor(
            [[values[f"{cell} weight of {name}"] for name in labels] for cell in self.cells[0]],
            dtype=torch.float64,
        )
        ones = torch.ones(len(self.cells[0]), dtype=torch.float64)
        scales = ones if self.scale is None else self._of_cells(values, "scale")
        densities = None if self.density is None else self._of_cells(values, "density")
        methods = [
            values[f"{g} method"] if len(self.methods) > 1 else self.methods[0]
            for g in self.groups[0]
        ]
        at = torch.tensor(self.cells[1])
        of_modules = tuple(str(methods[k]) for k in self.groups[1])
        return Candidate(
            self.modules,
            self.adapters,
            of_modules,
            weights[at],
            scales[at],
            None if densities is None else densities[at],
        )

    def _of_cells(self, values: Mapping[str, float | str], what: str) -> Tensor:
        """[cells]"""
        numbers = [float(values[f"{cell} {what}"]) for cell in self.cells[0]]
        return torch.tensor(numbers, dtype=torch.float64)

    @property
    def _alone(self) -> dict[str, int]:
        """What picks one adapter, and its number."""
        return {f"{name} alone": i for i, name in enumerate(_labels(self.adapters))}

    @property
    def _whole(self) -> dict[str, str]:
        """What picks a prepared merge, and which."""
        return {f"all by {method}": method for method in self.methods}

    def _picked(self, picks: Sequence[str]) -> Candidate:
        """From what every group picked."""
        weights = torch.zeros(len(picks), len(self.adapters), dtype=torch.float64)
        methods = []
        for row, picked in zip(weights, picks):
            methods.append(self._whole.get(picked, self.methods[0]))
            if picked in self._whole:
                row.fill_(1.0)
            elif picked != NOTHING:
                row[self._alone[picked]] = 1.0
        at = torch.tensor(self.groups[1])
        of_modules = tuple(methods[k] for k in self.groups[1])
        ones = torch.ones(len(self.modules), dtype=torch.float64)
        return Candidate(self.modules, self.adapters, of_modules, weights[at], ones)


def _choice(name: str, bounds: tuple[float, float], usual: float = 1.0) -> Choice:
    low, high = bounds
    return Choice(name, low, high, default=usual if low <= usual <= high else None)


def _bounds(name: str, given: object, least: float = -math.inf, most: float = math.inf) -> None:
    if not isinstance(given, Sequence) or len(given) != 2:
        raise OptionError(name, f"{given!r} is no pair of bounds", "give (low, high)")
    low, high = (options.check(name, x, float, low=least, high=most) for x in given)
    if not low < high:
        raise OptionError(name, f"{low:g} is not below {high:g}", "give (low, high)")


def _labels(adapters: Sequence[str]) -> list[str]:
    """The adapters' names, with their numbers where two have the same."""
    plain = [printable(a) for a in adapters]
    if len(set(plain)) == len(plain):
        return plain
    return [f"{k}: {name}" for k, name in enumerate(plain, 1)]


def _order(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names that there are, in the order of their numbers, and the place of each one's."""
    at = {name: k for k, name in enumerate(sorted(dict.fromkeys(names), key=_by_number))}
    return tuple(at), tuple(at[name] for name in names)


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """Numbers in a name count as such: layer 2 comes before layer 10."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _named(option: str, given: str | Mapping[str, str], modules: Sequence[str]) -> list[str]:
    """The group of every module."""
    if isinstance(given, Mapping):
        named = [next((g for p, g in given.items() if fnmatchcase(m, p)), REST) for m in modules]
        unused = [p for p in given if not any(fnmatchcase(m, p) for m in modules)]
        if unused:
            problem = f"{some([repr(p) for p in unused])} finds no module"
            raise OptionError(option, problem, f"modules are called like {modules[0]!r}")
        return named
    if given == "task":
        return ["all"] * len(modules)
    if given == "module":
        return list(modules)
    length = _group_length(given)
    places = [split(m) for m in modules]
    stems = {stem for stem, rest in places if rest}
    if not stems:
        problem = f"no module lies in a numbered layer ({modules[0]!r})"
        raise OptionError(option, problem, "use 'task', 'module' or patterns")
    return [_span(stem if len(stems) > 1 else "", rest, length) for stem, rest in places]


def _span(stem: str, rest: str, length: int) -> str:
    """The layers that a group has, of the list of layers where there are several."""
    if not rest:
        return REST
    layer = int(rest.partition(".")[0])
    first = layer - layer % length
    name = f"layer {layer}" if length == 1 else f"layers {first} to {first + length - 1}"
    return f"{stem} {name}".strip()


def _group_length(groups: str) -> int:
    """How many layers a group has."""
    if groups in ("task", "module"):
        return 0
    if groups == "layer":
        return 1
    found = re.fullmatch(r"layers:(\d+)", groups)
    if found is None or int(found[1]) < 1:
        problem = f"{groups!r} is not known"
        remedy = "use task, layer, layers:K, module, or {pattern: name}"
        raise OptionError("groups", problem, remedy)
    return int(found[1])
