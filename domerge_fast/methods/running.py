"""Runs the rows of the table: what they need is taken once, what they find is cut in R x R, and the
factors are applied once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..adapters.plan import Stack
from ..algebra.host import gather
from ..algebra.side import Side
from ..algebra.truncation import truncated
from ..errors import FlatCut
from .base import (
    UNCUT,
    Chosen,
    Cut,
    Factors,
    Found,
    Grams,
    Halves,
    Merge,
    Merged,
    Reducible,
    Settings,
    bare_sides,
    grams,
    wide_grams,
)
from .contract import BATCH_BYTES, Batch, Coefficients, Needs, State, alike, batch
from .spectral import schatten, svc

__all__ = ["Run", "factors", "prepared", "stacked"]

WideGrams = tuple[list[Tensor], list[Tensor]]
NOTHING: WideGrams = [], []

Products = tuple[tuple[Tensor | None, Side], tuple[Tensor | None, Side]]
"""C_A and A, C_B and B^T."""


def prepared(chosen: Chosen, groups: Iterable[Sequence[Stack]], settings: Settings) -> Run:
    """The method as a function of stacks and their Grams. groups: of the whole model, gone through
    as often as need be."""
    row = chosen.method
    settings = replace(settings, inner=chosen.inner)
    if row.coefficients:
        run = Run(chosen)
        if row.reduce:
            state = row.reduce(run.batches(groups, settings.backend), chosen.options)
            run = replace(run, state=state)
        return run
    merge = row.prepare(groups, chosen.options, settings) if row.prepare else row.merge
    return Run(chosen, merge, row.halves if merge is row.merge else None)


@dataclass(frozen=True)
class Run:
    """A method that has seen what it has to see, and merges group by group; in two parts, where it
    can be had so. state: what it has seen."""

    chosen: Chosen
    merge: Merge | None = None
    halves: Halves | None = None
    state: Any = None

    @property
    def in_parts(self) -> bool:
        """Whether it finds first and makes then."""
        return self.halves is not None or self.in_coefficients

    @property
    def in_coefficients(self) -> bool:
        return self.chosen.method.coefficients is not None

    @property
    def bare(self) -> bool:
        """Whether Grams and coefficients are of B^T without its scalings."""
        return self._needs.bare

    def wide(self, more: bool) -> bool:
        """Whether it takes Grams in float64, of all stacks. more: whether the size of what it
        finds is wanted, or a cut of it."""
        return self.in_coefficients and (more or self._needs.gram is not None)

    def wants_grams(self, stack: Stack) -> bool:
        return self.chosen.method.needs_grams(stack, self.chosen.options)

    def find(
        self,
        stacks: Sequence[Stack],
        settings: Settings,
        known: Grams | None = None,
        cut: Cut = UNCUT,
    ) -> Sequence[Found]:
        """The first part. known: the stacks' Grams, where they are there already. cut: what will
        become of what is found."""
        if self.halves:
            found = self._narrow(stacks, settings.backend) if known is None else known
            return self.halves.find(stacks, *found, self.chosen.options, settings)
        return self._coefficients(stacks, settings, known, bool(cut))

    def make(
        self,
        stacks: Sequence[Stack],
        found: Sequence[Found],
        settings: Settings,
        cut: Cut = UNCUT,
        dtype: torch.dtype | None = None,
    ) -> Merged:
        """The second part. dtype: of factors that are cut; None: as of all others."""
        if self.halves:
            return self.halves.make(stacks, found, self.chosen.options, settings)
        known = [x for x in found if isinstance(x, Coefficients)]
        try:
            return factors(stacks, known, settings, self.bare, cut, dtype)
        except FlatCut as error:
            raise error.of(stacks[error.at].name, self.chosen.method.name) from None

    def __call__(
        self,
        stacks: Sequence[Stack],
        settings: Settings,
        known: Grams | None = None,
        cut: Cut = UNCUT,
        dtype: torch.dtype | None = None,
    ) -> Merged:
        """Merge the stacks. known: their Grams, where they are there already. Factors are cut where
        that can be done in R x R."""
        if self.in_parts:
            return self.make(stacks, self.find(stacks, settings, known, cut), settings, cut, dtype)
        assert self.merge
        found = self._narrow(stacks, settings.backend) if known is None else known
        return self.merge(stacks, *found, self.chosen.options, settings)

    def batches(self, groups: Iterable[Sequence[Stack]], backend: str) -> Iterator[Reducible]:
        """All modules in batches that are alike, with their Grams."""
        for stacks in groups:
            for members, x in self._batches(stacks, self._wide(stacks, backend)):
                yield x, [stacks[k].weights for k in members]

    @property
    def _needs(self) -> Needs:
        return self.chosen.method.takes(self.chosen.options)

    def _narrow(self, stacks: Sequence[Stack], backend: str) -> Grams:
        return grams(stacks, [self.wants_grams(s) for s in stacks], backend)

    def _wide(self, stacks: Sequence[Stack], backend: str, known: Grams | None = None) -> WideGrams:
        """Grams in float64, which may be known."""
        a, b = ([g for g in side if g is not None] for side in known or ([], []))
        if not stacks or len(a) < len(stacks) or a[0].dtype != torch.float64:
            a, b = wide_grams(stacks, backend, self.bare)
        return (gather(a), gather(b)) if self._needs.host else (a, b)

    def _batches(
        self, stacks: Sequence[Stack], wide: WideGrams
    ) -> Iterator[tuple[list[int], Batch]]:
        for members in alike(stacks):
            a, b = ([side[k] for k in members] if side else [] for side in wide)
            yield members, batch([stacks[k] for k in members], a, b)

    def _coefficients(
        self, stacks: Sequence[Stack], settings: Settings, known: Grams | None, cut: bool
    ) -> list[Coefficients]:
        needs, method = self._needs, self.chosen.method
        assert method.coefficients
        wide = None
        if self.wide(cut or settings.order is not None):
            wide = self._wide(stacks, settings.backend, known)
        state = State(self.state, settings.order, settings.calibrated)
        found: dict[int, Coefficients] = {}
        for members, x in self._batches(stacks, wide if wide and needs.gram else NOTHING):
            weights = [stacks[k].weights for k in members]
            try:
                results = method.coefficients(x, state, weights, self.chosen.options)
            except FlatCut as error:
                raise error.of(x.names[error.at]) from None
            found |= zip(members, results)
        if wide is None:
            return [found[k] for k in range(len(stacks))]
        known_of = enumerate(zip(stacks, *wide))
        return [_known(found[k], s, a, b, settings.order, cut) for k, (s, a, b) in known_of]


def stacked(stacks: Sequence[Stack], settings: Settings) -> list[Factors]:
    """λ sum_i w_i τ_i of every stack."""
    found = [Coefficients(b=torch.tensor(s.weights, dtype=torch.float64), a=None) for s in stacks]
    return factors(stacks, found, settings, False)


def factors(
    stacks: Sequence[Stack],
    found: Sequence[Coefficients],
    settings: Settings,
    bare: bool,
    cut: Cut = UNCUT,
    dtype: torch.dtype | None = None,
) -> list[Factors]:
    """What coefficients stand for, times λ. bare: those of B are of B^T without its scalings. cut:
    of those whose Grams are known; dtype: theirs. Raises FlatCut with the position of a stack."""
    chosen = [k for k, x in enumerate(found) if cut and x.grams]
    rest = [k for k, x in enumerate(found) if not (cut and x.grams)]
    given = [_scaled(stacks[k], found[k], settings, bare) for k in rest]
    results = dict(zip(rest, _applied(given, settings.dtype, settings.backend)))
    smaller, shares = _cut(stacks, found, chosen, settings, bare, cut)
    for k, x, share in zip(
        chosen, _applied(smaller, dtype or settings.dtype, settings.backend), shares
    ):
        results[k] = replace(x, kept=share[0], energy=share[1])
    return [results[k] for k in range(len(stacks))]


def _applied(pairs: Sequence[Products], dtype: torch.dtype, backend: str) -> list[Factors]:
    """The products of coefficients and sides; those with coefficients in float64 are formed in it:
    float32 products would lose their digits."""
    flat = [*(a for a, _ in pairs), *(b for _, b in pairs)]
    wide = {k for k, (c, _) in enumerate(flat) if c is not None and c.dtype == torch.float64}
    rest = [flat[k] for k in range(len(flat)) if k not in wide]
    narrow = iter(ops.apply([c for c, _ in rest], [x for _, x in rest], dtype, backend=backend))
    found = [_in_float64(*flat[k], dtype) if k in wide else next(narrow) for k in range(len(flat))]
    return [Factors(a, bt.T) for a, bt in zip(found, found[len(pairs) :])]


def _in_float64(c: Tensor | None, side: Side, dtype: torch.dtype) -> Tensor:
    assert c is not None
    return (side.stack(torch.float64).T @ c.T).to(dtype).T


def _sides(stack: Stack, bare: bool) -> tuple[Side, Side]:
    if not bare:
        return stack.a, stack.b
    a, b = bare_sides([stack])
    return a, b


def _scaled(stack: Stack, x: Coefficients, settings: Settings, bare: bool) -> Products:
    """The coefficients with λ, and what they are applied to."""
    if x.b.dim() == 1:
        gains = [settings.scale * c for c in x.b.tolist()]
        scales = tuple(g * c for g, c in zip(gains, stack.b.scales))
        return (x.a, stack.a), (None, stack.b.scaled(scales))
    a, b = _sides(stack, bare)
    c_b = settings.scale * _gains(x, settings) * x.b.double()
    return (_on(x.a, a), a), (_on(c_b.float(), b), b)


def _gains(x: Coefficients, settings: Settings) -> Tensor | float:
    """What a calibration multiplies the rows of C_B by, [k, 1]."""
    return 1.0 if x.strengths is None else svc.gains(x.strengths, settings.projection)


def _on(c: Tensor | None, side: Side) -> Tensor | None:
    return None if c is None else c.float().to(side.device)


def _cut(
    stacks: Sequence[Stack],
    found: Sequence[Coefficients],
    chosen: Sequence[int],
    settings: Settings,
    bare: bool,
    cut: Cut,
) -> tuple[list[Products], list[tuple[float, float]]]:
    """The coefficients of the chosen after the cut, and for each the share of ||ΔW||_F^2 that is
    left, and that before it."""
    results: dict[int, Products] = {}
    shares: dict[int, tuple[float, float]] = {}
    rows = {k: _rows(stacks[k], found[k], settings) for k in chosen}
    grams = {k: x.grams for k, x in enumerate(found) if k in rows and x.grams}
    for members in _of_one_size(grams):
        a = torch.stack([grams[k][0] for k in members])
        g = torch.stack([rows[k] for k in members]).to(a)
        b = g[:, :, None] * torch.stack([grams[k][1] for k in members]) * g[:, None]
        energies = (a * b).sum((1, 2)).tolist()
        parts = truncated(a, b, cut.rank, cut.energy, members)
        for k, gains, energy, part in zip(members, g, energies, parts):
            sides = _sides(stacks[k], bare)
            c_b = _times(part.b * gains, found[k].b if found[k].b.dim() == 2 else None)
            pair = _times(part.a, found[k].a), c_b
            to = torch.float64 if part.cancels else torch.float32
            c_a, c_b = (c.to(side.device, to) for c, side in zip(pair, sides))
            results[k] = (c_a, sides[0]), (c_b, sides[1])
            shares[k] = part.kept, energy
    return [results[k] for k in chosen], [shares[k] for k in chosen]


def _rows(stack: Stack, x: Coefficients, settings: Settings) -> Tensor:
    """λ and all gains on the rows of B'^T, [k]."""
    if x.b.dim() == 1:
        return settings.scale * x.b.repeat_interleave(torch.tensor(stack.b.ranks))
    gains = settings.scale * _gains(x, settings) * torch.ones_like(x.b[:, :1], dtype=torch.float64)
    return gains[:, 0]


