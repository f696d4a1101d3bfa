"""How far adapters go along another adapter's update, taken for a direction, module by module.

<τ_i, τ_d> = Σ (B_d^T B_i) o (A_d A_i^T) needs R x R products alone. In float64: cosines of nearly
orthogonal updates are differences of large numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .adapters import Adapter
from .errors import AdapterError
from .results.report import Direction

__all__ = ["against", "shares"]

Factors = tuple[Tensor, Tensor]


def against(adapters: Sequence[Adapter], direction: Adapter) -> Direction:
    """The cosines between the adapters' updates and the direction's, by module and of all modules
    together. AdapterError where no adapter shares a module with it."""
    _check(*adapters, direction)
    modules: dict[str, tuple[float | None, ...]] = {}
    inner = [0.0] * len(adapters)
    squares, own = [0.0] * len(adapters), 0.0
    for name in sorted({*direction.modules, *(n for a in adapters for n in a.modules)}):
        of_direction = _factors(direction, name)
        size = _inner(of_direction, of_direction)
        own += size
        row: list[float | None] = []
        for i, adapter in enumerate(adapters):
            factors = _factors(adapter, name)
            square, along = _inner(factors, factors), _inner(of_direction, factors)
            squares[i] += square
            inner[i] += along
            missing = factors is None or of_direction is None
            row.append(None if missing else _over(along, square, size))
        if any(x is not None for x in row):
            modules[name] = tuple(row)
    if not modules:
        problem = "has no module that one of the adapters has"
        raise AdapterError(direction.name, None, problem, "give one for the same model")
    cosine = tuple(_over(x, square, own) for x, square in zip(inner, squares))
    return Direction(direction.name, cosine, modules)


def shares(adapter: Adapter, direction: Adapter) -> dict[str, float]:
    """c = <τ, τ_d> / ||τ_d||^2 of every module that both have: τ - c τ_d is orthogonal to τ_d."""
    _check(adapter, direction)
    found = {}
    for name in adapter.modules:
        of_direction = _factors(direction, name)
        size = _inner(of_direction, of_direction)
        if size > 0:
            found[name] = _inner(of_direction, _factors(adapter, name)) / size
    return found


def _check(*adapters: Adapter) -> None:
    """AdapterError for an update that is no product of factors."""
    for adapter in adapters:
        if adapter.magnitudes:
            problem = "is a DoRA, whose update is no product of its factors"
            raise AdapterError(adapter.name, None, problem, "merge it alone with its base first")


def _factors(adapter: Adapter, name: str) -> Factors | None:
    """A [r, n] and B [m, r] with the scaling, in float64; None where there is no such module."""
    module = adapter.modules.get(name)
    if module is None:
        return None
    a, b = adapter.factors(name)
    return a.double(), module.scaling * b.double()


def _inner(one: Factors | None, other: Factors | None) -> float:
    """<τ, τ'>, 0 where one is missing."""
    if one is None or other is None:
        return 0.0
    return float(((one[1].T @ other[1]) * (one[0] @ other[0].T)).sum())


def _over(inner: float, square: float, other: float) -> float:
    size = math.sqrt(max(square, 0.0)) * math.sqrt(max(other, 0.0))
    return max(-1.0, min(1.0, inner / size)) if size > 0 else 0.0
