"""The descent on the factors themselves in plain PyTorch, for the squared penalty: O(R d^2) a step.

With n_i = ||X_i||_F, Y_i = Xhat_i / sqrt(n_i), S = sum_j Y_j^T Y_j [d, d] and K_i = Y_i Y_i^T:

    f = ||S||^2 - sum_i ||K_i||^2 + gamma ||Xhat - X||^2
    df/dXhat_i = 4 / sqrt(n_i) (Y_i S - K_i Y_i) + 2 gamma (Xhat_i - X_i)

The rule, the same in csrc/cpu/factor_descent.cpp: conjugate gradients as in descent.py, but

- from the best of all alpha_i X_i, if that is better than X: the alpha_i are those of X_i with
  directions at random that overlap as much in all (`mean_field`);
- preconditioned by what needs no Gram: the rows of adapter i by 1 / (2 gamma + 4 tr(S) / (n_i d)),
  one over the mean curvature along directions at random.

Along Z_i = D_i / sqrt(n_i), S(eta) = S + eta E + eta^2 F with F = Z^T Z. A step costs 4 R d^2 flops
where the line's terms are exact: Y S, and the Grams of Z and of Y + eta Z for some eta. Where `tol`
allows and d is large, only f and its slope at 0 are: the other terms, <S, F>, <E, E>, <E, F> and
<F, F>, are estimated with PROBES vectors v of signs, <A, B> as the mean of <A v, B v>. A step then
is Y S and the Gram where the estimate is least, which tells what f is there: 3 R d^2 flops. Where f
fell otherwise than estimated, F is formed, too, and the line is exact. Of the last step the Gram is
left out where the estimate is sure: 2 R d^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .descent import LITTLE, NEGLIGIBLE, STATS, Line, enough
from .descent_rates import ESTIMATED_COLUMNS, PROBES

__all__ = [
    "FACTOR_STATS",
    "HALF_SHARE",
    "HALF_TOL",
    "LEAST_SHARE",
    "in_factor_form",
    "mean_field",
    "takes_half",
]

FACTOR_STATS = (*STATS, "scaled")
"""cross_left is here of sum_{i != j} ||Xhat_i Xhat_j^T||^2 / (n_i n_j); scaled is the share of
||Xhat - X||^2 that is numbers times the X_i: how much was shrinking rather than turning."""

LEAST_SHARE = 1e-3
"""Of the sum over all pairs: where those of two adapters hold less, float32 lost their digits."""
HALF_TOL = 3e-4
"""Of the objective, what the roundings of factors to bfloat16 are well below in its products."""
HALF_SHARE = 0.1
"""As LEAST_SHARE, for them."""
HALF_COLUMNS = 512
"""Sums shorter than that do not average the roundings out, and take no time."""
SQUARE_COLUMNS = 512
"""Of a symmetric product, multiplied at a time."""
PIECE = 1 << 20
"""Numbers in a temporary product: what the allocator still keeps instead of returning it."""
HALVINGS = 60
"""Of the error of the start's factors."""
ALIKE = 0.01
"""Where they differ by less, their mean is every adapter's: S is then that of X times a number."""
ESTIMATED_TOL = 1e-4
"""Below it gains come near the rounding of Grams, and lines are exact."""
DEVIATIONS = 3
"""Standard errors of an estimate, which what it is taken for exceeds."""
DISAGREEMENT = 0.2
"""Between what a step gains and its estimate, as a share of this: a step of which the curvature was
20 % wrong gains 4 % less than the best."""


@dataclass(frozen=True)
class Products:
    """How a descent makes its large products: Y S of [R, d] and [d, d], and Grams [d, d].

    operand: what is multiplied of a matrix. noise: of f, what roundings leave to chance.
    least_share: what the pairs of two adapters have to hold of the sum over all, for roundings to
    be small beside them.
    """

    dtype: torch.dtype
    operand: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor], Tensor]
    noise: float
    least_share: float


DOUBLE = Products(torch.float64, Tensor.double, torch.mm, torch.finfo(torch.float64).eps, 0.0)
SINGLE = Products(
    torch.float32, Tensor.float, torch.mm, torch.finfo(torch.float32).eps, LEAST_SHARE
)
HALF = Products(
    torch.float32,
    Tensor.bfloat16,
    partial(torch.mm, out_dtype=torch.float32),
    2.0**-20,
    HALF_SHARE,
)
"""Of numbers rounded to bfloat16, with float32 sums."""


def takes_half(rank: int, d: int, tol: float) -> bool:
    """Whether products may be of numbers rounded to bfloat16, with float32 sums."""
    return tol >= HALF_TOL and min(rank, d) >= HALF_COLUMNS


