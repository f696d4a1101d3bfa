"""The descent on the factors themselves in plain PyTorch, for the squared penalty: O(R d^2) a step.

With n_i = ||X_i||_F, Y_i = Xhat_i / sqrt(n_i), S = sum_j Y_j^T Y_j [d, d] and K_i = Y_i Y_i^T:

    f = ||S||^2 - sum_i ||K_i||^2 + gamma ||Xhat - X||^2
    df/dXhat_i = 4 / sqrt(n_i) (Y_i S - K_i Y_i) + 2 gamma (Xhat_i - X_i)

The rule, the same in csrc/cpu/factor_descent.cpp: conjugate gradients as in descent.py, but

- from the best of all alpha_i X_i, if that is better than X: the alpha_i are those of X_i with
  directions at random that overlap as much in all (`mean_field`);
- preconditioned by what needs no Gram: the rows of adapter i by 1 / (2 gamma + 4 tr(S) / (n_i d)),
  one over the mean curvature along directions at random.

A step costs 4 R d^2 flops: Y S, and the Grams of Z and of Y + Z, of which the line's terms follow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .descent import NEGLIGIBLE, STATS, Line, enough

__all__ = ["FACTOR_STATS", "LEAST_SHARE", "in_factor_form", "mean_field"]

FACTOR_STATS = (*STATS, "scaled")
"""cross_left is here of sum_{i != j} ||Xhat_i Xhat_j^T||^2 / (n_i n_j); scaled is the share of
||Xhat - X||^2 that is numbers times the X_i: how much was shrinking rather than turning."""

LEAST_SHARE = 1e-3
"""Of the sum over all pairs: where those of two adapters hold less, float32 lost their digits."""
SQUARE_COLUMNS = 512
"""Of a symmetric product, multiplied at a time."""
PIECE = 1 << 20
"""Numbers in a temporary product: what the allocator still keeps instead of returning it."""
HALVINGS = 60
"""Of the error of the start's factors."""
ALIKE = 0.01
"""Where they differ by less, their mean is every adapter's: S is then that of X times a number."""


def in_factor_form(
    x: Tensor, ranks: tuple[int, ...], gamma: float, steps: int, tol: float
) -> tuple[Tensor, Tensor]:
    """Descend on Xhat itself. x [R, d] -> Xhat [R, d], and `FACTOR_STATS` [6] in float64.

    Products are in the dtype of x, what is summed from them for the line search in float64. For
    float32 that leaves 1e-7 of the sum over all pairs to chance, and f cannot rise by more. It
    is little beside `tol`, unless the pairs of two adapters are a small rest of that sum (one
    adapter dominates, or next to nothing is left): then all is done again in float64.
    """
    size = torch.linalg.vector_norm(x, dtype=torch.float64) / len(x) ** 0.5
    size = size.where(size > 0, 1.0)
    form = _Factors(x / size.to(x.dtype), ranks, gamma)
    stats = x.new_zeros(len(FACTOR_STATS), dtype=torch.float64)
    if not form.interfere:
        return x, stats
    before = overlap = form.overlap()
    taken = 0
    if steps and overlap > 0:
        overlap = form.start(overlap)
        form.precondition()
        taken, overlap = _descend(form, overlap, steps, tol)
    if x.dtype == torch.float32 and form.least_share < LEAST_SHARE:
        return in_factor_form(x.double(), ranks, gamma, steps, tol)
    unit, total = float(size) ** 2, float(_inner(form.x, form.x).sum())
    after = overlap + gamma * form.moved
    found = [taken, before * unit, after * unit, overlap / before if before > 0 else 0.0]
    found += [(form.moved / total) ** 0.5 if total > 0 else 0.0, form.scaled()]
    return form.x_hat[form.real] * size.to(x.dtype), stats.copy_(
        torch.tensor(found, dtype=torch.float64)
    )


