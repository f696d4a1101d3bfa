"""λ where none is given: from the adapters alone, for the whole model at once.

    λ = c  sum_modules rms_i(|w_i| ||τ_i||_Sq) / mean_i |w_i|  /  sum_modules ||M||_Sq

over the modules that the same number of adapters have; M is the merge at λ = 1 and ||.||_Sq the
Schatten norm (methods/schatten.py). A merge that goes as far along its strongest directions as the
adapters do keeps most of what they gained: there it interferes most. In units of the Frobenius
norm, a merge with a flat spectrum would be stopped far too early. Weights are proportions under it:
[1, 1] is [2, 2]. A module that one adapter alone has keeps λ = 1. docs/methods.md says what was
measured, and where this fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .methods import schatten
from .methods.base import Rule
from .plan import Stack

DIGITS = 6
"""Of λ, so that it is what is printed, and sums in another order find the same one."""


@dataclass
class Sums:
    """The two sums of a rule's λ, by the number of adapters, module by module."""

    rule: Rule
    given: dict[int, list[float]] = field(default_factory=dict)
    merged: dict[int, list[float]] = field(default_factory=dict)

    def add(
        self,
        stacks: Sequence[Stack],
        blocks: tuple[Sequence[Tensor], Sequence[Tensor]],
        sizes: Sequence[float],
    ) -> None:
        """Count modules in. blocks: the diagonal blocks of their Grams, scalings in those of B,
        as `ops.block_gram` has them. sizes: ||M||_Sq, of stacks as they are."""
        for members, rows in _adapters(stacks, blocks, self.rule.order):
            for k, norms in zip(members, rows.tolist()):
                s, count = stacks[k], len(stacks[k].adapters)
                weights = [abs(w) for w in s.weights]
                squares = math.fsum((w * norm) ** 2 for w, norm in zip(weights, norms))
                given = math.sqrt(squares / count) / (math.fsum(weights) / count)
                true = 2.0 ** sum(s.powers)
                self.given.setdefault(count, []).append(true * given)
                self.merged.setdefault(count, []).append(true * sizes[k])

    def scales(self) -> Mapping[int, float]:
        """λ by the number of adapters that a module has; 1 where all merges are zero."""
        found = {}
        for count, given in self.given.items():
            merged = math.fsum(self.merged[count])
            scale = self.rule.constant * math.fsum(given) / merged if merged else 1.0
            found[count] = 1.0 if count == 1 else float(f"{scale:.{DIGITS}g}") or 1.0
        return found


def _adapters(
    stacks: Sequence[Stack], blocks: tuple[Sequence[Tensor], Sequence[Tensor]], order: int
) -> Iterable[tuple[list[int], Tensor]]:
    """Positions of stacks of the same ranks, and ||τ_i||_Sq [P, T] of their adapters."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for k, s in enumerate(stacks):
        alike.setdefault(s.a.ranks, []).append(k)
    for ranks, members in alike.items():
        a, b = ([side[k].double() for k in members] for side in blocks)
        yield members, schatten.of_adapters(a, b, ranks, order)
