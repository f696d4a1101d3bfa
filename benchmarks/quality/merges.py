"""The merges that are compared: every method and option, and rules that choose the scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import domerge_fast as dm

Deltas = Mapping[str, Tensor]
TO_THE_END = 1e-6
"""The tol of every descent whose candidate does not say another: options are compared at their
optimum, and where to stop is a candidate of its own."""


@dataclass(frozen=True)
class Adapter:
    """A trained adapter: what tables call it, the task it is scored on, and its PEFT folder."""

    label: str
    task: str
    path: Path


@dataclass(frozen=True)
class Candidate:
    """A method with its options. mean: the weights are divided by their number. balanced: every
    adapter is first refactored as B = U sqrt(S), A = sqrt(S) V^T."""

    name: str
    method: str = "do"
    options: Mapping[str, Any] = field(default_factory=dict)
    mean: bool = False
    balanced: bool = False

    def merge(self, adapters: Sequence[Path], form: str = "adapter") -> dm.Merged:
        weights = [1 / len(adapters)] * len(adapters) if self.mean else None
        given = [balanced(path) for path in adapters] if self.balanced else adapters
        stop = {"tol": TO_THE_END} if self.method == "do" else {}
        options = {**stop, **self.options}
        return dm.merge(given, self.method, weights=weights, dtype="float32", form=form, **options)

    def deltas(self, adapters: Sequence[Path]) -> Deltas:
        """ΔW of every module in float32, at scale 1."""
        merged = self.merge(adapters, "deltas")
        return {name: merged.delta(name) for name in merged.names}


def balanced(path: Path) -> dm.Adapter:
    """The adapter with the factors that the SVD of each of its updates gives."""
    adapter = dm.load(path)
    factors = {}
    for name, module in adapter.modules.items():
        a, b = adapter.factors(name)
        basis_b, core_b = torch.linalg.qr(module.scaling * b.double())
        basis_a, core_a = torch.linalg.qr(a.double().T)
        u, s, vh = torch.linalg.svd(core_b @ core_a.T)
        new_a = s.sqrt()[:, None] * vh @ basis_a.T
        new_b = basis_b @ u * s.sqrt()
        factors[name] = (new_a.float().contiguous(), new_b.float().contiguous())
    return dm.from_tensors(factors, name=adapter.name)


PLAIN = Candidate("mean", "linear", mean=True)
DO = Candidate("do")

CANDIDATES = (
    PLAIN,
    Candidate("mean, rank 8 (svd)", "svd", mean=True),
    Candidate("orthogonalize", options={"decouple": False}),
    Candidate("decouple", options={"orthogonalize": False}),
    DO,
    Candidate("do, rank 8", options={"rank": 8}),
    Candidate("do, frobenius", options={"penalty": "frobenius"}),
    Candidate("do, gamma 0.1", options={"gamma": 0.1}),
    Candidate("do, gamma 10", options={"gamma": 10.0}),
    Candidate("do, A only", options={"sides": "A"}),
    Candidate("do, B only", options={"sides": "B"}),
    Candidate("do, renormalize", options={"renormalize": True}),
    Candidate("decouple, renormalize", options={"orthogonalize": False, "renormalize": True}),
    Candidate("do, balanced factors", balanced=True),
    Candidate("do, 1 step", options={"steps": 1}),
    Candidate("do, 2 steps", options={"steps": 2}),
    Candidate("do, 3 steps", options={"steps": 3}),
    Candidate("do, 10 steps", options={"steps": 10}),
    Candidate("do, tol 1e-2", options={"tol": 1e-2}),
    Candidate("do, tol 1e-3", options={"tol": 1e-3}),
    Candidate("do, tol 1e-4", options={"tol": 1e-4}),
)


ADDING = ("linear", "svd", "tsvm", "iso_c", "iso_cts", "subspace_boost", "wudi", "pico")
ADDING += ("core", "robust", "dare", "breadcrumbs", "magnitude_prune")
AVERAGING = ("multislerp", "lego", "knots", "opcm", "ties", "dare_ties", "della")
"""All methods but `do`, and `slerp`, which takes two adapters: those that add the updates up, which
are given weights 1 / T, and those that divide by their number themselves."""

ORTHOGONALIZED, DIRECTIONS = "orthogonalized, ", "do on directions by "


def _with_parts(method: str) -> tuple[Candidate, ...]:
    """The method alone, on adapters that were orthogonalized, and on `do`'s directions."""
    mean = method in ADDING
    candidates = [Candidate(method, method, mean=mean)]
    if method not in ("linear", "svd"):  # these two would be `orthogonalize` and `do`
        before = {"pre": ["orthogonalize"]}
        candidates.append(Candidate(f"{ORTHOGONALIZED}{method}", method, before, mean=mean))
        candidates.append(Candidate(f"{DIRECTIONS}{method}", options={"directions": method}))
    return tuple(candidates)


METHODS = tuple(c for method in (*ADDING, *AVERAGING) for c in _with_parts(method))


@dataclass(frozen=True)
class Norms:
    """Frobenius norms of one module: of the adapters' updates as given and as orthogonalized, of
    their plain mean, and of the merge at scale 1."""

    given: Sequence[float]
    moved: Sequence[float]
    mean: float
    merged: float

    @property
    def root(self) -> float:
        return math.sqrt(len(self.given))


RULES: dict[str, Callable[[Norms], float]] = {
    "undo what orthogonalizing shrank": lambda x: sum(x.given) / sum(x.moved),
    "norm of the plain mean": lambda x: x.mean / x.merged,
    "mean norm / √T": lambda x: sum(x.given) / len(x.given) / x.root / x.merged,
    "geometric mean norm / √T": lambda x: (
        math.exp(sum(map(math.log, x.given)) / len(x.given)) / x.root / x.merged
    ),
}
"""λ of a module of `do` from its norms alone, in place of 1."""


def scaled_by_rule(rule: Callable[[Norms], float], adapters: Sequence[Path]) -> Deltas:
    """The default merge with every module's λ set by the rule."""
    plain, merged = PLAIN.merge(adapters), DO.merge(adapters)
    scaled = {}
    for name in merged.names:
        delta = merged.delta(name)
        norms = Norms(
            list(plain.report[name].magnitudes.values()),
            list(merged.report[name].magnitudes.values()),
            float(plain.delta(name).norm()),
            float(delta.norm()),
        )
        scaled[name] = rule(norms) * delta
    return scaled
