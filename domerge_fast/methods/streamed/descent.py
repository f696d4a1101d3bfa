"""DO-Merging of any number of adapters, read one batch after another: of a module's side nothing
larger than [d, d] is kept, and of an adapter a few numbers.

With n_i = ||X_i||_F, Y_i = Xhat_i / sqrt(n_i) and S = sum_j Y_j^T Y_j, f is the objective of
backends/factor_descent.py. Where it is least in one block, the others being as they are,

    Xhat_i = γ n_i X_i (γ n_i + 2 (S - Y_i^T Y_i))^-1

which takes the eigenvectors of S, one for all adapters (own.py). All blocks at once, from the S of
the pass before, give Φ = sum Y_i^T Y_i; then S moves by a share θ of Φ - S. A pass:

    f    at these Xhat, exactly: ||Φ||^2 - sum ||Y_i Y_i^T||^2 + γ ||Xhat - X||^2. Where it has
         risen, S goes back to what it was, and on by half the θ
    θ    by which Φ - S would have been least in the last step, were it linear in S
    gap  (g^(1/2) + o^(1/2))^2: what the blocks would gain by one step of Newton. Of it are
         g    4 tr(Φ (Φ - S) (γ n + 2 S)^-1 (Φ - S)), n the mean of the n_i, because S moves
         o    sum_i tr(E (γ n_i + 2 S) E^T), E the change of Y_i when it was last put in its own
              equation, because Y_i is not yet what follows from it

It starts from the S of X, times what the α_i of `mean_field` make of its trace, and ends when g
is below `tol` of f: more passes would leave o as it is. Products are in float32, sums over adapters
in float64. O(R d^2) a pass, and the eigenvectors of S.

Going on, with more adapters than there were (`Kept`): those before stay where they are, and f is
descended on in the Xhat_i of the new ones alone, whose passes read no others. What the blocks
before would gain is no more than (g^(1/2) + h^(1/2))^2, with g what they would have gained before,
and h the gap's formula of their Φ and the new ones' Φ in place of Φ - S: it is a square of a norm.
Where gap, of both, is above `tol` of f then, `open` lets all descend, from the S that there is.

Source: derived here; docs/algorithm.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...algebra.powers import times
from ...algebra.side import Side
from ...backends.descent import NEGLIGIBLE
from ...backends.factor_descent import mean_field
from .own import inner, minimised
from .sums import Kept, Sums

__all__ = ["Descent", "Rule", "blocks", "kept_bytes", "state_bytes"]

FIRST, LEAST, MOST = 0.5, 0.1, 0.7
"""θ of the first pass, and its limits."""
FEW = 24
"""Equal adapters. With fewer, what is left was up to 15 times gap where 90 % of them is shared: 12
of norms 6 times apart. With 50, norms up to 36 times apart, it was below gap on all sets."""
ROUNDING = 1e-6
"""Of ||S||: a pass that moves it by less moves it by what float32 products leave to chance."""


def state_bytes(d: int) -> int:
    """What a descent keeps of one side [d, d], with what finding eigenvectors takes."""
    return 80 * d**2


def kept_bytes(m: int, n: int) -> int:
    """What is kept of a module while adapters are read."""
    return state_bytes(m) + state_bytes(n) + 16 * m * n


@dataclass(frozen=True)
class Rule:
    """Options of `do`. share: of `tol`, at which a descent stops, to leave room for what adapters
    that follow make of its gap."""

    gamma: float
    steps: int
    tol: float
    share: float = 1.0


def blocks(side: Side, power: int) -> Tensor:
    """The X_i over 2^power, [t, r, d] in float32, rows of zeros below those of lower rank."""
    rows = times(side.stack(torch.float64), -power).float()
    if len({*side.ranks}) == 1:
        return rows.view(len(side.ranks), -1, side.d)
    sizes = torch.tensor(side.ranks, device=side.device)
    x = rows.new_zeros(len(side.ranks), max(side.ranks), side.d)
    x[torch.arange(x.shape[1], device=side.device) < sizes[:, None]] = rows
    return x


@dataclass(eq=False)
class Descent:
    """On one side of a module. First `measure` all adapters, then `settle`; then, as long as it is
    not `done`, a pass: `step` on all of them, and `settle`. `moved` is Xhat from then on.

    rule: None for a side that stays as it is. before: what a descent on the first adapters has
    left, None where there are none; all else is of those that follow then, until it is `opened`.
    norms: the n_i in the adapters' own size; power: log2 of the unit that Xhat is given in. gap: as
    estimated, of the objective `after`, in that unit.
    """

    d: int
    rule: Rule | None
    before: Kept | None = None
    norms: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    power: int = 0
    passes: int = 0
    done: bool = False
    opened: bool = False
    gap: float = 0.0

    def __post_init__(self) -> None:
        self._measured: list[Tensor] = []
        self._sums: Sums | None = None
        self._given: Sums | None = None
        self._reached: Sums | None = None
        self._fixed: Kept | None = None
        self._s: Tensor | None = None
        self._best: tuple[float, Tensor] | None = None
        self._theta = FIRST
        self._alpha = 1.0
        if self.before:
            self.power, self.norms = self.before.power, self.before.norms

    @property
    def after(self) -> float:
        """f, in the unit."""
        assert self._reached
        gamma = self.rule.gamma if self.rule else 0.0
        return self._reached.overlap + gamma * self._reached.moved

    @property
    def is_within(self) -> bool:
        """Whether what is left is below `tol`."""
        return self.rule is None or self.gap <= self.rule.tol * self.after

    @property
    def few(self) -> bool:
        """Whether single adapters hold so large a share that gap may be too small."""
        n = times(self.norms, -self.power)
        return self.gap > 0 and float(n.sum() ** 2) < FEW * float(n.square().sum())

    @property
    def kept(self) -> Kept:
        """For `before`, when it is done."""
        assert self._given
        assert self._reached
        return Kept(self.norms, self.power, self._given, self._reached, self.gap, self.passes)

    def leave(self) -> None:
        """As it was before, where no adapters follow."""
        assert self.before
        self._given, self._reached = self.before.given, self.before.reached
        self.gap, self.passes, self.done = self.before.gap, self.before.passes, True

    # The first pass

    def measure(self, side: Side) -> Tensor:
        """Count adapters in, in their order. Their norms [t]."""
        parts = side.stack(torch.float64).split(list(side.ranks))
        norms = torch.stack([torch.linalg.vector_norm(x) for x in parts]).cpu()
        if self._sums is None:
            self._sums = Sums.fresh(self.d, side.device)
        if not self.power and bool((norms > 0).any() & norms.isfinite().all()):
            self.power = _exponent(norms)
        self._measured.append(norms)
        if self.rule:
            n = times(norms, -self.power).where(norms > 0, 1.0).rsqrt().float()
            self._sums.add(blocks(side, self.power) * n.to(side.device)[:, None, None])
        return norms

    def _begin(self, sums: Sums) -> None:
        """After it."""
        count = len(self.norms)
        self.norms, self._measured = torch.cat([self.norms, *self._measured]), []
        power, self.power = self.power, _exponent(self.norms)
        sums = given = sums.times(power - self.power)
        n = times(self.norms, -self.power)
        self._live = live = n.where(n > NEGLIGIBLE * n.amax(), 0.0)
        if self.before:
            self._fixed = self.before.times(self.before.power - self.power)
            given = self._fixed.given.plus(sums)
            first = n[:count]
            if not torch.equal(live[:count], first.where(first > NEGLIGIBLE * first.amax(), 0.0)):
                self._fixed, self.opened = None, True
        self._given = self._reached = given
        overlap = given.overlap
        if self.rule is None or not self.rule.steps or not overlap > 0 or int((live > 0).sum()) < 2:
            self.done = True
            if self._fixed:
                self._reached = self._fixed.reached.plus(sums)
            return
        weights = float(live.sum() ** 2 - live.square().sum())
        alpha = mean_field(live, self.rule.gamma, overlap / weights)
        if self._fixed:
            alpha, live = alpha[count:], live[count:]
        total = float(live.sum())
        share = float((alpha.square() * live).sum()) / total if total > 0 else 1.0
        self._alpha = share**0.5
        if self._fixed:
            self._decompose(self._fixed.reached.whole + share * sums.whole)
        else:
            self._decompose(share * given.whole)

    def open(self) -> None:
        """Let all adapters descend that were before, too."""
        self._fixed, self.opened = None, True
        if self._best and self._reached:
            self._best, self._theta, self.passes, self.done = None, FIRST, 0, False
            self._decompose(self._reached.whole)

    # Every other pass

    def _decompose(self, s: Tensor) -> None:
        values, vectors = torch.linalg.eigh(s)
        self._s, self._values = s, values.clamp_min(0)
        self._vectors = vectors.float()
        self._sums = Sums.fresh(self.d, s.device)

    def step(self, side: Side, at: Sequence[int]) -> None:
        """One pass's part of some adapters. at: their positions among those that were measured."""
        x, x_hat, y, left = self._minimised(blocks(side, self.power), at)
        change = x_hat - x
        squares, along = inner(x, x), inner(change, x)
        assert self._sums
        self._sums.add(y)
        self._sums.left += left
        self._sums.moved += float(inner(change, change).sum())
        self._sums.along += float(torch.where(squares > 0, along.square() / squares, 0.0).sum())

    def moved(self, side: Side, at: Sequence[int]) -> Tensor:
        """Xhat [t, r, d] of adapters, rows of zeros below those of lower rank, in the unit."""
        x = blocks(side, self.power)
        return x if self._best is None else self._minimised(x, at)[1] @ self._vectors.T

    def _minimised(self, x: Tensor, at: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, float]:
        """X in the eigenvectors of S, and what `minimised` makes of it."""
        assert self.rule
        n = self._live[list(at)].to(x.device, torch.float32)[:, None, None]
        x = x @ self._vectors
        return x, *minimised(x, n, self._values.float(), self.rule.gamma, self._alpha)

    def settle(self) -> None:
        """After the last adapter of a pass."""
        sums, s = self._sums, self._s
        assert sums
        if s is None or self.rule is None:
            self._begin(sums)
            return
        self.passes += 1
        new = self._vectors.double() @ sums.whole @ self._vectors.double().T
        sums.whole = new
        if self._fixed:
            sums = self._fixed.reached.plus(sums)
        objective, residual = sums.overlap + self.rule.gamma * sums.moved, sums.whole - s
        if self._best and not objective <= self._best[0]:
            assert self._reached
            self._theta /= 2
            s = self._best[1]
            residual = self._reached.whole - s
            moves = self._theta * float(residual.norm())
        else:
            if self._best and self._reached:
                self._theta = _secant(self._theta, self._reached.whole - self._best[1], residual)
            self._best, self._reached = (objective, s), sums
            own = self._left(new, residual)
            self.gap = _both(own, sums.left)
            if self._fixed:
                self.gap += _both(self._fixed.gap, self._left(self._fixed.reached.whole, new))
            enough = self.rule.share * self.rule.tol * objective
            moves = math.inf if own > enough else 0.0
        moves = min(moves, float(residual.norm()))
        self.done = self.passes >= self.rule.steps or moves <= ROUNDING * float(s.norm())
        if not self.done or s is not self._s:
            self._decompose(s if self.done else s + self._theta * residual)

    def _left(self, whole: Tensor, residual: Tensor) -> float:
        """What blocks of this Φ would gain where their S is off by the residual."""
        vectors = self._vectors.double()
        turned = residual @ vectors
        assert self.rule
        mean = float(self._live.sum() / (self._live > 0).sum())
        given = (self.rule.gamma * mean + 2 * self._values).clamp_min(math.ulp(0.0))
        return max(0.0, 4 * float(((whole @ turned) * (turned / given)).sum()))

    @property
    def row(self) -> list[float]:
        """What `SideReports` has of it, in the adapters' own size."""
        assert self._given
        assert self._reached
        first, last = self._given.overlap, self._reached
        total = float(times(self.norms, -self.power).square().sum())
        left = last.overlap / first if first > 0 else 0.0
        moved = (last.moved / total) ** 0.5 if total > 0 else 0.0
        shrinking = min(1.0, last.along / last.moved) if last.moved else 0.0
        objectives = [math.ldexp(x, 2 * self.power) for x in (first, self.after)]
        return [self.passes, *objectives, left, moved, shrinking]


def _exponent(norms: Tensor) -> int:
    """log2 of the largest, nearly."""
    return math.frexp(float(norms.amax()))[1]


def _both(first: float, second: float) -> float:
    """Of two gains, each a square of a norm: that of what is off in both ways."""
    return (first**0.5 + second**0.5) ** 2


def _secant(theta: float, before: Tensor, after: Tensor) -> float:
    """θ that would have made `before`, which a step along it has made `after`, least."""
    change = before - after
    total = float(change.square().sum())
    if total > 0:
        theta *= float((before * change).sum()) / total
    return min(MOST, max(LEAST, theta))
