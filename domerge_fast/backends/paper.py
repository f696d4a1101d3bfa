"""DO-Merging of one module written from the paper's formulas, dense, in float64.

Nothing here knows that Xhat = C X, every ΔW_i [m, n] is formed, and nothing is shared with the fast
backends: what these compute is held against it.

Source: arXiv 2505.15875 for the loss, the order and the column magnitudes; the penalty's
normalisation, the step rule and the constants are stated in docs/algorithm.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ZERO_COLUMN", "descend", "do_merging", "gradient", "loss"]

EPSILON = 1e-3
ZERO_COLUMN = 1e-6
NEGLIGIBLE = 1e-6


def do_merging(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    omega: Sequence[float],
    *,
    penalty: str = "squared",
    gamma: float = 1.0,
    sides: str = "both",
    steps: int = 50,
    tol: float = 1e-3,
    orthogonalize: bool = True,
    decouple: bool = True,
    renormalize: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The merged ΔW [m, n] of A_i [r_i, n] and (already scaled) B_i [m, r_i]."""
    a, b = [x.to(dtype) for x in a], [x.to(dtype) for x in b]
    if orthogonalize and sides in ("both", "A"):
        a, _ = descend(a, penalty, gamma, steps, tol)
    if orthogonalize and sides in ("both", "B"):
        b = [x.T for x in descend([x.T for x in b], penalty, gamma, steps, tol)[0]]
    deltas = [bi @ ai for ai, bi in zip(a, b)]
    if not decouple:
        return scale * torch.stack([w * delta for w, delta in zip(omega, deltas)]).sum(0)
    magnitude = torch.zeros_like(deltas[0][0])
    direction = torch.zeros_like(deltas[0])
    size = torch.zeros_like(magnitude)
    for w, delta, ai, bi in zip(omega, deltas, a, b):
        column_norms = delta.norm(dim=0)
        column_norms[column_norms <= ZERO_COLUMN * bi.norm() * ai.norm(dim=0)] = 0
        magnitude += abs(w) * column_norms
        present = column_norms > 0
        direction[:, present] += w * delta[:, present] / column_norms[present]
        size += abs(w) * present
    if renormalize:
        lengths = direction.norm(dim=0)
        direction = torch.where(lengths > ZERO_COLUMN * size, direction / lengths, 0.0)
    return scale * direction * magnitude


def loss(
    x_hat: Sequence[Tensor], x: Sequence[Tensor], penalty: str = "squared", gamma: float = 1.0
) -> Tensor:
    """sum_{i != j} phi(||Xhat_i Xhat_j^T||_F) + gamma sum_i ||Xhat_i - X_i||_F^2."""
    total, sizes = x[0].new_zeros(()), _sizes(x)
    for i, xi in enumerate(x_hat):
        for j, xj in enumerate(x_hat):
            size = sizes[i] * sizes[j]
            if i == j or size == 0:
                continue
            squared = (xi @ xj.T).square().sum()
            if penalty == "squared":
                total = total + squared / size
            else:
                total = total + (squared + (EPSILON * size) ** 2).sqrt()
    for xi, yi in zip(x_hat, x):
        total = total + gamma * (xi - yi).square().sum()
    return total


def gradient(
    x_hat: Sequence[Tensor], x: Sequence[Tensor], penalty: str = "squared", gamma: float = 1.0
) -> list[Tensor]:
    """∂loss/∂Xhat_i [r_i, d] of every adapter."""
    result, sizes = [2 * gamma * (xi - yi) for xi, yi in zip(x_hat, x)], _sizes(x)
    for i, xi in enumerate(x_hat):
        for j, xj in enumerate(x_hat):
            size = sizes[i] * sizes[j]
            if i == j or size == 0:
                continue
            cross = xi @ xj.T
            if penalty == "squared":
                result[i] += 4 / size * cross @ xj
            else:
                result[i] += 2 / (cross.square().sum() + (EPSILON * size) ** 2).sqrt() * cross @ xj
    return result


def _sizes(x: Sequence[Tensor]) -> list[float]:
    """||X_i||_F, 0 for adapters that are negligible beside the largest: they are left alone."""
    norms = [float(xi.norm()) for xi in x]
    return [norm if norm > NEGLIGIBLE * max(norms) else 0.0 for norm in norms]


