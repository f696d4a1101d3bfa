"""Runs the rows of the table: what they need is taken once, what they find is cut in R x R, and the
factors are applied once (applying.py)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.plan import Stack
from ..algebra.host import gather
from ..algebra.threads import HERE, of_parts
from ..errors import FlatCut
from .applying import factors, of_rows
from .base import UNCUT, Chosen, Cut, Grams, Halves, Merge, Settings, grams, wide_grams
from .contract import Batch, Coefficients, Found, Needs, Reducible, State, batched, checked, joined
from .groups import Groups, Here, Through
from .made import Made
from .spectral import schatten

__all__ = ["Run", "prepared"]

WideGrams = tuple[list[Tensor], list[Tensor]]


def prepared(
    chosen: Chosen,
    groups: Groups[Sequence[Stack]] | Iterable[Sequence[Stack]],
    settings: Settings,
) -> Run:
    """The method as a function of stacks and their Grams. groups: of the whole model."""
    row = chosen.method
    groups = groups if isinstance(groups, Groups) else Here(groups)
    settings = replace(settings, inner=chosen.inner)
    if row.coefficients:
        run = Run(chosen)
        if row.reduce:
            batches: Groups[Sequence[Reducible]] = Through(
                groups, lambda stacks: run.batches(stacks, settings.backend)
            )
            state = row.reduce(batches, chosen.options)
            run = replace(run, state=state)
        return run
    merge = row.prepare(groups, chosen.options, settings) if row.prepare else row.merge
    return Run(chosen, merge)


@dataclass(frozen=True)
class Run:
    """A method that has seen what it has to see, and merges group by group; in two parts, where it
    can be had so. state: what it has seen."""

    chosen: Chosen
    merge: Merge | Halves | None = None
    state: Any = None

    @property
    def in_parts(self) -> bool:
        """Whether it finds first and makes then."""
        return isinstance(self.merge, Halves) or self.in_coefficients

    @property
    def in_batches(self) -> bool:
        """Whether it takes stacks of several modules."""
        return self.in_parts

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

    def wants_grams(self, stack: Stack, backend: str) -> bool:
        return self.chosen.method.needs_grams(stack, self.chosen.options, backend)

    def find(
        self,
        stacks: Sequence[Stack],
        settings: Settings,
        known: Grams | None = None,
        cut: Cut = UNCUT,
    ) -> Sequence[Found]:
        """The first part. known: the stacks' Grams, where they are there already. cut: what will
        become of what is found."""
        if isinstance(self.merge, Halves):
            narrow = self._narrow(stacks, settings.backend, known)
            return self.merge.find(stacks, *narrow, self.chosen.options, settings)
        return self._coefficients(stacks, settings, known, bool(cut))

    def make(
        self,
        stacks: Sequence[Stack],
        found: Sequence[Found],
        settings: Settings,
        cut: Cut = UNCUT,
        dtype: torch.dtype | None = None,
    ) -> Made:
        """The second part. dtype: of factors that are cut; None: as of all others."""
        if isinstance(self.merge, Halves):
            return self.merge.make(stacks, found, self.chosen.options, settings)
        known = [x for x in found if isinstance(x, Coefficients)]
        try:
            return factors(stacks, known, settings, self.bare, cut, dtype)
        except FlatCut as error:
            raise error.of(method=self.chosen.method.name) from None

    def __call__(
        self,
        stacks: Sequence[Stack],
        settings: Settings,
        known: Grams | None = None,
        cut: Cut = UNCUT,
        dtype: torch.dtype | None = None,
    ) -> Made:
        """Merge the stacks. known: their Grams, where they are there already. Factors are cut where
        that can be done in R x R."""
        if self.merge is None or isinstance(self.merge, Halves):
            return self.make(stacks, self.find(stacks, settings, known, cut), settings, cut, dtype)
        narrow = self._narrow(stacks, settings.backend, known)
        return self.merge(stacks, *narrow, self.chosen.options, settings)

    def batches(self, stacks: Sequence[Stack], backend: str) -> list[Reducible]:
        """The modules in batches that are alike, with their Grams."""
        return [
            (x.part(at), weights[at])
            for _, x, weights in batched(stacks, *self._wide(stacks, backend))
            for at in x.parts
        ]

    @property
    def _needs(self) -> Needs:
        return self.chosen.method.takes(self.chosen.options)

    def _narrow(self, stacks: Sequence[Stack], backend: str, known: Grams | None) -> Grams:
        """Grams in float32 of what wants them, unless they are known."""
        return known or grams(stacks, [self.wants_grams(s, backend) for s in stacks], backend)

    def _wide(self, stacks: Sequence[Stack], backend: str, known: Grams | None = None) -> WideGrams:
        """Grams in float64, which may be known."""
        a, b = ([g for g in side if g is not None] for side in known or ([], []))
        if not stacks or len(a) < len(stacks) or a[0].dtype != torch.float64:
            a, b = wide_grams(stacks, backend, self.bare)
        return (gather(a), gather(b)) if self._needs.host else (a, b)

    def _coefficients(
        self, stacks: Sequence[Stack], settings: Settings, known: Grams | None, cut: bool
    ) -> list[Coefficients]:
        wide: WideGrams = [], []
        if self.wide(cut or settings.order is not None):
            wide = self._wide(stacks, settings.backend, known)
        state = State(self.state, settings.order, settings.calibrated)
        whole = [*batched(stacks, *wide)]
        parts = [
            (members[0], x.part(at), weights[at]) for members, x, weights in whole for at in x.parts
        ]

        def found(part: tuple[int, Batch, Tensor]) -> Coefficients:
            k, x, weights = part
            made = self._of_batch(x, state, weights)
            return _known(made, stacks[k], x, settings.order, cut) if wide[0] else made

        device = wide[0][0].device if wide[0] else HERE
        results = iter(of_parts(found, parts, device, lambda part: sum(part[1].ranks)))
        of_stacks: dict[int, Coefficients] = {}
        for members, x, _ in whole:
            made, begin = joined([next(results) for _ in x.parts]), 0
            for k in members:
                end = begin + len(stacks[k].names)
                of_stacks[k] = made.of_modules(slice(begin, end))
                begin = end
        return [of_stacks[k] for k in range(len(stacks))]

    def _of_batch(self, grams: Batch, state: State, weights: Tensor) -> Coefficients:
        method = self.chosen.method
        assert method.coefficients
        try:
            made = method.coefficients(grams, state, weights, self.chosen.options)
            return checked(made, method.name, grams.ranks, weights).settled()
        except FlatCut as error:
            raise error.of(grams.names[error.at]) from None


def _known(
    x: Coefficients, stack: Stack, grams: Batch, order: int | None, cut: bool
) -> Coefficients:
    """With the sizes, where those of this order are wanted and missing, and with the Grams where
    the modules will be cut and have no more rows than ΔW has rank. stack: one of theirs."""
    rows = grams.a.shape[1] if x.a is None else x.a.shape[1]
    few = cut and rows <= min(stack.a.d, stack.b.d)
    if not few and (order is None or x.sizes is not None):
        return x
    a, b = grams.a, grams.b
    if x.a is not None:
        a, b = _turned(x.a, a), _turned(x.b, b)
    if order is not None and x.sizes is None:
        g = of_rows(stack, x, Settings(1.0, torch.float32, "auto")).to(b)
        sizes = schatten.schatten(g[:, :, None] * b * g[:, None], a, order)
        x = replace(x, sizes=sizes.tolist())
    return replace(x, grams=(a, b)) if few else x


def _turned(c: Tensor, grams: Tensor) -> Tensor:
    c = c.to(grams)
    return c @ grams @ c.mT
