"""The orthogonalizing descent in plain PyTorch, on R x R matrices.

Minimised over Xhat, starting at X (arXiv 2505.15875, step 1; H = Xhat Xhat^T):

    f = sum_{i != j} phi_ij(||H_ij||_F) + gamma ||Xhat - X||_F^2
    squared:    phi = x^2 / (n_i n_j)                       n_i = ||X_i||_F
    frobenius:  phi = sqrt(x^2 + (EPSILON n_i n_j)^2)

Every direction used is a combination of gradients, and a gradient is a matrix times X, so
Xhat = C X throughout and the whole descent runs on C and H = C G C^T. Where there are more rows
than columns it is cheaper to descend on Xhat (factor_descent.py).

The rule, the same in every backend: Polak-Ribiere+ conjugate gradients in the Frobenius metric
of Xhat, preconditioned, with an exact line search. Along a line every ||H_ij||^2 is a quartic, so
the search costs a few scalars and f cannot rise. X is normalised first: the factors' scale has no
influence. The rows of adapter i are preconditioned by

    1 / (2 gamma + sum_j V_ij ||H_ij||_F^2 / n_i^2)     V_ij = 2 phi'(x) / x, at Xhat = X

one over the mean curvature of f along the rows of X_i, the others being as they are. It stops when
what is left to gain is below `tol` of f (`enough`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra.side import owners

__all__ = [
    "EPSILON",
    "GUARD",
    "LEAST_CURVATURE",
    "LITTLE",
    "NEGLIGIBLE",
    "SLOWING",
    "STATS",
    "Line",
    "enough",
    "in_gram_form",
]

EPSILON = 1e-3
FIRST_BRACKET = 1.0 / 64
MAX_DOUBLINGS = 60
MAX_BISECTIONS = 200
PRECISION = 1e-9
NEGLIGIBLE = 1e-6
"""Adapters below this share of the largest norm are left as they are: the condition of the problem
grows with the spread of the norms."""
GUARD = 3
"""Gaps to the converged optimum stayed below `tol` with it, and not without, where gamma is .1:
20 sets of 2 to 250 adapters, 0 to 99 % of their directions shared, norms spread up to 36 times."""
SLOWING = 2
"""Where many adapters share directions, two steps gain nearly all of f along these, each far more
than the next; then gains fall as slowly as elsewhere. Of 24 sets of 64 adapters without it 8 ended
above `tol`, with it none, after 118 steps in place of 97; 48 others took 245 in place of 244."""
LEAST_CURVATURE = 1e-4
"""Of the largest: where gamma is 0, an adapter that hardly overlaps would make all others wait."""
LITTLE = 0.1
"""Of `tol`: a step that gains less ends a descent of any length."""
STATS = ("steps", "objective_before", "objective_after", "cross_left", "change")


@dataclass(frozen=True)
class Line:
    """f along a line, for P problems at once, in float64.

    `quartics` [P, N, 5] are the coefficients of N squared cross terms (each counted twice: i, j
    and j, i); `smoothing` [P, N] is the squared epsilon under the root, None for the squared
    penalty; `moved` [P, 3] are the coefficients of ||Xhat - X||^2.
    """

    quartics: Tensor
    smoothing: Tensor | None
    moved: Tensor
    gamma: float

    def _terms(self, eta: Tensor) -> tuple[Tensor, Tensor]:
        q, e = self.quartics, eta[:, None]
        value = (((q[..., 4] * e + q[..., 3]) * e + q[..., 2]) * e + q[..., 1]) * e + q[..., 0]
        slope = ((4 * q[..., 4] * e + 3 * q[..., 3]) * e + 2 * q[..., 2]) * e + q[..., 1]
        if self.smoothing is not None:
            root = (value.clamp_min(0) + self.smoothing).sqrt()
            value, slope = root, torch.where(root > 0, slope / (2 * root), 0.0)
        return value, slope

    def moved_at(self, eta: Tensor) -> Tensor:
        return (self.moved[:, 2] * eta + self.moved[:, 1]) * eta + self.moved[:, 0]

    def value(self, eta: Tensor) -> Tensor:
        return 2 * self._terms(eta)[0].sum(-1) + self.gamma * self.moved_at(eta)

    def slope(self, eta: Tensor) -> Tensor:
        moved = 2 * self.moved[:, 2] * eta + self.moved[:, 1]
        return 2 * self._terms(eta)[1].sum(-1) + self.gamma * moved

    def minimum(self) -> Tensor:
        """The first local minimum eta > 0 [P]; 0 where no step lowers f."""
        low = torch.zeros_like(self.moved[:, 0])
        high = torch.full_like(low, FIRST_BRACKET)
        for _ in range(MAX_DOUBLINGS):
            falling = self.slope(high) < 0
            if not falling.any():
                break
            low, high = torch.where(falling, high, low), torch.where(falling, 2 * high, high)
        for _ in range(MAX_BISECTIONS):
            if not (high - low > PRECISION * high).any():
                break
            middle = (low + high) / 2
            falling = self.slope(middle) < 0
            low, high = torch.where(falling, middle, low), torch.where(falling, high, middle)
        eta = (low + high) / 2
        start = self.value(torch.zeros_like(eta))
        for _ in range(MAX_DOUBLINGS):
            too_high = self.value(eta) > start
            if not too_high.any():
                return eta
            eta = torch.where(too_high, eta / 2, eta)
        return torch.where(self.value(eta) > start, 0.0, eta)


def enough(gains: Sequence[Tensor], allowed: Tensor) -> Tensor:
    """Whether what is left to gain is below what is allowed, GUARD times over.

    Of what every step so far has lowered f by; all of one shape, and so is what is returned. What
    is left is what later steps gain, if gains keep falling as they did at worst in the last two;
    or where they fall less and less, as they would in the next: ratios that grow go on growing,
    SLOWING times less.
    The same in csrc/common/descent.h.
    """
    last = gains[-1]
    stops = last <= LITTLE * allowed
    if len(gains) < 3:
        return stops
    now, before = last / gains[-2], gains[-2] / gains[-3]
    ratio = torch.maximum(torch.maximum(now, before), now * now / before / SLOWING)
    return stops | ((ratio < 1) & (GUARD * last * ratio <= allowed * (1 - ratio)))


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> per problem [P], the sums of the rows added in float64."""
    return (x * y).sum(-1).sum(1, dtype=torch.float64)


