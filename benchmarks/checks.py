"""No figure of a backend that is wrong: every op, and the merge of one module, against float64."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import rivals
import torch

import domerge_fast as dm
from domerge_fast.adapters.plan import Plan
from domerge_fast.backends import paper
from domerge_fast.bench import measure
from domerge_fast.bench.checks import MOST_ADAPTERS, Checks

TOLERANCE = 2**-7
"""Relative error of ΔW with bfloat16 factors: two roundings of 2^-9 each, on both."""


def check(adapters: Sequence[dm.Adapter], device: torch.device) -> dict[str, float]:
    """The relative error of ΔW of the smallest module, by backend and method, or an exit.

    Of large sets the module's first MOST_ADAPTERS, which the oracle finishes.
    """
    plan = Plan.make(adapters, [1.0] * len(adapters))
    ops = Checks(plan, plan.dtype(), modules=1)
    name = rivals.one_of_each_shape(adapters)[0][0]
    owners = [adapter for adapter in adapters if name in adapter.modules][:MOST_ADAPTERS]
    only = [dm.from_tensors({name: a.factors(name)}, a.modules[name].scaling) for a in owners]
    expected = {method: _expected(only, name, method) for method in ("do", "svd")}
    errors = {}
    for backend in measure.usable(device):
        refused = ops.check(backend, device).refused
        if refused:
            sys.exit(f"{backend} disagrees with the reference: {refused}; nothing to report")
        for method, delta in expected.items():
            merged = dm.merge(only, method, scale=1.0, backend=backend, device=str(device))
            error = float((merged.delta(name).cpu().double() - delta).norm() / delta.norm())
            if not error < TOLERANCE:
                sys.exit(
                    f"{backend} disagrees with the reference: ΔW of {method} is off by "
                    f"{error:.1e}; nothing to report"
                )
            errors[f"{backend} {method}"] = error
    return errors


def _expected(adapters: Sequence[dm.Adapter], name: str, method: str) -> torch.Tensor:
    """ΔW [m, n] in float64, by the definitions, dense."""
    pairs = [[x.double() for x in adapter.factors(name)] for adapter in adapters]
    a = [a for a, _ in pairs]
    b = [adapter.modules[name].scaling * b for adapter, (_, b) in zip(adapters, pairs)]
    if method == "do":
        return paper.do_merging(a, b, [1 / len(a)] * len(a))
    rank = max(len(x) for x in a)
    u, s, vh = torch.linalg.svd(torch.cat(b, 1) @ torch.cat(a), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]
