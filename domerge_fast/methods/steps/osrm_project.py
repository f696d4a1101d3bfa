"""Before a merge: of every adapter what does not touch the inputs of other tasks.

    A'_i = A_i (I - V_i V_i^T),  B'_i = B_i

with V_i [n, k] the fewest eigenvectors that hold the share `features_energy` (0.9) of what the
module is given by all tasks but the adapter's own, which is the one of the adapter's name. Cost: an
eigenproblem of n x n an adapter and input, and one read of the A's. Source: arXiv 2505.22934, but
that B is not fitted anew (osrm/project.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...adapters.plan import Stack
from ...algebra import subspace
from ...algebra.side import Side
from ...errors import AdapterError, OptionError, some
from ...storage.features_file import FeaturesFile
from ..base import Settings
from .base import Beside, PreStep, Run

__all__ = ["STEP"]

ENERGY = 0.9


def bound(beside: Beside) -> Run:
    if beside.features is None:
        problem = "'osrm_project' needs what layers are given by other tasks"
        raise OptionError("pre", problem, "give features, a file of 'domerge-fast osrm features'")
    return _Projection(beside, beside.features).run


class _Projection:
    """V_i of the last input are kept: modules that share one follow each other."""

    def __init__(self, beside: Beside, features: FeaturesFile) -> None:
        self._features, self._names = features, beside.names
        self._energy = ENERGY if beside.energy is None else beside.energy
        self._tasks = [Path(name).name for name in beside.names]
        if missing := [x for x in self._tasks if x not in features.tasks]:
            problem = f"are of {some(features.tasks)}, and no task is called {missing[0]!r}"
            remedy = "call tasks as the adapters' folders, or use 'domerge-fast osrm project'"
            raise OptionError("features", problem, remedy)
        self._input = -1
        self._bases: dict[str, Tensor] = {}

    def run(self, stacks: Sequence[Stack], settings: Settings) -> list[Stack]:
        return [dataclasses.replace(s, a=self._less(s)) for s in stacks]

    def _less(self, stack: Stack) -> Side:
        rows = [self._off(stack, k) for k in range(len(stack.adapters))]
        return Side(tuple(rows), stack.a.scales)

    def _off(self, stack: Stack, k: int) -> Tensor:
        """A_i off V_i, in float32."""
        i, block = stack.adapters[k], stack.a.blocks[k]
        basis = self._basis(stack.name, i, stack.a.d).to(block.device)
        less = subspace.less(block.double(), basis)
        if float(less.norm()) <= subspace.NOTHING * float(block.double().norm()):
            problem = f"nothing is left of its update off {basis.shape[1]} of {len(basis)} inputs"
            raise AdapterError(self._names[i], stack.name, problem, "say less features_energy")
        return less.float()

    def _basis(self, module: str, i: int, n: int) -> Tensor:
        number = self._features.inputs.get(module, -1)
        if number != self._input:
            self._input, self._bases = number, {}
        task = self._tasks[i]
        if task not in self._bases:
            c = self._features.others(module, task)
            if len(c) != n:
                problem = f"has {n} inputs, and the features have {len(c)}"
                raise AdapterError(self._names[i], module, problem, "make them of its base model")
            generator = torch.Generator().manual_seed(0)
            self._bases[task] = subspace.largest(c, self._energy, None, generator)
        return self._bases[task]


STEP = PreStep("osrm_project", "take out what other tasks' inputs excite", of=bound)