def multiplies_half(device: torch.device) -> bool:
    """Whether torch has such products there, on tensor cores: NVIDIA's GPUs of compute capability
    8.0 and later, from torch 2.8."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    able = torch.cuda.get_device_capability(device) >= (8, 0)
    return able and "dtype" in torch.ops.aten.mm.overloads()


def in_factor_form(
    x: Tensor, ranks: tuple[int, ...], gamma: float, steps: int, tol: float
) -> tuple[Tensor, Tensor]:
    """Descend on Xhat itself. x [R, d] -> Xhat [R, d], and `FACTOR_STATS` [6] in float64.

    Products are in the dtype of x, of float32 where `takes_half` and `multiplies_half` in bfloat16;
    what is summed from them for the line search is in float64. For float32 that leaves 1e-7 of the
    sum over all pairs to chance, and f cannot rise by more, unless the estimate that a last step is
    taken by is wrong by DEVIATIONS standard errors. It is little beside `tol`, unless the pairs of
    two adapters are a small rest of that sum (one adapter dominates, or next to nothing is left):
    then all is done again, from bfloat16 in float32, and from that in float64.
    """
    ways = [DOUBLE] if x.dtype == torch.float64 else [SINGLE, DOUBLE]
    half = takes_half(len(x), x.shape[1], tol) and multiplies_half(x.device)
    if half and x.dtype == torch.float32:
        ways = [HALF, *ways]
    for way in ways:
        x_hat, stats, share = _found(x.to(way.dtype), ranks, gamma, steps, tol, way)
        if share >= way.least_share:
            break
    return x_hat, stats


def _found(
    x: Tensor, ranks: tuple[int, ...], gamma: float, steps: int, tol: float, way: Products
) -> tuple[Tensor, Tensor, float]:
    """Xhat, the statistics, and the least share of the sum over all pairs that was of two."""
    size = torch.linalg.vector_norm(x, dtype=torch.float64) / len(x) ** 0.5
    size = size.where(size > 0, 1.0)
    form = _Factors(x / size.to(x.dtype), ranks, gamma, way)
    stats = x.new_zeros(len(FACTOR_STATS), dtype=torch.float64)
    if not form.interfere:
        return x, stats, 1.0
    before = overlap = form.overlap()
    taken = 0
    if steps and overlap > 0:
        overlap = form.start(overlap)
        form.precondition()
        taken, overlap = _descend(form, overlap, steps, tol)
    unit, total = float(size) ** 2, float(_inner(form.x, form.x).sum())
    after = overlap + gamma * form.moved
    found = [taken, before * unit, after * unit, overlap / before if before > 0 else 0.0]
    found += [(form.moved / total) ** 0.5 if total > 0 else 0.0, form.scaled()]
    stats.copy_(torch.tensor(found, dtype=torch.float64))
    return form.x_hat[form.real] * size.to(x.dtype), stats, form.least_share


def _descend(form: _Factors, overlap: float, steps: int, tol: float) -> tuple[int, float]:
    """Steps taken, and the penalty's part of f."""
    old, gains = 0.0, list[Tensor]()
    g_old = form.direction
    estimates = tol >= ESTIMATED_TOL and form.x.shape[2] >= ESTIMATED_COLUMNS
    while len(gains) < steps:
        g = form.gradient()
        preconditioned = form.step * g
        norm = _dot(g, preconditioned)
        before = overlap + form.gamma * form.moved
        if not norm > form.way.noise * before:
            break  # of a gradient that is rounding alone, the line is, too
        beta = max(0.0, (norm - _dot(preconditioned, g_old)) / old) if old > 0 else 0.0
        along = _dot(g, form.direction)
        if beta * along >= norm:
            beta, along = 0.0, 0.0
        form.direction = (beta * form.direction).sub_(preconditioned)
        old, g_old = norm, g
        form.turn(overlap)
        guess = form.guess(overlap, beta * along - norm) if estimates else None
        if guess is not None and guess.is_sure(guess.gain):
            last = [*gains, torch.tensor(guess.gain, dtype=torch.float64)]
            allowed = tol * (before - guess.gain)
            ends = len(last) == steps or bool(enough(last, torch.tensor(allowed)))
            if ends and guess.is_sure(LITTLE * allowed):
                form.move(guess.eta)
                return len(last), before - guess.gain - form.gamma * form.moved
        else:
            guess = None
        gain, overlap = form.take(overlap, guess)
        if not gain >= 0:
            break
        gains.append(torch.tensor(gain, dtype=torch.float64))
        objective = overlap + form.gamma * form.moved
        if enough(gains, torch.tensor(max(0.0, tol * objective))):
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

    S and the K_i are those of Xhat, but after a last step that was taken by its estimate.
    """

    def __init__(self, x: Tensor, ranks: tuple[int, ...], gamma: float, way: Products) -> None:
        sizes = torch.tensor(ranks, device=x.device)
        self.real = torch.arange(max(ranks), device=x.device) < sizes[:, None]  # [T, r]
        self.x = x.new_zeros(*self.real.shape, x.shape[1])
        self.x[self.real] = x
        norms = _inner(self.x, self.x).sqrt()
        self.norms = torch.where(norms > NEGLIGIBLE * norms.amax(), norms, 0.0)  # n_i, or 0
        root = torch.where(self.norms > 0, self.norms.rsqrt(), 0.0).to(x.dtype)
        self.root, self.gamma, self.way = root[:, None, None], gamma, way
        self.interfere = int((self.norms > 0).sum()) > 1
        self.least_share, self.moved = 1.0, 0.0
        self.alpha = torch.ones_like(self.norms)
        self.x_hat = self.x.clone()
        self.direction = torch.zeros_like(self.x)
        self.h = _squares(self.root * self.x_hat, way)

    def overlap(self) -> float:
        """||S||^2 - sum_i ||K_i||^2."""
        overlap = 2 * _cross(self.h, self.h)
        self._note_share(overlap)
        return overlap

    def _note_share(self, overlap: float) -> None:
        whole = overlap + _dot(self.h.own, self.h.own)
        if whole > 0:
            self.least_share = min(self.least_share, overlap / whole)

    def start(self, overlap: float) -> float:
        """To alpha_i X_i where that is better than X. Returns the overlap there."""
        if self.gamma == 0:
            return overlap
        weights = self.norms.sum() ** 2 - self.norms.square().sum()
        alpha = mean_field(self.norms, self.gamma, overlap / float(weights))
        x_hat = alpha.to(self.x.dtype)[:, None, None] * self.x
        h = _squares(self.root * x_hat, self.way)
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
        pull = self.way.multiply(*map(self.way.operand, (y.flatten(0, 1), self.h.whole))).view_as(y)
        pull.baddbmm_(self.h.own, y, alpha=-1).mul_(4 * self.root)
        return pull.add_(self.x_hat - self.x, alpha=2 * self.gamma)

    def turn(self, overlap: float) -> None:
        """What is exact of a new direction whoever finds the step: ||Xhat - X||^2."""
        along = 2 * _dot(self.direction, self.x_hat - self.x)
        self.change = [self.moved, along, _dot(self.direction, self.direction)]
        self._note_share(overlap)

    def guess(self, overlap: float, slope: float) -> Guess | None:
        """The best step by probes; None where no step lowers the estimate."""
        each_y, each_z = self.root * self.x_hat, self.root * self.direction
        mixed = each_y @ each_z.mT
        e, f = mixed + mixed.mT, each_z @ each_z.mT  # of every adapter
        y, z = each_y.flatten(0, 1), each_z.flatten(0, 1)
        v = _signs(y.shape[1], y)
        p, q = y @ v, z @ v
        s_v, e_v, f_v = y.T @ p, y.T @ q + z.T @ p, z.T @ q
        ee, sf, ef, ff = (
            (a * b).sum(0, dtype=torch.float64)
            for a, b in ((e_v, e_v), (s_v, f_v), (e_v, f_v), (f_v, f_v))
        )
        quartic = [
            overlap / 2,
            (slope - self.gamma * self.change[1]) / 2,
            float((ee / 2 + sf).mean()) - _dot(e, e) / 2 - _dot(self.h.own, f),
            float(ef.mean()) - _dot(e, f),
            (float(ff.mean()) - _dot(f, f)) / 2,
        ]
        line = self._line(quartic)
        eta = line.minimum()
        gain = float(line.value(torch.zeros_like(eta)) - line.value(eta))
        if not gain > 0:
            return None
        values = ((ff * eta + 2 * ef) * eta + ee + 2 * sf) * eta * eta
        return Guess(float(eta), gain, float(values.std()) / PROBES**0.5)

    def _line(self, quartic: list[float]) -> Line:
        """f along the direction, of half the penalty's coefficients."""
        given = [torch.tensor(c, dtype=torch.float64) for c in (quartic, self.change)]
        return Line(given[0][None, None], None, given[1][None], self.gamma)

    def take(self, overlap: float, guess: Guess | None) -> tuple[float, float]:
        """Takes the step of a guess, where that gains what it says, or else the best. Returns what
        it gains and the penalty's part of f; where no step lowers f, -1 and what it was."""
        trial = guess.eta if guess else 1.0
        h = self.h
        y = self.root * self.x_hat
        reached = _squares(y.add_(self.root * self.direction, alpha=trial), self.way)
        if guess:
            rise = _difference(reached, h)
            change = trial * (self.change[1] + trial * self.change[2])
            gain = -rise - self.gamma * change
            if abs(gain - guess.gain) <= DISAGREEMENT * guess.gain:
                self.h = reached
                self.move(trial)
                return gain, overlap + rise
        f = _squares(self.root * self.direction, self.way)
        e = reached
        for own, first, second in zip(e, h, f):
            own.sub_(first).sub_(second, alpha=trial * trial).div_(trial)
        quartic = [_cross(h, h), 2 * _cross(h, e), _cross(e, e) + 2 * _cross(h, f)]
        line = self._line([*quartic, 2 * _cross(e, f), _cross(f, f)])
        best = line.minimum()
        eta = float(best)
        if not eta > 0:
            return -1.0, overlap
        for own, first, second in zip(h, e, f):
            own.add_(first, alpha=eta).add_(second, alpha=eta * eta)
        self.move(eta)
        objective = float(line.value(best))
        gain = float(line.value(torch.zeros_like(best))) - objective
        return gain, objective - self.gamma * self.moved

    def move(self, eta: float) -> None:
        self.x_hat.add_(self.direction, alpha=eta)
        self.moved += eta * (self.change[1] + eta * self.change[2])

    def scaled(self) -> float:
        """The share of ||Xhat - X||^2 that is numbers times the X_i."""
        squares, mixed = _inner(self.x, self.x), _inner(self.x_hat, self.x)
        along = torch.where(squares > 0, (mixed - squares).square() / squares, 0.0).sum()
        return min(1.0, float(along) / self.moved) if self.moved > 0 else 0.0