def descend(
    x: Sequence[Tensor],
    penalty: str = "squared",
    gamma: float = 1.0,
    steps: int = 50,
    tol: float = 1e-3,
) -> tuple[list[Tensor], list[float]]:
    """Xhat_i [r_i, d] after the descent on the factors themselves.

    Polak-Ribiere+ conjugate gradients with an exact line search, on X divided by its root mean
    square row norm; each adapter's part of a gradient is divided by the mean curvature along its
    rows. Ends when three times what is left is below tol of the loss, were decreases to go on
    falling as they did at worst in the last two, or a decrease is below a tenth of tol.
    Returns Xhat and [steps, f before, f after, cross energy left, change].
    """
    rows = sum(len(xi) for xi in x)
    unit = math.sqrt(sum(float(xi.square().sum()) for xi in x) / rows) or 1.0
    x = [xi / unit for xi in x]
    x_hat, taken = [xi.clone() for xi in x], 0
    f_start = f = float(loss(x_hat, x, penalty, gamma))
    lengths = _step_lengths(x, penalty, gamma)
    previous: list[Tensor] = []
    direction: list[Tensor] = []
    decreases: list[float] = []
    length = 0.0
    for _ in range(steps):
        p = gradient(x_hat, x, penalty, gamma)
        scaled = [s * g for s, g in zip(lengths, p)]
        if _dot(p, scaled) == 0:
            break
        if not previous:
            direction = [-g for g in scaled]
        else:
            beta = max(0.0, (_dot(p, scaled) - _dot(p, previous)) / length)
            direction = [beta * d - g for d, g in zip(direction, scaled)]
            if _dot(p, direction) >= 0:
                direction = [-g for g in scaled]
        previous, length = scaled, _dot(p, scaled)
        eta = _exact_step(x_hat, x, direction, penalty, gamma)
        trial = [xi + eta * d for xi, d in zip(x_hat, direction)]
        f_new = float(loss(trial, x, penalty, gamma))
        if eta == 0 or f_new > f:
            break
        decreases.append(f - f_new)
        x_hat, taken, f = trial, taken + 1, f_new
        if _is_done(decreases, tol * f):
            break
    before, after = _cross_energy(x), _cross_energy(x_hat)
    size = sum(float(xi.square().sum()) for xi in x)
    moved = sum(float((xi - yi).square().sum()) for xi, yi in zip(x_hat, x))
    stats = [
        taken,
        f_start * unit**2,
        f * unit**2,
        after / before if before else 0.0,
        math.sqrt(moved / size) if size else 0.0,
    ]
    return [xi * unit for xi in x_hat], [float(s) for s in stats]


def _step_lengths(x: Sequence[Tensor], penalty: str, gamma: float) -> list[float]:
    """Of every adapter, one over the mean curvature of the loss along its rows where Xhat = X.

    The others are as they are; curvature that phi's own may take away does not count. That of the
    overlap is at least 1e-4 of the largest. 0 of an adapter that overlaps with none.
    """
    pulls, sizes = [], _sizes(x)
    for i, xi in enumerate(x):
        pull = 0.0
        for j, xj in enumerate(x):
            size = sizes[i] * sizes[j]
            if i == j or size == 0:
                continue
            squared = float((xi @ xj.T).square().sum())
            if penalty == "squared":
                pull += 4 / size * squared
            else:
                pull += 2 / math.sqrt(squared + (EPSILON * size) ** 2) * squared
        pulls.append(pull / sizes[i] ** 2 if pull > 0 else 0.0)
    least = 1e-4 * max(pulls)
    return [1 / (2 * gamma + max(pull, least)) if pull > 0 else 0.0 for pull in pulls]


def _is_done(decreases: Sequence[float], allowed: float) -> bool:
    """Whether what is left to gain is below what is allowed."""
    last = decreases[-1]
    if last <= allowed / 10:
        return True
    if len(decreases) < 3:
        return False
    now, before = last / decreases[-2], decreases[-2] / decreases[-3]
    ratio = max(now, before, now * now / before / 2)
    return ratio < 1 and 3 * last * ratio <= allowed * (1 - ratio)


def _dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    return sum(float((xi * yi).sum()) for xi, yi in zip(x, y))


def _cross_energy(x: Sequence[Tensor]) -> float:
    return sum(
        float((xi @ xj.T).square().sum())
        for i, xi in enumerate(x)
        for j, xj in enumerate(x)
        if i != j
    )


def _exact_step(
    x_hat: Sequence[Tensor],
    x: Sequence[Tensor],
    direction: Sequence[Tensor],
    penalty: str,
    gamma: float,
) -> float:
    """The first minimum of the loss along the direction: its slope's first change of sign."""
    crosses, sizes = [], _sizes(x)
    for i in range(len(x)):
        for j in range(i):
            size = sizes[i] * sizes[j]
            if size == 0:
                continue
            h = x_hat[i] @ x_hat[j].T
            e = direction[i] @ x_hat[j].T + x_hat[i] @ direction[j].T
            f = direction[i] @ direction[j].T
            inner = [float((u * v).sum()) for u, v in ((h, h), (h, e), (e, e), (h, f), (e, f))]
            crosses.append((size, *inner, float(f.square().sum())))
    pull = 2 * gamma * _dot(direction, [xi - yi for xi, yi in zip(x_hat, x)])
    bend = 2 * gamma * _dot(direction, direction)

    def slope(eta: float) -> float:
        total = pull + bend * eta
        for size, hh, he, ee, hf, ef, ff in crosses:
            value = hh + eta * (2 * he + eta * (ee + 2 * hf + eta * (2 * ef + eta * ff)))
            rise = 2 * he + eta * (2 * (ee + 2 * hf) + eta * (6 * ef + eta * 4 * ff))
            if penalty == "squared":
                total += 2 * rise / size
            else:
                total += rise / math.sqrt(max(value, 0.0) + (EPSILON * size) ** 2)
        return total

    low, high = 0.0, 1 / 64
    while slope(high) < 0 and high < 2.0**54:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2