def _descend(form: _Factors, overlap: float, steps: int, tol: float) -> tuple[int, float]:
    """Steps taken, and the penalty's part of f."""
    old, gains = 0.0, list[Tensor]()
    g_old = form.direction
    while len(gains) < steps:
        g = form.gradient()
        preconditioned = form.step * g
        norm = _dot(g, preconditioned)
        if not norm > torch.finfo(g.dtype).eps * (overlap + form.gamma * form.moved):
            break  # of a gradient that is rounding alone, the line is, too
        beta = max(0.0, (norm - _dot(preconditioned, g_old)) / old) if old > 0 else 0.0
        if beta * _dot(g, form.direction) >= norm:
            beta = 0.0
        form.direction = (beta * form.direction).sub_(preconditioned)
        old, g_old = norm, g
        line = form.line()
        eta = line.minimum()
        if not float(eta) > 0:
            break
        objective = line.value(eta)
        gains.append(line.value(torch.zeros_like(eta)) - objective)
        form.advance(float(eta), float(line.moved_at(eta)))
        overlap = float(objective) - form.gamma * form.moved
        if enough(gains, (tol * objective).clamp_min(0)):
            break
    return len(gains), overlap


def mean_field(norms: Tensor, gamma: float, per_pair: float) -> Tensor:
    """alpha_i = 1 / (1 + 2 / (gamma n_i) sum_{j != i} alpha_j^2 n_j per_pair), [T] in float64;
    1 where n_i is 0; the others' mean for all of these where they are alike.

    per_pair: ||X_i X_j^T||^2 over n_i^2 n_j^2, 1 / d for directions at random.
    """
    alpha = torch.ones_like(norms)
    coupling = torch.where(norms > 0, 2 * per_pair / (gamma * norms), 0.0)
    for _ in range(HALVINGS):
        sizes = alpha.square() * norms
        alpha = (alpha + 1 / (1 + coupling * (sizes.sum() - sizes))) / 2
    given = alpha[norms > 0]
    if len(given) and given.max() <= (1 + ALIKE) * given.min():
        return torch.where(norms > 0, given.mean(), 1.0)
    return torch.where(norms > 0, alpha, 1.0)