class Guess(NamedTuple):
    """A step, what it gains, and the standard error of that."""

    eta: float
    gain: float
    error: float

    def is_sure(self, of: float) -> bool:
        return DEVIATIONS * self.error <= of


class _Sums(NamedTuple):
    """sum_i Y_i^T Z_i [d, d] and every Y_i Z_i^T [T, r, r]."""

    whole: Tensor
    own: Tensor


def _squares(y: Tensor, way: Products) -> _Sums:
    """The sums for Z = Y [T, r, d], both of what is multiplied of Y: of the whole, what lies below
    the diagonal is mirrored."""
    rows = way.operand(y.flatten(0, 1))
    y = rows.to(y.dtype).view_as(y)
    whole = y.new_empty(y.shape[2], y.shape[2])
    for i in range(0, len(whole), SQUARE_COLUMNS):
        j = i + SQUARE_COLUMNS
        whole[i:, i:j] = way.multiply(rows[:, i:].T, rows[:, i:j])
        whole[i:j, j:] = whole[j:, i:j].T
    return _Sums(whole, y @ y.mT)


def _cross(first: _Sums, second: _Sums) -> float:
    """Half of <S, S'> - sum_i <K_i, K'_i>."""
    return (_dot(first.whole, second.whole) - _dot(first.own, second.own)) / 2


