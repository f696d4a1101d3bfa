"""How an op is registered with torch.library: problems travel as flat lists of tensors.

A list of problems becomes `blocks` (every block of every problem), `counts` (blocks a problem)
and `scales` (one a block). Fakes give the shapes of the results, so that the ops work under
torch.compile and FakeTensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from types import ModuleType

import torch
from torch import Tensor

from ..algebra.side import Side
from ..backends import registry

NAMESPACE = "domerge_fast"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
PROBLEMS = "Tensor[] blocks, int[] counts, float[] scales"

Flat = tuple[list[Tensor], list[int], list[float]]


def flatten(problems: Sequence[Side]) -> Flat:
    return (
        [block for p in problems for block in p.blocks],
        [len(p.blocks) for p in problems],
        [scale for p in problems for scale in p.scales],
    )


def unflatten(
    blocks: Sequence[Tensor], counts: Sequence[int], scales: Sequence[float]
) -> list[Side]:
    pairs = iter(zip(blocks, scales, strict=True))
    parts = [tuple(zip(*islice(pairs, count))) for count in counts]
    return [Side(*part) for part in parts]


def implementation(backend: str, tensors: Sequence[Tensor]) -> ModuleType:
    """The module that runs an op on these tensors; of nothing, any makes nothing."""
    if not tensors:
        return registry.load("torch")
    return registry.load(registry.choose(backend, tensors[0].device.type))


def define(name: str, schema: str, run: Callable, fake: Callable) -> Callable:
    """Register domerge_fast::<name> for every device and return the callable op."""
    _LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
