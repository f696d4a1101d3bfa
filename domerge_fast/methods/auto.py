"""What is taken where nobody chooses, by what can be seen of the adapters without data.

    ρ > 0.1                    `do`                    adapters trained far: updates overlap
    A's of one initialization  `tsvm` power 0.5, svc   directions that several use are strong
    else                       `tsvm` power 0.25, svc  for a reason, and flattened less

each at the λ that is found for it (scaling.py), and w τ where one adapter alone has a module.
ρ^2 = mean_i (sum ||τ_i||_F^2 / sum m) is about how large updates are beside the weights, of which a
trained row has a length near 1. The A's are told apart by ||A_i A_j^T||_F^2 / (||A_i A_i^T||_F
||A_j A_j^T||_F) beyond what independent A's have by chance: near 0 where they were drawn apart, .4
and more where they started as one. docs/choosing.md says what was measured. Cost: that of the
method, and the factors of a few modules first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import ops
from ..errors import OptionError
from ..plan import Plan, Stack
from ..problem import Problem
from . import do, tsvm
from .base import Chosen, Method

FAR = 0.1
"""ρ above which adapters are trained far."""

ONE_INIT = 0.2
"""Overlap from which A's count as one initialization."""

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
        return Taken(_tsvm(0.25), False, "auto took the updates as they are: none share a module")
    step = max(1, len(several) // MODULES)
    stacks = [_first(plan.stack(name)) for name in several[step // 2 :: step][:MODULES]]
    sides = [s.a for s in stacks] + [s.b for s in stacks]
    grams = [_blocks(g, p) for g, p in zip(ops.gram(sides, dtype=torch.float64), sides)]
    far = _size(stacks, grams)
    if far > FAR:
        why = f"the updates are about {far:.2f} times as large as the weights, trained far"
        return Taken(_do(), False, f"auto took do: {why}")
    common = _overlap(stacks, grams[: len(stacks)])
    why = f"the adapters' A's overlap by {common:.2f}, as those of"
    if common >= ONE_INIT:
        what = f"auto took tsvm with power=0.5, then svc: {why} one initialization do"
        return Taken(_tsvm(0.5), True, what)
    what = f"auto took tsvm with power=0.25, then svc: {why} initializations of their own do"
    return Taken(_tsvm(0.25), True, what)


def _tsvm(power: float) -> Chosen:
    return Chosen(tsvm.METHOD, tsvm.TsvmOptions(power))


def _do() -> Chosen:
    return Chosen(do.METHOD, do.DoOptions())


def _first(stack: Stack) -> Stack:
    """The first adapters of a stack, in the host's memory."""
    a, b = (
        Problem(tuple([x.cpu() for x in p.blocks[:ADAPTERS]]), p.scales[:ADAPTERS])
        for p in (stack.a, stack.b)
    )
    return Stack(stack.name, stack.adapters[:ADAPTERS], a, b, stack.weights[:ADAPTERS])


def _blocks(gram: torch.Tensor, side: Problem) -> list[list[torch.Tensor]]:
    """X_i X_j^T of every pair of blocks."""
    return [list(rows.split(side.ranks, 1)) for rows in gram.split(side.ranks)]


Blocks = Sequence[Sequence[Sequence[torch.Tensor]]]


def _size(stacks: Sequence[Stack], grams: Blocks) -> float:
    """ρ of these modules."""
    energy: dict[int, float] = {}
    rows: dict[int, int] = {}
    for s, a, b in zip(stacks, grams, grams[len(stacks) :]):
        for k, i in enumerate(s.adapters):
            energy[i] = energy.get(i, 0.0) + float((a[k][k] * b[k][k]).sum())
            rows[i] = rows.get(i, 0) + s.b.d
    return math.sqrt(max(0.0, math.fsum(energy[i] / rows[i] for i in energy) / len(energy)))


def _overlap(stacks: Sequence[Stack], grams: Blocks) -> float:
    """How much the row spaces of A's have in common beyond chance: 0 to 1, the mean over pairs of
    adapters and over modules.

    By chance it is sqrt(r_i r_j / ((n + r_i) (n + r_j))), for independent Gaussian A's.
    """
    found = []
    for s, gram in zip(stacks, grams):
        energy = [[float(x.square().sum()) for x in row] for row in gram]
        ranks, n = s.a.ranks, s.a.d
        for i, j in itertools.combinations(range(len(ranks)), 2):
            own = math.sqrt(energy[i][i]) * math.sqrt(energy[j][j])
            chance = math.sqrt(ranks[i] * ranks[j] / ((n + ranks[i]) * (n + ranks[j])))
            if own > 0:
                found.append((energy[i][j] / own - chance) / (1 - chance))
    return max(0.0, math.fsum(found) / len(found)) if found else 0.0


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
