"""λ where none is given: from the adapters alone, for the whole model at once.

    λ = d c  sum_modules rms_i(|w_i| ||τ_i||_Sq) / mean_i |w_i|  /  sum_modules ||M||_Sq

over the modules that the same number of adapters have; M is the merge at λ = 1 and ||.||_Sq the
Schatten norm (methods/schatten.py). A merge that goes as far along its strongest directions as the
adapters do keeps most of what they gained: there it interferes most. In units of the Frobenius
norm, a merge with a flat spectrum would be stopped far too early. Weights are proportions under it:
[1, 1] is [2, 2]. A module that one adapter alone has keeps λ = 1.

    d = 1 / (1 + 6 max(0, ρ - 0.08)),  ρ^2 = mean_i (sum_modules ||τ_i||_F^2 / sum_modules m)

ρ is about how large the updates are beside the weights they are added to, of which a trained row
has a length near 1. Gentle adapters of a large model have .01 to .07; where ρ is more, adapters are
trained so far that interference grows faster than what is kept, and λ is damped. Methods that add
up what does not overlap, and `svc`, have their scale already: for them λ = d. docs/methods.md says
what was measured, and where this fails.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .methods import schatten
from .methods.base import ScaleRule
from .plan import Stack

DIGITS = 6
"""Of λ, so that it is what is printed, and sums in another order find the same one."""

GENTLE, DAMPING = 0.08, 6.0
"""The ρ up to which λ is not damped, and how fast it falls beyond."""


@dataclass
class Sums:
    """The sums of a rule's λ, by the number of adapters, module by module; and for ρ, of every
    adapter, the ||τ_i||_F^2 and how many rows they have."""

    rule: ScaleRule
    given: dict[int, list[float]] = field(default_factory=dict)
    merged: dict[int, list[float]] = field(default_factory=dict)
    energy: dict[int, list[float]] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)

    def add(
        self,
        stacks: Sequence[Stack],
        blocks: tuple[Sequence[Tensor], Sequence[Tensor]],
        sizes: Sequence[float | None],
    ) -> None:
        """Count modules in. blocks: the diagonal blocks of their Grams, scalings in those of B,
        as `ops.block_gram` has them. sizes: ||M||_Sq of stacks as they are, or None where the rule
        takes no norms."""
        order = self.rule.order or 2
        for members, norms, squares in _adapters(stacks, blocks, order):
            for k, own, energy in zip(members, norms.tolist(), squares.tolist()):
                s, size = stacks[k], sizes[k]
                true = 2.0 ** sum(s.powers)
                for i, x in zip(s.adapters, energy):
                    self.energy.setdefault(i, []).append(true**2 * x)
                    self.rows[i] = self.rows.get(i, 0) + s.b.d
                count = len(s.adapters)
                weights = [abs(w) for w in s.weights]
                total = math.fsum((w * norm) ** 2 for w, norm in zip(weights, own))
                given = math.sqrt(total / count) / (math.fsum(weights) / count)
                self.given.setdefault(count, []).append(true * given)
                self.merged.setdefault(count, []).append(true * (size or 0.0))

    def damping(self) -> float:
        """d of all adapters."""
        shares = [math.fsum(x) / self.rows[i] for i, x in sorted(self.energy.items())]
        return damping(math.sqrt(math.fsum(shares) / len(shares))) if shares else 1.0

    def scales(self) -> Mapping[int, float]:
        """λ by the number of adapters that a module has; d where the rule takes no norms, or all
        merges are zero."""
        found, damped = {}, self.damping()
        for count, given in sorted(self.given.items()):
            scale, merged = damped, math.fsum(self.merged[count])
            if self.rule.order and merged:
                scale *= self.rule.constant * math.fsum(given) / merged
            found[count] = rounded(scale)
        return found


def rounded(scale: float) -> float:
    return float(f"{scale:.{DIGITS}g}")


def damping(size: float) -> float:
    """d for ρ."""
    return 1 / (1 + DAMPING * max(0.0, size - GENTLE))


def _adapters(
    stacks: Sequence[Stack], blocks: tuple[Sequence[Tensor], Sequence[Tensor]], order: int
) -> Iterable[tuple[list[int], Tensor, Tensor]]:
    """Positions of stacks of the same ranks, and of their adapters ||τ_i||_Sq and ||τ_i||_F^2,
    [P, T]."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for k, s in enumerate(stacks):
        alike.setdefault(s.a.ranks, []).append(k)
    for ranks, members in alike.items():
        a, b = ([side[k].double() for k in members] for side in blocks)
        norms = schatten.of_adapters(a, b, ranks, order)
        yield members, norms, schatten.of_adapters(a, b, ranks, 2).square()