def _descend(form: _GramForm, steps: int, tol: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Conjugate gradients until every problem has stopped.

    Returns steps taken, f before, f after and ||Xhat - X||^2, each [P] in float64.
    """
    moved = torch.zeros(len(form.c), dtype=torch.float64, device=form.c.device)
    taken, still = torch.zeros_like(moved), torch.zeros_like(moved)
    before = after = form.overlap()
    running = torch.ones_like(moved, dtype=torch.bool)
    gains = list[Tensor]()
    pg_old = d = dg = torch.zeros_like(form.c)
    norm_old = still
    for _ in range(steps):
        gradient = form.gradient()
        p = form.step * gradient
        pg = form.metric(p)
        norm = _inner(gradient, pg)
        change = norm - _inner(gradient, pg_old)
        beta = torch.where(norm_old > 0, change / norm_old, 0.0).clamp_min(0)
        descends = beta * _inner(gradient, dg) < norm
        factor = beta.where(descends, 0.0).to(p.dtype)[:, None, None]
        d = (factor * d).sub_(p)
        dg = (factor * dg).sub_(pg)
        pg_old, norm_old = pg, norm
        line = form.line(d, dg, moved)
        eta = line.minimum().where(running & (norm > 0), 0.0)
        running = eta > 0
        form.advance(eta)
        f, f_new = line.value(still), line.value(eta)
        taken += running
        moved = line.moved_at(eta)
        after = torch.where(running, f_new, after)
        gains.append(f - f_new)
        running = running & ~enough(gains, (tol * f_new).clamp_min(0))
        if not running.any():
            break
    return taken, before, after, moved


def in_gram_form(
    gram: Tensor, ranks: tuple[int, ...], penalty: str, gamma: float, steps: int, tol: float
) -> tuple[Tensor, Tensor]:
    """Descend on C, for P problems that share their ranks.

    gram [P, R, R] -> C [P, R, R] with Xhat = C X, and the columns of `STATS` [P, 5] in float64.
    """
    size = gram.shape[-1]
    unit = gram.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64) / size
    unit = unit.where(unit > 0, 1.0)
    form = _GramForm(gram / unit.to(gram.dtype)[:, None, None], ranks, penalty, gamma)
    cross = form.cross()
    total = form.g.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
    taken, before, after, moved = _descend(form, steps, tol)
    left, change = _ratio(form.cross(), cross), _ratio(moved, total).sqrt()
    return form.c, torch.stack([taken, before * unit, after * unit, left, change], 1)


class _GramForm:
    def __init__(self, g: Tensor, ranks: tuple[int, ...], penalty: str, gamma: float) -> None:
        adapters, device = len(ranks), g.device
        self.g, self.gamma, self.squared = g, gamma, penalty == "squared"
        self.owner = owners(ranks, device)
        self.member = torch.nn.functional.one_hot(self.owner, adapters).to(g.dtype)  # [R, T]
        self.pairs = torch.triu_indices(adapters, adapters, 1, device=device)
        norms = (g.diagonal(dim1=1, dim2=2) @ self.member).double().clamp_min(0).sqrt()
        inverse = torch.where(_counts(norms), 1 / norms, 0.0)
        self.weight = inverse[:, self.pairs[0]] * inverse[:, self.pairs[1]]  # [P, pairs]
        self.smoothing = torch.where(self.weight > 0, (EPSILON / self.weight).square(), 0.0)
        self.eye = torch.eye(g.shape[-1], dtype=g.dtype, device=device)
        self.c, self.h = self.eye.repeat(len(g), 1, 1), g
        self.d = self.e = self.f = torch.zeros_like(g)
        self.v = self._couplings()
        self.step = self._steps()

    def _pair_sums(self, x: Tensor, y: Tensor) -> Tensor:
        """<x_ij, y_ij> of every pair of adapters i < j, [P, pairs] in float64."""
        sums = self.member.T @ (x * y) @ self.member
        return sums[:, self.pairs[0], self.pairs[1]].double()

    def _per_entry(self, values: Tensor) -> Tensor:
        """One value a pair [P, pairs], spread over the entries of its blocks [P, R, R]."""
        adapters = self.member.shape[1]
        table = values.new_zeros(len(values), adapters, adapters, dtype=self.g.dtype)
        table[:, self.pairs[0], self.pairs[1]] = values.to(table.dtype)
        return (table + table.mT)[:, self.owner][:, :, self.owner]

    def _couplings(self) -> Tensor:
        """V_ij of every entry [P, R, R]."""
        if self.squared:
            return self._per_entry(4 * self.weight)
        root = (self._pair_sums(self.h, self.h) + self.smoothing).sqrt()
        return self._per_entry(torch.where(self.weight > 0, 2 / root, 0.0))

    def _steps(self) -> Tensor:
        """What preconditions every row [P, R, 1]: 0 of adapters that overlap with none."""
        pull = (self.v * self.h * self.h).sum(-1) @ self.member
        size = self.g.diagonal(dim1=1, dim2=2) @ self.member
        curvature = torch.where(pull > 0, pull / size, 0.0)
        least = LEAST_CURVATURE * curvature.amax(1, keepdim=True)
        step = torch.where(curvature > 0, 1 / (2 * self.gamma + curvature.maximum(least)), 0.0)
        return step[:, self.owner, None]

    def cross(self) -> Tensor:
        """Half the cross-adapter energy of H [P]."""
        return self._pair_sums(self.h, self.h).sum(1)

    def overlap(self) -> Tensor:
        squares = self._pair_sums(self.h, self.h)
        if self.squared:
            return 2 * (self.weight * squares).sum(1)
        return 2 * (squares + self.smoothing).sqrt().where(self.weight > 0, 0.0).sum(1)

    def gradient(self) -> Tensor:
        return (self.v * self.h) @ self.c + 2 * self.gamma * (self.c - self.eye)

    def metric(self, p: Tensor) -> Tensor:
        """P -> P G, so that <P, Q>_G = <P, metric(Q)>."""
        return p @ self.g

    def line(self, d: Tensor, dg: Tensor, moved: Tensor) -> Line:
        """f along d; `moved` [P] is ||Xhat - X||^2 so far."""
        half = dg @ self.c.mT
        self.d, self.e, self.f = d, half + half.mT, dg @ d.mT
        quartics = torch.stack(
            [
                self._pair_sums(self.h, self.h),
                2 * self._pair_sums(self.h, self.e),
                self._pair_sums(self.e, self.e) + 2 * self._pair_sums(self.h, self.f),
                2 * self._pair_sums(self.e, self.f),
                self._pair_sums(self.f, self.f),
            ],
            -1,
        )
        quadratic = torch.stack([moved, 2 * _inner(dg, self.c - self.eye), _inner(dg, d)], -1)
        if self.squared:
            quartics = (self.weight[..., None] * quartics).sum(1, keepdim=True)
            return Line(quartics, None, quadratic, self.gamma)
        quartics = quartics * (self.weight > 0)[..., None]
        return Line(quartics, self.smoothing, quadratic, self.gamma)

    def advance(self, eta: Tensor) -> None:
        """Move by eta [P] along the direction of the last `line`."""
        s = eta.to(self.g.dtype)[:, None, None]
        self.c = self.c + s * self.d
        self.h = self.h + s * self.e + s * s * self.f
        if not self.squared:
            self.v = self._couplings()


def _counts(norms: Tensor) -> Tensor:
    """Which adapters take part [..., T], given their norms."""
    return norms > NEGLIGIBLE * norms.amax(-1, keepdim=True)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.where(whole > 0, 1.0), 0.0)
