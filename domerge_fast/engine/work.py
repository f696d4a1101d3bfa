"""What is done to every module of a merge, in the order in which it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..adapters.plan import Plan, Stack
from ..methods.base import UNCUT, Chosen, Cut, ScaleRule, Settings
from ..methods.running import Run
from ..methods.steps.base import PostStep, PreStep

__all__ = ["Cut", "Work"]


@dataclass(frozen=True)
class Work:
    """What is done to every stack: steps before, the method, the truncation, steps after.

    rule: what λ is found by, from the whole model; None: settings.scale is λ. calibrated: whether
    the merge is (svc.py). alone: whether a module that one adapter alone has is its update
    w τ, whatever the method. deltas: whether the sink takes ΔW instead of its factors. usual:
    the cut of a dense result that must become factors where no cut was asked for. narrowing:
    whether there are modules of more rows than rank.
    """

    method: Chosen
    settings: Settings
    cut: Cut = UNCUT
    usual: Cut = UNCUT
    pre: Sequence[PreStep] = ()
    post: Sequence[PostStep] = ()
    deltas: bool = False
    narrowing: bool = False
    rule: ScaleRule | None = None
    calibrated: bool = False
    alone: bool = False

    @property
    def twice(self) -> bool:
        """Whether the whole model has to be gone through before any module is merged."""
        return self.rule is not None or self.calibrated

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

    @property
    def inner(self) -> Settings:
        """Settings of what comes before the last step, which is in float32."""
        last = not (
            self.cut or self.post or self.deltas or self.narrowing or self.calibrates_factors
        )
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

    def wide_grams(self, method: Run) -> bool:
        """Whether the method is given Grams in float64."""
        sized = (
            self.rule is not None and self.rule.order is not None and not self.calibrates_factors
        )
        return method.wide(bool(self.at_cut) or sized)

    def ranks(self, plan: Plan) -> dict[str, int]:
        """What the rank of every module's factors is at most."""
        cut = self.cut or (self.usual if self.method.dense else UNCUT)
        most = {}
        for ranks, side in set(plan.sizes.values()):
            limits = [side, side if self.method.dense else self.method.rank(ranks)]
            most[ranks, side] = min([*limits, cut.rank or side])
        return {name: most[size] for name, size in plan.sizes.items()}

    def before(self, stacks: Sequence[Stack]) -> Sequence[Stack]:
        for step in self.pre:
            stacks = step.run(stacks, self.settings)
        return stacks
