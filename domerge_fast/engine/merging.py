"""A group of modules through a method, up to what the sink takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

from ..adapters.plan import Stack
from ..methods.applying import stacked
from ..methods.base import Grams
from ..methods.contract import Found
from ..methods.made import Made
from ..methods.running import Run
from ..methods.spectral import calibrated
from ..methods.steps.base import alike
from . import precision
from .finish import Calibrate, Result, finished, in_range
from .first_pass import FirstPass
from .group import Group
from .scaled import Scaled
from .work import Work

__all__ = ["Merged", "merged"]

Merged = tuple[Stack, Sequence[Sequence[float]], Result]
"""A stack, ||ΔW_i||_F of its modules, and what became of these."""


def merged(
    scaled: Scaled,
    method: Run,
    group: Group,
    found: Sequence[Found | None] | None,
    first: FirstPass | None,
) -> list[Merged]:
    """What the sink takes of every stack, or of its modules one after the other. Modules that may
    have lost digits to the output's dtype, or have powers of two to come back, are merged again in
    float32, and stacks by themselves."""
    stacks, work = scaled.weighted(group.stacks), scaled.work
    lost = scaled.of_weights if work.by_ratio else 0
    known = _Known(method, stacks, group.grams, found, first, lost if work.alone else None)
    results = known.merged(work, range(len(stacks)))
    every = [r for own in results for r in own]
    finite = [x for r in every for x in r.finite] if not work.post else []
    flat = iter(precision.fits([r.tensors for r in every], work.settings.backend, finite))
    fits = [[fit for _ in own for fit in next(flat)] for own in results]
    changed = [
        bool(scaled.of_scale or power or s.far or s.powers != (0, 0))
        for s, (_, power) in zip(stacks, known.scales)
    ]
    again = [k for k, fit in enumerate(fits) if changed[k] or not all(fit)]
    wider = dict(zip(again, known.merged(scaled.wide.work, again) if again else []))
    rows: list[Merged] = []
    for k, (s, norms, own) in enumerate(zip(stacks, group.norms, results)):
        if k not in wider and len(own) == 1:
            rows.append((s, norms, own[0]))
            continue
        given, power = group.stacks[k].powers, known.scales[k][1]
        usual = [one for result in own for one in result.each()]
        exact = [one for result in wider.get(k, own) for one in result.each()]
        for one, norm, fit, *pair in zip(s.each(), norms, fits[k], usual, exact):
            if changed[k] or not fit:
                of_scale = scaled.wide.of_scale + power
                rows.append((one, [norm], in_range(pair[1], one, given, of_scale, work)))
            else:
                rows.append((one, [norm], pair[0]))
    return rows


@dataclass(frozen=True, eq=False)
class _Known:
    """A group with weights, of which a power of two was taken, what is known of it, and how it is
    merged. alone: None, or that modules of one adapter are its update, and the power of two to come
    back to these."""

    method: Run
    stacks: Sequence[Stack]
    grams: Grams
    found: Sequence[Found | None] | None
    first: FirstPass | None
    alone: int | None

    @cached_property
    def scales(self) -> list[tuple[float, int]]:
        """(x, p): λ is multiplied by x 2^p, of which 2^p comes back later."""
        return [
            (1.0, self.alone or 0)
            if self._stays(s)
            else (self.first.scale(s) if self.first else (1.0, 0))
            for s in self.stacks
        ]

    def _stays(self, stack: Stack) -> bool:
        """Whether it is merged to its one adapter's update."""
        return self.alone is not None and len(stack.adapters) == 1

    def merged(self, work: Work, chosen: Sequence[int]) -> list[list[Result]]:
        """The chosen stacks, those with one λ together: of each, or of its modules one after the
        other."""
        keys = [None if self._stays(self.stacks[k]) else self.scales[k][0] for k in chosen]
        results: dict[int, list[Result]] = {}
        for places in alike(keys):
            key, members = keys[places[0]], [chosen[p] for p in places]
            found = self._alone(work, members) if key is None else self._at(key, work, members)
            results |= zip(members, found)
        return [results[k] for k in chosen]

    def _alone(self, work: Work, chosen: Sequence[int]) -> list[list[Result]]:
        """λ w τ of stacks of one adapter, with λ = 1 where another is looked for."""
        given = [self.stacks[k] for k in chosen]
        return _finished(work, given, stacked(given, work.inner))

    def _at(self, scale: float, work: Work, chosen: Sequence[int]) -> list[list[Result]]:
        given = [self.stacks[k] for k in chosen]
        projection = self.first.projection if self.first else 1.0
        settings = replace(work.inner, scale=scale * work.settings.scale, projection=projection)
        stacks = work.before(given)
        found = [x for k in chosen if self.found and (x := self.found[k]) is not None]
        cut = work.at_cut, work.cut_dtype
        if work.calibrates_factors:
            made = self.method(stacks, replace(settings, scale=1.0))
            return _finished(
                work, given, made, lambda x: calibrated.make(stacks, x, found, settings)
            )
        if found:
            return _finished(work, given, self.method.make(stacks, found, settings, *cut))
        grams = None
        if not work.pre and not self.first:
            grams = [self.grams[0][k] for k in chosen], [self.grams[1][k] for k in chosen]
        return _finished(work, given, self.method(stacks, settings, grams, *cut))


def _finished(
    work: Work, stacks: Sequence[Stack], made: Made, calibrate: Calibrate | None = None
) -> list[list[Result]]:
    """`finished`, of every stack or of its modules one after the other, as they were made."""
    rest, parts = iter(made), []
    for s in stacks:
        own = [next(rest)]
        given = [s]
        if s.count is not None and own[0].count is None:
            given = s.each()
            own += islice(rest, s.count - 1)
        parts.append([*zip(given, own)])
    flat = [pair for part in parts for pair in part]
    results = iter(finished(work, [s for s, _ in flat], [x for _, x in flat], calibrate))
    return [[*islice(results, len(part))] for part in parts]
