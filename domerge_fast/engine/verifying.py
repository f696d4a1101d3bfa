"""Merges a sample of the modules again by the float64 reference, and holds what is written of them
against that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..adapters.plan import Plan, Stack
from ..backends.descent_rates import on_factors
from ..errors import DomergeError, OptionError
from ..methods.running import Run
from ..recipe import NONE
from .first_pass import FirstPass
from .group import measured
from .interference import InterferenceSums
from .merging import Merged, merged
from .scaled import Scaled
from .work import Work

__all__ = ["MOST_VERIFIED", "Verified", "Verifying"]

MOST_VERIFIED = 8
"""Modules of a plan that are merged again, evenly spaced."""

MOST_ENTRIES = 1 << 25
"""m n T of such a module: what the reference, which forms every ΔW_i, does in seconds. Where all
are larger, the smallest are taken."""

TOLERANCE = 1e-4
"""Of a result before it is rounded, as a share of || |B| |A| ||_F: what orders of sums come to, and
where a descent stops."""

Verified = tuple[float, float]
"""||ΔW - ΔW_reference|| / ||ΔW_reference||, and how large that may be."""


class Verifying:
    """sampled: the modules that are merged again. OptionError where there are none."""

    def __init__(self, plan: Plan, scaled: Scaled, method: Run) -> None:
        work = scaled.work
        self.sampled = _sample(plan, work)
        self._plan, self._method = plan, method
        exact = replace(work.settings, backend="reference", dtype=torch.float32)
        self._dtype = torch.float32 if work.deltas else work.settings.dtype
        self._scaled = replace(scaled, work=replace(work, settings=exact))

    def check(
        self, stacks: Sequence[Stack], results: Sequence[Merged], first: FirstPass | None
    ) -> Mapping[str, Verified]:
        """What is said of the sampled modules among those that were merged. stacks: as they were
        read. DomergeError where one is off by more than its dtype explains."""
        chosen = [x for s in stacks for x in s.each() if x.name in self.sampled]
        if not chosen:
            return {}
        expected = _by_name(self._again([_here(x) for x in chosen], first))
        found = _by_name(results)
        return {x.name: self._held(x.name, found[x.name], expected[x.name]) for x in chosen}

    def _again(self, stacks: Sequence[Stack], first: FirstPass | None) -> Sequence[Merged]:
        """The stacks' merge by the reference, with what only the whole model tells."""
        work, uncounted = self._scaled.work, InterferenceSums((), NONE)
        wide, bare = work.wide_grams(self._method), self._method.bare
        wanted = [True] * len(stacks)
        group = measured(self._plan, stacks, wanted, uncounted, "reference", wide, bare).apart()
        if first is None:
            return merged(self._scaled, self._method, group, None, None)
        again = first.again(work)
        again.add(replace(group, stacks=self._scaled.weighted(group.stacks)))
        found = [again.take(s.name).found for s in group.stacks]
        return merged(self._scaled, self._method, group, found, again)

    def _held(self, name: str, found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Verified:
        delta, size, rounded = _delta(found)
        exact, *_ = _delta(expected)
        error, norm = float((delta - exact).norm()), float(exact.norm())
        allowed = TOLERANCE * size + torch.finfo(self._dtype).eps * rounded
        whole = norm or size or 1.0
        if not error <= allowed:  # NaN too
            raise _refusal(name, error / whole, allowed / whole, self._dtype)
        return error / whole, allowed / whole


def _sample(plan: Plan, work: Work) -> frozenset[str]:
    """Evenly spaced ones of those that the reference merges in seconds, to the same result."""

    def size(name: str) -> int:
        module = plan.module(name)
        return module.m * module.n * len(plan.owners[name])

    names = [name for name in plan.names if not (work.descends and _on_factors(plan, name, work))]
    if not names:
        problem = "every module descends on its factors, and that ends elsewhere"
        raise OptionError("verify", problem, "leave it out, or merge fewer adapters at once")
    most = max(MOST_ENTRIES, min(map(size, names)))
    small = [name for name in names if size(name) <= most]
    return frozenset(small[:: math.ceil(len(small) / MOST_VERIFIED)])


def _on_factors(plan: Plan, name: str, work: Work) -> bool:
    """Whether a side's descent may go on its factors, by other steps than the reference's."""
    sides = plan.module(name).m, plan.module(name).n
    backend = work.settings.backend
    return any(on_factors(plan.rank(name), d, backend, tol=math.inf) for d in sides)


def _refusal(name: str, error: float, allowed: float, dtype: torch.dtype) -> DomergeError:
    what = f"{str(dtype).removeprefix('torch.')} explains {allowed:.2g}"
    problem = f"off by {error:.2g} of its norm from the reference, where {what}"
    remedy = "merge with another backend (backend='torch'), and report this"
    return DomergeError(f"module {name!r}: {problem}; {remedy}")


def _here(stack: Stack) -> Stack:
    """In the host's memory."""
    if stack.a.device.type == "cpu":
        return stack
    a, b = (side.elsewhere([x.cpu() for x in side.matrices]) for side in (stack.a, stack.b))
    return replace(stack, a=a, b=b)


def _by_name(rows: Sequence[Merged]) -> dict[str, tuple[Tensor, ...]]:
    """Tensors of every module."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for stack, _, result in rows:
        alone = result.tensors[0].dim() == 2
        each = [result.tensors] if alone else list(zip(*(x.unbind() for x in result.tensors)))
        found |= zip(stack.names, each)
    return found


def _delta(tensors: tuple[Tensor, ...]) -> tuple[Tensor, float, float]:
    """ΔW in float64, || |B| |A| ||_F, and the norm of what rounding the factors changes of it, at a
    unit of rounding: errors of the terms of a sum are independent."""
    wide = [x.cpu().double() for x in tensors]
    if len(wide) == 1:
        return wide[0], float(wide[0].norm()), float(wide[0].norm())
    a, b = wide
    size = float((b.abs() @ a.abs()).norm())
    return b @ a, size, math.sqrt(float(b.square().sum(0) @ a.square().sum(1)))