def _times(c: Tensor, inner: Tensor | None) -> Tensor:
    return c if inner is None else c @ inner.to(c)


def _of_one_size(grams: Mapping[int, tuple[Tensor, Tensor]]) -> Iterator[list[int]]:
    """Positions of Grams of one size, in batches."""
    found: dict[int, list[int]] = {}
    for k, (a, _) in grams.items():
        found.setdefault(len(a), []).append(k)
    for size, members in found.items():
        most = max(1, BATCH_BYTES // (16 * size * size))
        yield from (members[at : at + most] for at in range(0, len(members), most))


def _known(
    x: Coefficients, stack: Stack, gram_a: Tensor, gram_b: Tensor, order: int | None, cut: bool
) -> Coefficients:
    """With its size, where one of this order is wanted and missing, and with its Grams where it
    will be cut and has no more rows than ΔW has rank."""
    few = cut and (len(gram_a) if x.a is None else len(x.a)) <= min(stack.a.d, stack.b.d)
    if not few and (order is None or x.size is not None):
        return x
    a = gram_a if x.a is None else _turned(x.a, gram_a)
    b = gram_b if x.b.dim() == 1 else _turned(x.b, gram_b)
    if order is not None and x.size is None:
        g = _rows(stack, x, Settings(1.0, torch.float32, "auto")).to(b)
        size = float(schatten.schatten((g[:, None] * b * g)[None], a[None], order))
        x = replace(x, size=size)
    return replace(x, grams=(a, b)) if few else x


def _turned(c: Tensor, gram: Tensor) -> Tensor:
    c = c.to(gram)
    return c @ gram @ c.T
