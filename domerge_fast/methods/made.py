"""What a method makes of modules: factors, or a matrix where there are none."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from .side_report import SideReports

__all__ = ["Dense", "Factors", "Made"]


@dataclass(frozen=True, eq=False)
class Factors:
    """The merged modules of a stack: ΔW = B A with A [R, n] and B [m, R], with P before both where
    the stack has that, and how they came about.

    norms: ||ΔW_i||_F of the stack's adapters by module, where the method worked them out. kept,
    energy: by module the share of ||ΔW||_F^2 that a cut left, and that before it; () where it was
    not cut yet. finite: which of A and B were seen to be finite as they were made: these tensors
    themselves, so that nothing is said of what takes their place.
    """

    a: Tensor
    b: Tensor
    a_side: SideReports | None = None
    b_side: SideReports | None = None
    norms: Sequence[Sequence[float]] | None = None
    kept: Sequence[float] = ()
    energy: Sequence[float] = ()
    finite: Sequence[Tensor] = ()

    @classmethod
    def of(cls, a: Tensor, bt: Tensor, finite: Collection[int], **others: Any) -> Factors:
        """Of A and B^T as ops give them. finite: the ids of results that were seen to be."""
        b = bt.mT
        known = [x for x, result in ((a, a), (b, bt)) if id(result) in finite]
        return cls(a, b, finite=known, **others)

    @property
    def count(self) -> int | None:
        """Of modules, None for one without a dimension for them."""
        return None if self.a.dim() == 2 else self.a.shape[0]

    def times(self, power_a: int, power_b: int) -> Factors:
        return replace(self, **_sized(self, power_a, power_b))

    def each(self) -> list[Factors]:
        """Those of the modules, one by one."""
        if self.count is None:
            return [self]
        pairs = enumerate(zip(self.a.unbind(), self.b.unbind()))
        return [
            Factors(
                a,
                b,
                self.a_side and self.a_side.of_module(k),
                self.b_side and self.b_side.of_module(k),
                self.norms and self.norms[k : k + 1],
                self.kept[k : k + 1],
                self.energy[k : k + 1],
            )
            for k, (a, b) in pairs
        ]


@dataclass(frozen=True, eq=False)
class Dense:
    """A merged module that is no product of thin factors: ΔW [m, n] in float32."""

    delta: Tensor
    a_side: SideReports | None = None
    b_side: SideReports | None = None
    norms: Sequence[Sequence[float]] | None = None
    count: ClassVar[None] = None

    def times(self, power_a: int, power_b: int) -> Dense:
        return replace(self, **_sized(self, power_a, power_b))

    @property
    def reports(
        self,
    ) -> tuple[SideReports | None, SideReports | None, Sequence[Sequence[float]] | None]:
        return self.a_side, self.b_side, self.norms


def _sized(made: Factors | Dense, power_a: int, power_b: int) -> dict[str, Any]:
    """What is reported of adapters whose A is 2^power_a, and whose B 2^power_b times as large."""
    size = 2.0 ** (power_a + power_b)
    norms = made.norms and [[size * norm for norm in row] for row in made.norms]
    return {
        "a_side": made.a_side and made.a_side.times(power_a),
        "b_side": made.b_side and made.b_side.times(power_b),
        "norms": norms,
    }


Made = Sequence[Factors | Dense]
"""What a method makes of stacks: of each, or of its modules one after the other."""