def _difference(first: _Sums, second: _Sums) -> float:
    """||S||^2 - sum_i ||K_i||^2 of one less that of the other, of which it may be a small part."""
    whole = _dot(first.whole - second.whole, first.whole + second.whole)
    return whole - _dot(first.own - second.own, first.own + second.own)


def _signs(d: int, like: Tensor) -> Tensor:
    """[d, PROBES]: the lower bits of columns' numbers, mixed as MurmurHash3 ends."""
    bits = torch.arange(1, d + 1, device=like.device)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ bits >> shift) * factor & 0xFFFFFFFF
    each = torch.arange(PROBES, device=like.device)
    return (1 - 2 * (bits[:, None] >> each & 1)).to(like.dtype)


def _dot(x: Tensor, y: Tensor) -> float:
    return float(_inner(x.flatten(0, -2)[None], y.flatten(0, -2)[None]).sum())


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> of every matrix [P, rows, columns], the sums of the rows added in float64: [P].

    In pieces: a product as large as x would cost more in memory than in arithmetic.
    """
    rows = max(1, PIECE // x.shape[-1])
    pieces = [(a * b).sum(-1) for a, b in zip(x.split(rows, 1), y.split(rows, 1))]
    return torch.cat(pieces, 1).sum(1, dtype=torch.float64)
