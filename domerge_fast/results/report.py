"""What a merge did, module by module, and in all."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..methods.side_report import SideReport
from ..recipe import Recipe

__all__ = ["Interference", "ModuleReport", "Report", "energy_kept"]


@dataclass(frozen=True)
class ModuleReport:
    """One merged module: a and b are None where that side was not orthogonalized.

    magnitudes: ||ΔW_i||_F of every adapter that has the module, by adapter name: those that were
    merged (after orthogonalization) where the method decouples, those given otherwise.
    energy_kept: share of ||ΔW||_F^2 left by the truncation, out of `energy`, the squared norm
    before it (0 where nothing was truncated).
    """

    name: str
    rank: int
    a: SideReport | None
    b: SideReport | None
    magnitudes: Mapping[str, float]
    energy_kept: float
    energy: float


@dataclass(frozen=True)
class Interference:
    """How much the adapters collide, from Gram matrices alone; tables are T x T.

    rows: mean over shared modules of <A_i^T A_i, A_j^T A_j> / (norms): 0 for orthogonal row
    spaces, 1 for the same A up to scale and rotation. columns: the same of B. cosine: of all
    ΔW_i against all ΔW_j. norms: ||ΔW_i||_F over all modules. spread: per adapter the smallest,
    median and largest ||ΔW_i||_F of a module. notes: what a user has to know besides, a sentence
    each, where this was asked for by itself; those of a merge are in its report.
    """

    adapters: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    columns: tuple[tuple[float, ...], ...]
    cosine: tuple[tuple[float, ...], ...]
    norms: tuple[float, ...]
    spread: tuple[tuple[float, float, float], ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Report:
    """What was asked of a merge, and its outcome; `modules` by module name, in order.

    recipe: all that was asked, and what was taken where nothing was: it repeats the merge. scale:
    λ. scales: what was found, by the number of adapters that a module has, of which `scale` is that
    of the most. notes: what a user has to know besides, a sentence each: decisions nobody asked
    for, and what was left out.
    """

    recipe: Recipe
    scale: float
    versions: Mapping[str, str]
    modules: Mapping[str, ModuleReport]
    interference: Interference | None
    seconds: float
    notes: tuple[str, ...] = ()
    scales: Mapping[int, float] = field(default_factory=dict)

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


def _describe(sides: Sequence[SideReport]) -> str:
    left = statistics.fmean(s.cross_left for s in sides)
    change = statistics.fmean(s.change for s in sides)
    steps = statistics.median(s.steps for s in sides)
    return (
        f"{100 * left:.1f} % of the cross-adapter energy left, "
        f"factors moved by {100 * change:.1f} %, {steps:g} steps (median)"
    )
