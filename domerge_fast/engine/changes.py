"""What adapters change by no product of factors, summed as their modules are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..adapters import Adapter, Kept, LazyTensor
from ..adapters.differences import NO_CHANGES, Changes, Origin, owner_of, summed
from ..adapters.plan import Plan
from ..adapters.whole import parameter
from ..errors import AdapterError, DomergeError
from .work import Work

__all__ = ["changes"]


def changes(
    plan: Plan,
    parts: Sequence[tuple[Plan, Work]],
    kept: Kept,
    origin: Origin | None,
    dtype: torch.dtype,
    whole: bool,
) -> Changes:
    """λ Σ w_i d_i of every parameter that the plan's adapters change so, with the λ and w_i of the
    module that has it; of a parameter of no module, those of the first part. No parts: λ is 1.
    origin, whole: as of `summed`. AdapterError where what is done to that part is no sum."""
    if not any(adapter.changed for adapter in plan.adapters):
        return NO_CHANGES

    def coefficients(name: str, adapter: Adapter) -> Sequence[float]:
        module = owner_of(name)
        if not parts:
            return plan.own.get(module, plan.weights)
        work = next((work for part, work in parts if module in part.owners), parts[0][1])
        weights = plan.own.get(module, plan.weights)
        changing = (w for w, a in zip(weights, plan.adapters) if name in a.changed)
        if any(changing) and not work.is_sum:
            raise _no_sum(name, adapter, work)
        return [work.settings.scale * w for w in weights]

    def before(name: str) -> LazyTensor | None:
        found = origin(name) if origin else None
        copies = (a.originals[name] for a in plan.adapters if name in a.originals)
        return next(copies, None) if found is None else found

    made = summed(plan.adapters, coefficients, before, whole, dtype)
    if twice := {*made.names}.intersection(map(parameter, kept.tensors)):
        problem = f"{min(twice)!r} is saved whole by an adapter, and changed by another"
        raise DomergeError(
            f"{problem}: two updates of one; say whole='drop' to leave the first out"
        )
    return made


def _no_sum(name: str, adapter: Adapter, work: Work) -> AdapterError:
    problem = f"changes {name!r} by no product of factors, which only a sum takes along"
    remedy = "use 'linear', without steps, and with a number for scale if with any"
    if work.method.method.sums(work.method.options):
        remedy = "leave out steps (pre, post), and give a number for scale"
    return AdapterError(adapter.name, None, problem, remedy)
