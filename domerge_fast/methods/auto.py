"""What is taken where nobody chooses: `tsvm` with a flatter spectrum, calibrated.

    ΔW = svc(tsvm(w_1 τ_1 .. w_T τ_T; power)),  and w τ where one adapter alone has the module

power is 0.25, and 0.5 where the adapters' A's come from one initialization: then directions that
several adapters use are strong for a reason, and the spectrum is flattened less. Which it is can be
seen without data, as ||A_i A_j^T||_F^2 / (||A_i A_i^T||_F ||A_j A_j^T||_F) over what independent
A's have by chance: near 0 where they were drawn apart, .4 and more where they started as one.
docs/methods.md says what was measured. Cost: that of `tsvm`, and the A's of a few modules first.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..plan import Plan, Stack
from ..problem import Problem
from . import space, tsvm
from .base import Chosen, Halves, Settings

APART, SHARED = 0.25, 0.5
"""The power for A's of their own, and for A's of one initialization."""

ONE_INIT = 0.2
"""Overlap from which A's count as one initialization."""

MODULES, ADAPTERS = 8, 64
"""How many of each are looked at."""


@dataclass(frozen=True)
class AutoOptions:
    """`auto` has no options: name the method that it says it took to change one."""


def taken(plan: Plan) -> tuple[Chosen, str]:
    """The method for these adapters, and in a sentence what it is and why."""
    found = overlap(plan)
    power = SHARED if found >= ONE_INIT else APART
    kind = "one initialization" if found >= ONE_INIT else "initializations of their own"
    core = functools.partial(tsvm.core, options=tsvm.TsvmOptions(power))
    halves = Halves(functools.partial(find, core), space.make, wide=True, calibrates=True)
    row = dataclasses.replace(METHOD, halves=halves, merge=functools.partial(space.merge, halves))
    chosen = Chosen(row, AutoOptions())
    if all(len(owners) == 1 for owners in plan.owners.values()):
        return chosen, "auto took the updates as they are: no module is in two adapters"
    what = f"auto took tsvm with power={power:g} and svc"
    return chosen, f"{what}: the adapters' A's overlap by {found:.2f}, as those of {kind} do"


def overlap(plan: Plan) -> float:
    """How much the row spaces of the A's have in common beyond chance: 0 to 1, the mean over pairs
    of adapters and over a sample of modules; 0 where no module has two adapters."""
    several = [name for name in plan.names if len(plan.owners[name]) > 1]
    step = max(1, len(several) // MODULES)
    found: list[float] = []
    for name in several[step // 2 :: step][:MODULES]:
        found += _pairs(plan.stack(name))
    return max(0.0, math.fsum(found) / len(found)) if found else 0.0


def _pairs(stack: Stack) -> list[float]:
    """The overlap beyond chance of every pair of the first adapters of a module.

    By chance it is sqrt(r_i r_j / ((n + r_i) (n + r_j))), for independent Gaussian A's.
    """
    blocks, n = stack.a.blocks[:ADAPTERS], stack.a.d
    (gram,) = ops.gram([Problem(blocks, (1.0,) * len(blocks))], dtype=torch.float64)
    ranks = [len(block) for block in blocks]
    rows = gram.split(ranks)
    energy = [[float(x.square().sum()) for x in row.split(ranks, 1)] for row in rows]
    found = []
    for i, j in itertools.combinations(range(len(ranks)), 2):
        own = math.sqrt(energy[i][i]) * math.sqrt(energy[j][j])
        chance = math.sqrt(ranks[i] * ranks[j] / ((n + ranks[i]) * (n + ranks[j])))
        if own > 0:
            found.append((energy[i][j] / own - chance) / (1 - chance))
    return found


def find(
    core: Callable[[space.Coordinates], tuple[Tensor, Tensor]],
    stacks: Sequence[Stack],
    grams_a: Sequence[Tensor],
    grams_b: Sequence[Tensor],
    options: AutoOptions,
    settings: Settings,
) -> list[space.Coefficients]:
    """`tsvm`, and the adapter itself where there is one alone."""
    several = [k for k, s in enumerate(stacks) if len(s.adapters) > 1]
    merged = space.find(
        lambda x, _: core(x),
        [stacks[k] for k in several],
        [grams_a[k] for k in several],
        [grams_b[k] for k in several],
        options,
        settings,
    )
    found = dict(zip(several, merged))
    return [found.get(k) or _alone(s, grams_a[k]) for k, s in enumerate(stacks)]


def _alone(stack: Stack, gram: Tensor) -> space.Coefficients:
    one = torch.eye(stack.rank, dtype=torch.float32, device=gram.device)
    return space.Coefficients(a=one, b=stack.weights[0] * stack.b.scales[0] * one)


METHOD = dataclasses.replace(
    space.method(
        "auto",
        "the best kept method without data: tsvm with a flatter spectrum, calibrated",
        AutoOptions,
        lambda x, options: tsvm.core(x, tsvm.TsvmOptions(APART)),
        source="arXiv 2412.00081, 2602.05536",
    ),
    taken=taken,
)
