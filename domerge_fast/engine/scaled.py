"""Weights and a λ of extreme sizes, without the powers of two that come back later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..adapters.plan import Plan, Stack
from ..algebra import powers
from . import precision
from .work import Work

__all__ = ["Scaled"]


@dataclass(frozen=True)
class Scaled:
    """Work without the powers of two of extreme weights and of an extreme λ."""

    work: Work
    of_weights: int
    of_scale: int

    @classmethod
    def of(cls, plan: Plan, work: Work) -> Scaled:
        of_weights = precision.of_weights(plan.every_weight, work.by_ratio)
        return cls(work, of_weights, 0)._without(powers.extreme(work.settings.scale))

    def _without(self, power: int) -> Scaled:
        scale = math.ldexp(self.work.settings.scale, -power)
        work = replace(self.work, settings=replace(self.work.settings, scale=scale))
        return Scaled(work, self.of_weights, self.of_scale + power)

    @cached_property
    def wide(self) -> Scaled:
        """With λ near 1, and results in float32."""
        near_one = self._without(math.frexp(self.work.settings.scale)[1])
        return replace(near_one, work=near_one.work.wide)

    def weighted(self, stacks: Sequence[Stack]) -> list[Stack]:
        if not self.of_weights:
            return list(stacks)
        by_ratio = self.work.by_ratio
        return [precision.weighted(s, self.of_weights, by_ratio) for s in stacks]