class _Factors:
    """One problem, its blocks padded with zero rows to [T, r, d].

    S and the K_i are moved along with Xhat, by the products that the line search needs anyway.
    """

    def __init__(self, x: Tensor, ranks: tuple[int, ...], gamma: float) -> None:
        sizes = torch.tensor(ranks, device=x.device)
        self.real = torch.arange(max(ranks), device=x.device) < sizes[:, None]  # [T, r]
        self.x = x.new_zeros(*self.real.shape, x.shape[1])
        self.x[self.real] = x
        norms = _inner(self.x, self.x).sqrt()
        self.norms = torch.where(norms > NEGLIGIBLE * norms.amax(), norms, 0.0)  # n_i, or 0
        root = torch.where(self.norms > 0, self.norms.rsqrt(), 0.0).to(x.dtype)
        self.root, self.gamma = root[:, None, None], gamma
        self.interfere = int((self.norms > 0).sum()) > 1
        self.least_share, self.moved = 1.0, 0.0
        self.alpha = torch.ones_like(self.norms)
        self.x_hat = self.x.clone()
        self.direction = torch.zeros_like(self.x)
        self.h = _squares(self.root * self.x_hat)

    def overlap(self) -> float:
        """||S||^2 - sum_i ||K_i||^2."""
        return 2 * self._pairs(self.h)

    def _pairs(self, h: _Sums) -> float:
        difference = _cross(h, h)
        whole = _dot(h.whole, h.whole)
        if whole > 0:
            self.least_share = min(self.least_share, 2 * difference / whole)
        return difference

    def start(self, overlap: float) -> float:
        """To alpha_i X_i where that is better than X. Returns the overlap there."""
        if self.gamma == 0:
            return overlap
        weights = self.norms.sum() ** 2 - self.norms.square().sum()
        alpha = mean_field(self.norms, self.gamma, overlap / float(weights))
        x_hat = alpha.to(self.x.dtype)[:, None, None] * self.x
        h = _squares(self.root * x_hat)
        found = 2 * _cross(h, h)
        moved = float(((1 - alpha) * self.norms).square().sum())
        if found + self.gamma * moved < overlap:
            self.x_hat, self.h, self.alpha, self.moved = x_hat, h, alpha, moved
            return found
        return overlap

    def precondition(self) -> None:
        trace = float((self.alpha.square() * self.norms).sum())
        curvature = 2 * self.gamma + 4 * trace / (self.norms * self.x.shape[2])
        step = torch.where(self.norms > 0, 1 / curvature, 0.0)
        self.step = step.to(self.x.dtype)[:, None, None]

    def gradient(self) -> Tensor:
        y = self.root * self.x_hat
        pull = (y.flatten(0, 1) @ self.h.whole).view_as(y)
        pull.baddbmm_(self.h.own, y, alpha=-1).mul_(4 * self.root)
        return pull.add_(self.x_hat - self.x, alpha=2 * self.gamma)

    def line(self) -> Line:
        """f along the direction."""
        y, z, h = self.root * self.x_hat, self.root * self.direction, self.h
        mixed = y @ z.mT
        self.f = f = _squares(z)
        both = _squares(y.add_(z)).whole
        self.e = e = _Sums(both.sub_(h.whole).sub_(f.whole), mixed + mixed.mT)
        quartic = [self._pairs(h), 2 * _cross(h, e), _cross(e, e) + 2 * _cross(h, f)]
        quartic += [2 * _cross(e, f), _cross(f, f)]
        change = 2 * _dot(self.direction, self.x_hat - self.x)
        quadratic = [self.moved, change, _dot(self.direction, self.direction)]
        device = self.x.device
        coefficients = torch.tensor(quartic, dtype=torch.float64, device=device)
        moved = torch.tensor(quadratic, dtype=torch.float64, device=device)
        return Line(coefficients[None, None], None, moved[None], self.gamma)

    def advance(self, eta: float, moved: float) -> None:
        self.x_hat.add_(self.direction, alpha=eta)
        for h, e, f in zip(self.h, self.e, self.f):
            h.add_(e, alpha=eta).add_(f, alpha=eta * eta)
        self.moved = moved

    def scaled(self) -> float:
        """The share of ||Xhat - X||^2 that is numbers times the X_i."""
        squares, mixed = _inner(self.x, self.x), _inner(self.x_hat, self.x)
        along = torch.where(squares > 0, (mixed - squares).square() / squares, 0.0).sum()
        return min(1.0, float(along) / self.moved) if self.moved > 0 else 0.0


class _Sums(NamedTuple):
    """sum_i Y_i^T Z_i [d, d] and every Y_i Z_i^T [T, r, r]."""

    whole: Tensor
    own: Tensor


def _squares(y: Tensor) -> _Sums:
    """The sums for Z = Y [T, r, d]: of the whole, what lies below the diagonal is mirrored."""
    rows = y.flatten(0, 1)
    whole = y.new_empty(y.shape[2], y.shape[2])
    for i in range(0, len(whole), SQUARE_COLUMNS):
        j = i + SQUARE_COLUMNS
        whole[i:, i:j] = rows[:, i:].T @ rows[:, i:j]
        whole[i:j, j:] = whole[j:, i:j].T
    return _Sums(whole, y @ y.mT)


def _cross(first: _Sums, second: _Sums) -> float:
    """Half of <S, S'> - sum_i <K_i, K'_i>."""
    return (_dot(first.whole, second.whole) - _dot(first.own, second.own)) / 2


def _dot(x: Tensor, y: Tensor) -> float:
    return float(_inner(x.flatten(0, -2)[None], y.flatten(0, -2)[None]).sum())


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> of every matrix [P, rows, columns], the sums of the rows added in float64: [P].

    In pieces: a product as large as x would cost more in memory than in arithmetic.
    """
    rows = max(1, PIECE // x.shape[-1])
    pieces = [(a * b).sum(-1) for a, b in zip(x.split(rows, 1), y.split(rows, 1))]
    return torch.cat(pieces, 1).sum(1, dtype=torch.float64)
