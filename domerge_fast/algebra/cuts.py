"""Whether a cut keeps some of several equal singular values.

Their singular vectors may be turned into one another, so which of them are kept is decided by
rounding, and with it by the order of the adapters: the result would be one of many. A cut is
checked wherever singular values are known.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import FlatCut

__all__ = ["check_cut", "check_cuts", "cut"]

EQUAL = 2.0**-20
"""Of a singular value, how near the next one counts as equal. Values that `iso_c` makes equal are
within 9e-7 of it in float32; between those of sums of adapters the smallest gaps we saw, over all
cuts, were 2e-5."""

ALIKE = 1e-4
"""Within what four in a row count as equal: factors that nearly depend on each other have more
rounding, and singular values that are not equal keep apart."""

ZERO = 2.0**-20
"""A singular value below this share of the largest changes nothing, whichever way it is cut."""


def check_cut(values: Tensor, kept: int, at: int = 0) -> None:
    """Raise FlatCut if the cut after the first `kept` of singular values, in falling order, falls
    between equal ones. at: which of several matrices they are of."""
    if not 0 < kept < len(values):
        return
    first = max(0, kept - 2)
    near = values[first : kept + 2].tolist()
    last, following = near[kept - 1 - first], near[kept - first]
    if following <= ZERO * float(values[0]):
        return
    row = len(near) == 4 and near[0] - near[3] <= ALIKE * near[0]
    if row or last - following <= EQUAL * last:
        raise FlatCut(at, kept, last)


def check_cuts(values: Tensor, kept: Tensor) -> None:
    """`check_cut` of every row of values [P, q], kept [P]."""
    counts = kept.long().tolist()
    for at, (row, count) in enumerate(zip(values.detach().cpu(), counts)):
        check_cut(row, count, at)


def cut(
    singular_values: Tensor, rank: int | None, energy: float | None, at: int = 0
) -> tuple[int, float]:
    """How many singular values to keep (at least one), and their share of the energy. Raises
    FlatCut, with `at`, where that is not determined."""
    cumulative = singular_values.double().square().cumsum(0)
    total = float(cumulative[-1])
    k = len(singular_values)
    if energy is not None:
        k = 1 + int((cumulative < energy * total * (1 - 1e-12)).sum())
    if rank is not None:
        k = min(k, rank)
    k = min(k, len(singular_values))
    check_cut(singular_values, k, at)
    return k, float(cumulative[k - 1]) / total if total > 0 else 1.0
