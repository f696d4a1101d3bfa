"""How far adapters' updates move outputs on what layers are given by other tasks, module by module.

tr(τ C τ^T) n / (||τ||^2 tr C), C [n, n] being the mean of Σ x x^T / Σ x^T x over the tasks but the
adapter's own: 1 where the update lies anyhow, less where it keeps off what the others are given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .adapters import Adapter
from .algebra import subspace
from .errors import AdapterError
from .results.report import OnInputs
from .storage.features_file import FeaturesFile

__all__ = ["on_inputs"]


def on_inputs(adapters: Sequence[Adapter], features: FeaturesFile) -> OnInputs:
    """Of all modules together, each by its ||τ||^2, and by module. An adapter whose name no task
    has is held against all of them. AdapterError for what is no LoRA of the file's layers."""
    tasks = [Path(a.name).name for a in adapters]
    own = tuple(task if task in features.tasks else None for task in tasks)
    modules: dict[str, tuple[float | None, ...]] = {}
    moved, squares = [0.0] * len(adapters), [0.0] * len(adapters)
    names = {name for a in adapters for name in a.modules}
    for name in sorted(names, key=lambda n: (features.inputs.get(n, -1), n)):
        row: list[float | None] = []
        for i, adapter in enumerate(adapters):
            if name not in adapter.modules:
                row.append(None)
                continue
            one, square = _of_module(adapter, name, features, own[i])
            moved[i] += one * square
            squares[i] += square
            row.append(one)
        modules[name] = tuple(row)
    features.input.check()
    whole = tuple(x / s if s > 0 else 0.0 for x, s in zip(moved, squares))
    return OnInputs(features.tasks, own, whole, modules)


def _of_module(
    adapter: Adapter, name: str, features: FeaturesFile, task: str | None
) -> tuple[float, float]:
    """How far, and ||τ||^2."""
    if adapter.magnitudes:
        problem = "is a DoRA, whose update is no product of its factors"
        raise AdapterError(adapter.name, None, problem, "merge it alone with its base first")
    c = features.others(name, task).double()
    a, b = (x.cpu().double() for x in adapter.factors(name))
    if len(c) != a.shape[1]:
        problem = f"has {a.shape[1]} inputs, and the features have {len(c)}"
        raise AdapterError(adapter.name, name, problem, "make them of its base model")
    gram = b.T @ b
    square = adapter.modules[name].scaling ** 2 * float((gram * (a @ a.T)).sum())
    if not math.isfinite(square):
        raise AdapterError(adapter.name, name, "NaN or an infinite value", "train it again")
    return subspace.moved(gram, a, c), square
