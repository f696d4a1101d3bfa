"""What is done to every module of a merge, in the order in which it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..adapters.columns import OfKinds
from ..adapters.plan import Kind, Plan, Stack
from ..methods.base import UNCUT, Chosen, Cut, ScaleRule, Settings
from ..methods.running import Run
from ..methods.steps.base import PostStep
from ..methods.steps.base import Run as Before

__all__ = ["Cut", "Work"]


@dataclass(frozen=True)
class Work:
    """What is done to every stack: steps before, the method, the truncation, steps after.

    rule: what λ is found by, from the whole model; None: settings.scale is λ. calibrated: whether
    the merge is (svc.py). alone: whether a module that one adapter alone has is its update
    w τ, whatever the method. deltas: whether the sink takes ΔW instead of its factors. usual:
    the cut of a dense result that must become factors where no cut was asked for. narrowing:
    whether there are modules of more rows than rank. matrices: the modules whose factors the sink
    multiplies: they get them in float32, with whatever rank they have. streamed: whether adapters
    are read in batches (streamed.py).
    """

    method: Chosen
    settings: Settings
    cut: Cut = UNCUT
    usual: Cut = UNCUT
    pre: Sequence[Before] = ()
    post: Sequence[PostStep] = ()
    deltas: bool = False
    narrowing: bool = False
    matrices: frozenset[str] = frozenset()
    rule: ScaleRule | None = None
    calibrated: bool = False
    alone: bool = False
    streamed: bool = False

    @property
    def twice(self) -> bool:
        """Whether the whole model has to be gone through before any module is merged."""
        return self.rule is not None or self.calibrated

    @property
    def is_sum(self) -> bool:
        """Whether the merge is settings.scale Σ w_i τ_i, but for a cut."""
        steps = self.pre or self.post or self.calibrated
        plain = self.rule is None and not steps
        return plain and self.method.method.sums(self.method.options)

    @property
    def descends(self) -> bool:
        """Whether factors may be orthogonalized, which ends within a tolerance of the optimum: by
        the method, one in it, or a step before."""
        inner = self.method.inner
        chosen = [self.method, *([inner] if inner else [])]
        return bool(self.pre) or any(x.method.name == "do" for x in chosen)

    @property
    def by_ratio(self) -> bool:
        """Whether results do not depend on the size of the weights, only on their ratios."""
        return self.rule is not None or self.merge_by_ratio

    @property
    def merge_by_ratio(self) -> bool:
        """Whether that is so of the merge at a given λ."""
        sized = self.calibrated or any(step.name == "norm_match" for step in self.post)
        return self.method.by_ratio and not sized

    @property
    def wide(self) -> Work:
        """The same with results in float32."""
        return replace(self, settings=replace(self.settings, dtype=torch.float32))

    @cached_property
    def inner(self) -> Settings:
        """Settings of what comes before the last step, which is in float32."""
        cut_later = self.cut or self.narrowing or self.calibrates_factors
        last = not (cut_later or self.post or self.deltas or self.matrices)
        return self.settings if last else replace(self.settings, dtype=torch.float32)

    @property
    def restores_norms(self) -> bool:
        """Whether modules have their norm again after a cut: λ is found for that norm."""
        cut = self.cut or (self.method.dense and (self.post or not self.deltas))
        return self.rule is not None and bool(cut)

    @property
    def calibrates_factors(self) -> bool:
        """Whether calibration takes the factors that the method makes at λ = 1."""
        return self.calibrated and not self.method.method.takes(self.method.options).calibrates

    @property
    def at_cut(self) -> Cut:
        """The cut that a method makes of what it finds in R x R, before anything is formed."""
        return UNCUT if self.calibrates_factors else self.cut

    @property
    def cut_dtype(self) -> torch.dtype:
        """Of factors that a method has cut."""
        wide = self.post or self.deltas or self.restores_norms
        return torch.float32 if wide else self.settings.dtype

    @property
    def dense(self) -> bool:
        """Whether matrices [m, n] are formed."""
        return self.deltas or self.method.dense

    def in_batches(self, method: Run) -> bool:
        """Whether modules alike are merged as one stack."""
        singly = self.pre or self.post or self.narrowing or self.deltas or self.matrices
        by_factors = self.calibrates_factors or (self.cut and not method.in_coefficients)
        return method.in_batches and not (singly or by_factors)

    def wide_grams(self, method: Run) -> bool:
        """Whether the method is given Grams in float64."""
        sized = (
            self.rule is not None and self.rule.order is not None and not self.calibrates_factors
        )
        return method.wide(bool(self.at_cut) or sized)

    def ranks(self, plan: Plan) -> OfKinds[Kind, int]:
        """What the rank of every module's factors is at most."""
        cut = self.cut or (self.usual if self.method.dense else UNCUT)
        most = {}
        for kind in plan.every_kind:
            side = min(kind.m, kind.n)
            whole = self.method.dense or self.streamed
            limits = [side, side if whole else self.method.rank(kind.ranks)]
            most[kind] = min([*limits, cut.rank or side])
        return plan.of_kinds(most)

    def uncut(self, plan: Plan) -> frozenset[str]:
        """The modules that an adapter stores as a matrix, and whose merge is no smaller as
        factors."""
        if self.cut or self.post or self.deltas or self.calibrated:
            return frozenset()
        ranks, found = self.ranks(plan), []
        for name in plan.names:
            m, n = plan.module(name).m, plan.module(name).n
            if any(x.dense for x in plan.modules(name)) and ranks[name] * (m + n) >= m * n:
                found.append(name)
        return frozenset(found)

    def before(self, stacks: Sequence[Stack]) -> Sequence[Stack]:
        for step in self.pre:
            stacks = step(stacks, self.settings)
        return stacks
