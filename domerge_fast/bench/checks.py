"""Whether a backend computes what the float64 oracle does: no figures for one that does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.plan import Plan, Stack
from ..algebra.roots import root
from ..algebra.side import Side
from ..backends import registry
from ..backends.factor_descent import in_factor_form
from ..methods.do import DoOptions
from . import cases
from .cases import Case

__all__ = ["MOST_ADAPTERS", "Checks"]

TOLERANCE = 1e-5
"""Relative error of a result in float32 or float64; a 16-bit one may be off by a rounding too."""

OPTIONS = DoOptions(steps=2, tol=0.0)
"""A fixed number of steps: where the descent stops may depend on rounding."""

CHECKED = tuple(op for op in registry.OPS if not op.startswith("entry_"))
"""The ops that are held against the oracle: no figure here is about the elementwise ones, whose
results jump where an entry is on a threshold."""

MODULES = 3
FEW_ADAPTERS = 16
MOST_ADAPTERS = 40
LONGEST_SVD = 512
"""What the oracle finishes in seconds: modules in all, adapters above which it is one module,
adapters of that one, and rows and columns of a dense SVD."""


@dataclass(frozen=True)
class Verdict:
    """The largest error of each op, and the first op whose error is not below what is allowed."""

    errors: dict[str, float]
    refused: str | None


class Checks:
    """Runs the oracle once, on some modules; then `check` holds a backend against it."""

    def __init__(self, plan: Plan, dtype: torch.dtype, modules: int = MODULES) -> None:
        self.stacks = _sample(plan, modules)
        self.cases = list(_cases(self.stacks, dtype, any_wide=_any_wide(plan)))
        self._expected = [_values(case, _oracle(case)) for case in self.cases]

    def check(self, backend: str, device: torch.device) -> Verdict:
        """The errors of a backend on a device."""
        errors: dict[str, float] = {}
        refused = None
        for case, expected in zip(self.cases, self._expected):
            found = _values(case, case.to(device).run(backend))
            for x, y in zip(found, expected, strict=True):
                error, allowed = _error(x, y), _allowed(x)
                errors[case.op] = max(error, errors.get(case.op, 0.0))
                if error > allowed and refused is None:
                    refused = f"{case.op} is off by {error:.1e}, {allowed:.1e} is allowed"
        return Verdict(errors, refused)


def _sample(plan: Plan, most: int) -> list[Stack]:
    """Modules of different shapes, the smallest first, on the CPU."""
    shapes: dict[tuple, str] = {}
    for name in plan.names:
        module = plan.module(name)
        ranks = tuple(m.rank for m in plan.modules(name))
        shapes.setdefault((module.m + module.n, module.m, ranks), name)
    names = [shapes[key] for key in sorted(shapes)]
    many = max(len(plan.owners[name]) for name in names) > FEW_ADAPTERS
    return [_stack(plan, name) for name in names[: 1 if many else most]]


def _stack(plan: Plan, name: str) -> Stack:
    s = cases.stack(plan, name, torch.device("cpu"))
    few = slice(MOST_ADAPTERS)
    return Stack(
        (name,),
        s.adapters[few],
        Side(s.a.blocks[few], s.a.scales[few]),
        Side(s.b.blocks[few], s.b.scales[few]),
        s.weights[few],
    )


def _any_wide(plan: Plan) -> bool:
    return any(
        plan.rank(name) > min(plan.module(name).m, plan.module(name).n) for name in plan.names
    )


def _cases(stacks: Sequence[Stack], dtype: torch.dtype, any_wide: bool) -> Iterator[Case]:
    """Every op that is timed. Truncation is cut to a size whose SVD the oracle can do."""
    recorded = cases.record(stacks, dtype, "torch", OPTIONS)
    for case in recorded:
        if case.op != "truncate":
            yield case
            continue
        (pairs,) = case.arguments
        cut = [(a[:, :LONGEST_SVD].contiguous(), b[:LONGEST_SVD].contiguous()) for a, b in pairs]
        yield Case(case.op, (cut,), case.options, case.work)
        yield Case("largest", ([x for pair in cut for x in pair],), {}, case.work)
    if any_wide and not any(case.op == "orthogonalize_factors" for case in recorded):
        rule = {"gamma": OPTIONS.gamma, "steps": OPTIONS.steps, "tol": OPTIONS.tol}
        yield Case("orthogonalize_factors", ([stacks[0].a],), rule, recorded[0].work)


def _values(case: Case, result: Any) -> list[Tensor]:
    """What of a result is well defined, on the CPU."""
    values: list[Tensor]
    if case.op == "orthogonalize":  # C where G is not singular: C X, with X X^T = G
        found, _ = result
        values = [c.cpu().double() @ root(g.double()).T for c, g in zip(found, case.arguments[0])]
        return [x.float() for x in values]
    if case.op == "orthogonalize_factors":
        values, _ = result
    elif case.op == "apply_decouple":
        factors, norms = result
        values = [*factors, *norms]
    elif case.op == "truncate":
        pairs, kept = result
        products = [(b.double() @ a.double()).to(a.dtype) for a, b in pairs]
        values = [*products, torch.tensor(kept)]
    elif case.op == "largest":
        values = [result]
    else:
        values = result
    return [x.cpu() for x in values]


def _oracle(case: Case) -> Any:
    """The literal result; of descents on factors, whose steps are others that end where the literal
    ones do, the result of their rule in float64."""
    if case.op != "orthogonalize_factors":
        return case.run("reference")
    rule = case.options["gamma"], case.options["steps"], case.options["tol"]
    found = [in_factor_form(p.stack(torch.float64), p.ranks, *rule) for p in case.arguments[0]]
    return [x for x, _ in found], torch.stack([stats for _, stats in found])


def _error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, infinite for NaN or another shape."""
    if found.shape != expected.shape:
        return math.inf
    size = float(expected.double().norm())
    error = float((found.double() - expected.double()).norm()) / (size or 1.0)
    return math.inf if math.isnan(error) else error


def _allowed(x: Tensor) -> float:
    return TOLERANCE + (torch.finfo(x.dtype).eps / 2 if x.element_size() == 2 else 0.0)
