"""What a merge is to be written as, whatever its form."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..adapters import Kept, LazyTensor, Module, Style
from ..adapters.adapter import Slice, parameter_of, parts_of
from ..adapters.columns import OfKinds
from ..adapters.differences import NO_CHANGES, Changes
from ..adapters.parts import Parts
from ..adapters.plan import Plan
from ..storage.input_file import InputFile
from .model.checkpoint import Checkpoint

__all__ = ["Layout", "Layouts", "Target"]


@dataclass(slots=True)  # not frozen: that would double the time to make 18,000 of them
class Layout:
    """How a merged module is stored: `inputs` is the stored shape of A without its rank, and
    `largest_rank` what its rank is at most. slice: of a parameter that is adapted as it is. dense:
    whether the product of its factors is written, for formats whose `Holds` has `differences`."""

    name: str
    kind: str
    m: int
    inputs: tuple[int, ...]
    largest_rank: int
    slice: Slice | None = None
    dense: bool = False

    @property
    def parameter(self) -> str:
        """The model's name for the parameter that is adapted."""
        return parameter_of(self.name, self.slice)

    @property
    def is_numbered(self) -> bool:
        """Whether it is one of the matrices of a parameter."""
        return self.slice is not None and self.slice.index is not None

    @property
    def key(self) -> str:
        """What PEFT's config calls what is adapted: a module, or a parameter."""
        return self.parameter if self.slice else self.name

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and B in the files."""
        ones = (1,) * (len(self.inputs) - 1)
        return (rank, *self.inputs), (self.m, rank, *ones)

    def stored(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A [k, n] and B [m, k] in the shapes of the files."""
        shape_a, shape_b = self.shapes(len(a))
        return a.reshape(shape_a), b.reshape(shape_b)


class Layouts(Mapping[str, Layout]):
    """Those of a plan's modules, which are stored as an adapter has them. All are made once one is
    asked for: a merge that stays in memory asks for none. ranks: what every module's rank is at
    most."""

    def __init__(self, plan: Plan, ranks: Mapping[str, int]) -> None:
        self.modules, self.ranks, self._plan = plan.described, ranks, plan

    @property
    def parts(self) -> Parts:
        return self._plan.parts

    @cached_property
    def _made(self) -> dict[str, Layout]:
        return {
            name: Layout(name, x.kind, x.b_shape[0], x.a_shape[1:], self.ranks[name], x.slice)
            for name, x in self.modules.items()
        }

    def __getitem__(self, name: str) -> Layout:
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self.modules

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def values(self) -> ValuesView[Layout]:
        return self._made.values()

    def items(self) -> ItemsView[str, Layout]:
        return self._made.items()


@dataclass(frozen=True)
class Target:
    """What the merged adapter is written as: PEFT config fields that do not depend on ranks,
    the layout of every module, and what is kept of the tensors that adapters save whole. `inputs`
    are the folders of the adapters, which are never written to, `files` what was read of them;
    `copied` are files that are written as they are. `ragged`: whether every module is written with
    its own rank. empty: modules of `layouts` that no adapter has and that are written as zeros.
    scales: what is in front of B A, by module, 1 where nothing is said; only of what is converted.
    base: the base model, where it was given. styles: how the adapters were stored that are of the
    format which is written. recipe_bytes: what the recipe in a file takes at most, which only a
    writer asks for; None where there is none."""

    config: Mapping[str, object]
    layouts: Mapping[str, Layout]
    whole: Kept
    dtype: torch.dtype
    inputs: frozenset[Path]
    files: tuple[InputFile, ...] = ()
    copied: tuple[InputFile, ...] = ()
    ragged: bool = False
    empty: tuple[str, ...] = ()
    scales: Mapping[str, float] = field(default_factory=dict)
    base: Checkpoint | None = None
    styles: tuple[Style, ...] = ()
    changes: Changes = NO_CHANGES
    recipe_bytes: Callable[[], int] | None = None

    def check_inputs(self) -> None:
        """Raise AdapterError if a file of an adapter is not any more what it was when loaded."""
        for file in self.files:
            file.check()

    @property
    def modules(self) -> Mapping[str, Layout | Module]:
        """What says the kind, m, slice and parameter of every module."""
        return self.layouts.modules if isinstance(self.layouts, Layouts) else self.layouts

    @property
    def parts(self) -> Parts:
        """Of what is adapted, by what the model calls it."""
        return self.layouts.parts if isinstance(self.layouts, Layouts) else parts_of(self.layouts)

    @property
    def carried(self) -> Mapping[str, LazyTensor]:
        """The tensors that are written whole, by the keys PEFT writes."""
        return self.whole.tensors

    def scale(self, name: str) -> float:
        """What is in front of a module's B A."""
        return self.scales.get(name, 1.0)

    @cached_property  # asked for with every module
    def rank(self) -> int | None:
        """The rank that every module is written with as factors; None for its own."""
        if self.ragged:
            return None
        if isinstance(self.layouts, Layouts):
            of_modules = self.layouts.ranks
            found = of_modules.every if isinstance(of_modules, OfKinds) else of_modules.values()
            return max(found, default=None)
        ranks = [layout.largest_rank for layout in self.layouts.values() if not layout.dense]
        return max(ranks, default=None)

    def padded(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """A [k, n] and B [m, k] of a module, with rows and columns of zeros up to `rank`."""
        missing = 0 if self.rank is None else self.rank - len(a)
        return _longer(a, missing), _longer(b.T, missing).T


def _longer(x: Tensor, rows: int) -> Tensor:
    """x with so many rows of zeros below it."""
    if rows < 0:
        raise AssertionError(f"a module has rank {len(x)}, more than was planned")
    return torch.cat([x, x.new_zeros(rows, x.shape[1])]) if rows else x
