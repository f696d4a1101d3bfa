"""What is taken where nobody chooses, by what can be seen of the adapters without data.

    ρ > 0.1   `do`                         adapters trained far: they overlap
    else      `tsvm` with power 0.5, svc   flattened by half, and what is counted twice is damped

each at the λ that is found for it (scaling.py), and w τ where one adapter alone has a module. ρ^2 =
mean_i (sum ||τ_i||_F^2 / sum m) is about how large updates are beside the weights, of which a
trained row has a length near 1. Whether A's come from one initialization makes no difference worth
a choice: docs/choosing.md has what was measured. Cost: that of the method, and the factors of a few
modules first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..adapters.plan import Plan, Stack
from ..algebra.side import Side
from ..errors import OptionError
from . import do
from .base import Chosen, Method
from .spectral import tsvm
from .steps.norms import norms

__all__ = ["METHOD"]

POWER = 0.5
"""Of the spectrum of `tsvm`."""

FAR = 0.1
"""ρ above which adapters are trained far."""

MODULES, ADAPTERS = 8, 64
"""How many of each are looked at."""


@dataclass(frozen=True)
class AutoOptions:
    """`auto` has no options: name the method that it says it took to change one."""


@dataclass(frozen=True)
class Taken:
    """The method for a set of adapters, whether the merge is calibrated after it (svc.py), and in
    a sentence what it is and why."""

    chosen: Chosen
    calibrated: bool
    what: str


def taken(plan: Plan) -> Taken:
    """What is taken for these adapters."""
    several = sorted(name for name in plan.names if len(plan.owners[name]) > 1)
    if not several:
        return Taken(_tsvm(), False, "auto took the updates as they are: none share a module")
    step = max(1, len(several) // MODULES)
    far = size([_first(plan.stack(name)) for name in several[step // 2 :: step][:MODULES]])
    why = f"the updates are about {float(f'{far:.2g}'):g} times as large as the weights, trained"
    if far > FAR:
        return Taken(_do(), False, f"auto took do: {why} far")
    return Taken(_tsvm(), True, f"auto took tsvm with power={POWER:g}, then svc: {why} gently")


def _tsvm() -> Chosen:
    return Chosen(tsvm.METHOD, tsvm.TsvmOptions(POWER))


def _do() -> Chosen:
    return Chosen(do.METHOD, do.DoOptions())


def _first(stack: Stack) -> Stack:
    """The first adapters of a stack, in the host's memory."""
    a, b = (
        Side(tuple([x.cpu() for x in p.blocks[:ADAPTERS]]), p.scales[:ADAPTERS])
        for p in (stack.a, stack.b)
    )
    return Stack(stack.names, stack.adapters[:ADAPTERS], a, b, stack.weights[:ADAPTERS])


def size(stacks: Sequence[Stack]) -> float:
    """ρ of these modules."""
    energy: dict[int, float] = {}
    rows: dict[int, int] = {}
    for s, sizes in zip(stacks, norms([s.a for s in stacks], [s.b for s in stacks], "auto")):
        for i, own in zip(s.adapters, sizes):
            energy[i] = energy.get(i, 0.0) + own * own
            rows[i] = rows.get(i, 0) + s.b.d
    return math.sqrt(sum(energy[i] / rows[i] for i in energy) / len(energy))


def _merge(*_: object) -> list:
    problem = "'auto' stands for a method that is chosen for a whole set of adapters"
    raise OptionError("method", problem, "name one, or merge with domerge_fast.merge")


METHOD = Method(
    "auto",
    "what keeps most without data: do, or tsvm with a flatter spectrum, by the adapters",
    AutoOptions,
    _merge,
    taken=taken,
    cost="that of the method it takes, and the factors of 8 modules first",
    source="docs/choosing.md",
)
