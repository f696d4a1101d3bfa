"""What the elementwise methods share: from a rule for entries to the merged ΔW of a module.

Updates are made tile by tile (ops/entries.py), never T dense matrices. Thresholds are exact order
statistics of |τ_i| (thresholds.py), of a module or of the whole model.
Cost: 2 m n R flops a pass over a module; one pass for the merge, two more for a threshold (three
for two of them), one for rescaling to the L1 norm. Returns a dense ΔW, written as such or cut to
rank k by randomized SVD.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ... import ops
from ...adapters.plan import Stack
from ...algebra.entry_rules import Draw, Election, Trim
from ...options import option
from ..base import Merge, Method, ScaleRule, Settings
from ..groups import Groups, Here
from ..made import Dense
from ..thresholds import Bands, Positions, bands

__all__ = [
    "Rule",
    "conventions",
    "density",
    "largest",
    "majority_sign_method",
    "method",
    "scope",
    "seed",
]

CONVENTIONS = ("paper", "peft", "mergekit")
SIGNS = ("total", "frequency")
SCOPES = ("auto", "tensor", "model")
LEAST_NORM = 1e-7
"""An L1 norm below it is left alone, as mergekit does."""


def density(default: float) -> float:
    return option(default, "share of the entries of an update that is kept", low=0.0, high=1.0)


def conventions(known: tuple[str, ...] = CONVENTIONS, default: str = "peft") -> str:
    return option(default, "whose definition to follow where they differ", known)


def majority_sign_method() -> str:
    return option("total", "what elects a sign: the sum of values or of their signs", SIGNS)


def scope() -> str:
    return option("auto", "where the largest entries are sought: each tensor, or the model", SCOPES)


def seed() -> int:
    return option(0, "of the random choices", low=0, high=2**63 - 1)


@dataclass(frozen=True)
class Rule:
    """How a method treats every entry. positions: None to keep all, by size. rescale: nothing, by
    the entry's probability, or to the L1 norm that the update had. whole: whether positions are
    those of the whole model."""

    election: Election
    positions: Positions | None = None
    whole: bool = False
    keep: float = 1.0
    spread: float = 0.0
    rescale: str = "nothing"
    seed: int = 0


def largest(density: float, least: int = 0) -> Positions | None:
    """The int(density N) largest entries, at least `least`; entries equal to the last one too."""
    if density == 1:
        return None
    return lambda count: (count - max(least, int(density * count)), count - 1)


def method(
    name: str,
    summary: str,
    options: type,
    rule: Callable[..., Rule],
    *,
    source: str,
    needs: str = "",
) -> Method:
    """The row of a method that is a rule for entries: rule(options) -> Rule."""

    def prepare(groups: Groups[Sequence[Stack]], options: object, settings: Settings) -> Merge:
        found = rule(options)
        ends: Bands | None = None
        if found.whole and found.positions:
            ends = bands(groups, found.positions, settings.backend, settings.counted)
        return lambda stacks, grams_a, grams_b, options, settings: [
            Dense(_merged(s, found, ends, settings)) for s in stacks
        ]

    def merge(
        stacks: Sequence[Stack],
        grams_a: Sequence[Tensor | None],
        grams_b: Sequence[Tensor | None],
        options: object,
        settings: Settings,
    ) -> list[Dense]:
        """Of a model that consists of these modules."""
        prepared = prepare(Here([stacks]), options, settings)
        return prepared(stacks, grams_a, grams_b, options, settings)  # type: ignore[return-value]

    return Method(
        name,
        summary,
        options,
        merge,
        dense=True,
        by_ratio=lambda options: rule(options).election.mean == "weight",
        prepare=prepare,
        rule=lambda options, inner: ScaleRule(None, 1.25),
        cost="2 m n R flops a pass, 1 to 4 passes",
        source=source,
        needs=needs,
    )


def _merged(stack: Stack, rule: Rule, ends: Bands | None, settings: Settings) -> Tensor:
    if ends is None and rule.positions:
        ends = bands(Here([[stack]]), rule.positions, settings.backend, settings.counted)
    divided = rule.rescale == "probability"
    own = [ends[i] if ends else (0.0, math.inf) for i in stack.adapters]
    trims = [Trim(*band, rule.keep, rule.spread, rescale=divided) for band in own]
    draw = Draw(rule.seed, zlib.crc32(stack.name.encode()), stack.adapters)
    if rule.rescale == "norm":
        sums = ops.entry_sums(stack.a, stack.b, trims, draw, backend=settings.backend)
        least = LEAST_NORM * 2.0 ** -sum(stack.powers)
        pairs = zip(trims, sums.tolist())
        trims = [replace(t, gain=_gain(old, new, least)) for t, (old, new) in pairs]
    return ops.entry_merge(
        stack.a,
        stack.b,
        trims,
        stack.weights,
        rule.election,
        draw,
        settings.scale,
        backend=settings.backend,
    )


def _gain(before: float, after: float, least: float) -> float:
    return before / after if min(before, after) >= least else 1.0
