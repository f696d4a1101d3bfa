"""What a merge did, module by module, and in all."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ..algebra.host import Rows
from ..methods.side_report import SideReport, SideReports
from ..recipe import Recipe
from .details import Details

__all__ = [
    "Direction",
    "Interference",
    "ModuleReport",
    "ModuleReports",
    "OnInputs",
    "Report",
    "StackReport",
    "energy_kept",
]

Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class ModuleReport:
    """One merged module: a and b are None where that side was not orthogonalized.

    magnitudes: ||ΔW_i||_F of every adapter that has the module, by adapter name: those that were
    merged (after orthogonalization) where the method decouples, those given otherwise; None where
    nobody had them measured.
    energy_kept: share of ||ΔW||_F^2 left by the truncation, out of `energy`, the squared norm
    before it (0 where nothing was truncated).
    shares: <ΔW, ΔW_i> / ||ΔW_i||_F^2 of the merge ΔW with every update as it was given, by adapter:
    1 where all of it is there, 1/T of it in a mean of T that are orthogonal, below 0 where it is
    turned round; {} unless details were asked for.
    verified: ||ΔW - ΔW_reference||_F / ||ΔW_reference||_F of a module that was merged again by the
    reference, and how large that may be; None of the others.
    """

    name: str
    rank: int
    a: SideReport | None
    b: SideReport | None
    magnitudes: Mapping[str, float | None]
    energy_kept: float
    energy: float
    shares: Mapping[str, float] = field(default_factory=dict)
    verified: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class StackReport:
    """Those of modules alike, merged as one stack. norms: ||ΔW_i||_F of the adapters by module, ()
    where nobody had them measured; so the shares that the merge keeps, and what was verified.
    energy_kept, energy: by module; () where nothing was truncated."""

    names: tuple[str, ...]
    adapters: tuple[str, ...]
    rank: int
    a: SideReports | None
    b: SideReports | None
    norms: Sequence[Sequence[float]]
    energy_kept: Sequence[float] = ()
    energy: Sequence[float] = ()
    shares: Sequence[Sequence[float]] = ()
    verified: Sequence[tuple[float, float] | None] = ()

    def plain(self) -> tuple[Any, ...]:
        """Tensors, numbers, texts, lists and tuples, which `of_plain` makes the same of."""
        sides = self.a and _plain(self.a.rows), self.b and _plain(self.b.rows)
        first = self.names, self.adapters, self.rank, *sides, _plain(self.norms)
        return *first, self.energy_kept, self.energy, self.shares, self.verified

    @classmethod
    def of_plain(cls, plain: Sequence[Any]) -> StackReport:
        names, adapters, rank, a, b, norms, *rest = plain
        of_a = None if a is None else SideReports(_rows(a))
        of_b = None if b is None else SideReports(_rows(b))
        return cls(names, adapters, rank, of_a, of_b, _rows(norms), *rest)

    def of_module(self, k: int) -> ModuleReport:
        norms = self.norms[k]
        return ModuleReport(
            self.names[k],
            self.rank,
            None if self.a is None else self.a[k],
            None if self.b is None else self.b[k],
            dict(zip(self.adapters, norms)) if norms else dict.fromkeys(self.adapters),
            self.energy_kept[k] if self.energy_kept else 1.0,
            self.energy[k] if self.energy else 0.0,
            dict(zip(self.adapters, self.shares[k])) if self.shares else {},
            self.verified[k] if self.verified else None,
        )


def _plain(rows: Sequence[Sequence[float]]) -> Sequence[Sequence[float]] | Tensor:
    return rows.tensor if isinstance(rows, Rows) else rows


def _rows(plain: Any) -> Any:
    return Rows(plain) if isinstance(plain, Tensor) else plain


class ModuleReports(Mapping[str, ModuleReport]):
    """Of all modules by name, in this order; each is made when it is asked for."""

    def __init__(self, names: Sequence[str], stacks: Sequence[StackReport]) -> None:
        self._names, self._stacks = names, stacks

    @property
    def ranks(self) -> set[int]:
        """Those that there are."""
        return {stack.rank for stack in self._stacks}

    @cached_property
    def _places(self) -> dict[str, tuple[StackReport, int]]:
        return {name: (x, k) for x in self._stacks for k, name in enumerate(x.names)}

    def __getitem__(self, name: str) -> ModuleReport:
        stack, k = self._places[name]
        return stack.of_module(k)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Direction:
    """Cosines between adapters' updates and that of another adapter, called `name`: of all modules
    together, and by module; None of a module that one of them lacks."""

    name: str
    cosine: tuple[float, ...]
    modules: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class OnInputs:
    """How far adapters' updates move outputs on what other tasks give to the layers, 1 being as far
    as on inputs without any preferred direction: `moved` of all modules together, and by module;
    None of a module that an adapter lacks. tasks: whose inputs are known. own: each adapter's task,
    which is left out; None where it is not among them."""

    tasks: tuple[str, ...]
    own: tuple[str | None, ...]
    moved: tuple[float, ...]
    modules: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class Interference:
    """How much the adapters collide, from Gram matrices alone; tables are T x T.

    rows: mean over shared modules of <A_i^T A_i, A_j^T A_j> / (norms): 0 for orthogonal row
    spaces, 1 for the same A up to scale and rotation. columns: the same of B. cosine: of all
    ΔW_i against all ΔW_j. All three are None where only norms were asked for, or adapters are too
    many. norms: ||ΔW_i||_F over all modules. spread: per adapter the smallest,
    median and largest ||ΔW_i||_F of a module. notes: what a user has to know besides, a sentence
    each, where this was asked for by itself; those of a merge are in its report. direction: how
    far the adapters go along another one, on_inputs: how far they move outputs on other tasks'
    inputs, where that was asked for. details: what was asked for module by module.
    """

    adapters: tuple[str, ...]
    rows: Table | None
    columns: Table | None
    cosine: Table | None
    norms: tuple[float, ...]
    spread: tuple[tuple[float, float, float], ...]
    notes: tuple[str, ...] = ()
    direction: Direction | None = None
    details: Details | None = None
    on_inputs: OnInputs | None = None

    @property
    def tables(self) -> tuple[Table, Table, Table] | None:
        """rows, columns and cosine, where they were found."""
        if self.rows is None or self.columns is None or self.cosine is None:
            return None
        return self.rows, self.columns, self.cosine

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Report:
    """What was asked of a merge, and its outcome; `modules` by module name, in order.

    recipe: all that was asked, and what was taken where nothing was: it repeats the merge. scale:
    λ. scales: what was found, by the number of adapters that a module has, of which `scale` is that
    of the most. notes: what a user has to know besides, a sentence each: decisions nobody asked
    for, and what was left out. converted: whether nothing was merged, and the one adapter is
    written in another format: `recipe` then only names it. energies: the sums of σ_k^2 of the merge
    over the modules sampled for details, the largest singular value first; None without details,
    and of dense results.
    """

    recipe: Recipe
    scale: float
    versions: Mapping[str, str]
    modules: Mapping[str, ModuleReport]
    interference: Interference | None
    seconds: float
    notes: tuple[str, ...] = ()
    scales: Mapping[int, float] = field(default_factory=dict)
    converted: bool = False
    energies: tuple[float, ...] | None = None

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(x.name for x in self.recipe.adapters)

    def __getitem__(self, name: str) -> ModuleReport:
        return self.modules[name]

    @property
    def energy_kept(self) -> float:
        """Share of the squared norm kept over all modules."""
        return energy_kept(self.modules.values())

    def summary(self) -> list[tuple[str, str]]:
        """Headline figures as (label, text), for the CLI and the model card."""
        modules = list(self.modules.values())
        ranks = sorted({m.rank for m in modules})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines = [
            ("method", self.recipe.method),
            ("adapters", str(len(self.adapters))),
            ("modules", str(len(modules))),
            ("rank", span),
            ("scale", self._scale()),
        ]
        for label, sides in (
            ("A sides", [m.a for m in modules if m.a and len(m.magnitudes) > 1]),
            ("B sides", [m.b for m in modules if m.b and len(m.magnitudes) > 1]),
        ):
            if sides:
                lines.append((f"orthogonalized {label}", _describe(sides)))
        if any(m.energy_kept < 1 for m in modules):
            lines.append(("energy kept", f"{100 * self.energy_kept:.2f} %"))
        if verified := [m.verified for m in modules if m.verified]:
            lines.append(("verified", _verified(verified)))
        lines.append(("seconds", f"{self.seconds:.2f}"))
        return [*lines, *(("note", note) for note in self.notes)]

    def _scale(self) -> str:
        if self.recipe.scale != "auto" and not self.scales:
            return f"{self.scale:g}"
        others = (
            f"{scale:g} where {count} adapters have a module"
            for count, scale in sorted(self.scales.items(), reverse=True)
            if scale != self.scale
        )
        return ", ".join([f"{self.scale:g}, found from the adapters", *others])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts."""
        modules = {name: dataclasses.asdict(m) for name, m in self.modules.items()}
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **plain,
            "recipe": self.recipe.plain(),
            "modules": modules,
            "interference": self.interference and self.interference.to_dict(),
            "energy_kept": self.energy_kept,
        }


def energy_kept(modules: Collection[ModuleReport]) -> float:
    """Share of the squared norm of all modules that truncation left."""
    total = math.fsum(m.energy for m in modules)
    kept = math.fsum(m.energy * m.energy_kept for m in modules)
    return kept / total if total > 0 else 1.0


def _verified(found: Sequence[tuple[float, float]]) -> str:
    error, allowed = max(found, key=lambda pair: pair[0])
    return (
        f"{len(found)} modules against the reference: off by {error:.1e} of their norm at most, "
        f"where {allowed:.1e} is explained by rounding"
    )


def _describe(sides: Sequence[SideReport]) -> str:
    left = statistics.fmean(s.cross_left for s in sides)
    change = statistics.fmean(s.change for s in sides)
    steps = statistics.median(s.steps for s in sides)
    scaled = [s.scaled for s in sides if s.scaled is not None]
    shrunk = f" ({100 * statistics.fmean(scaled):.0f} % of that shrinking alone)" if scaled else ""
    return (
        f"{100 * left:.1f} % of the cross-adapter energy left, "
        f"factors moved by {100 * change:.1f} %{shrunk}, {steps:g} steps (median)"
    )
