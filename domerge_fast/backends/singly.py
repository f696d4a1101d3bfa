"""A backend that takes the sides of one module each, for sides of several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..algebra.side import Side

__all__ = ["Singly", "each", "joined"]


class Singly:
    """The ops of registry.OPS by the functions of a module that knows no sides of several modules:
    these are given one by one, and the results put together."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        """What takes no sides, or those of one module."""
        return getattr(self._module, name)

    def gram(self, problems: Sequence[Side], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return joined(self._module.gram(each(problems), dtype), _counts(problems))

    def block_gram(self, problems: Sequence[Side]) -> list[Tensor]:
        return joined(self._module.block_gram(each(problems)), _counts(problems))

    def block_largest(self, problems: Sequence[Side]) -> Tensor:
        found: Tensor = self._module.block_largest(each(problems))
        return found

    def orthogonalize(
        self, grams: Sequence[Tensor], ranks: Sequence[tuple[int, ...]], *rule: Any
    ) -> tuple[list[Tensor], Tensor]:
        counts = [len(g) if g.dim() == 3 else None for g in grams]
        every = [r for r, count in zip(ranks, counts) for _ in range(_number(count))]
        c, stats = self._module.orthogonalize(_apart(grams, counts), every, *rule)
        return joined(c, counts), stats

    def orthogonalize_factors(
        self, problems: Sequence[Side], *rule: Any
    ) -> tuple[list[Tensor], Tensor]:
        x, stats = self._module.orthogonalize_factors(each(problems), *rule)
        return joined(x, _counts(problems)), stats

    def apply(
        self, coefficients: Sequence[Tensor | None], problems: Sequence[Side], dtype: torch.dtype
    ) -> list[Tensor]:
        counts = _counts(problems)
        found = self._module.apply(_apart(coefficients, counts), each(problems), dtype)
        return joined(found, counts)

    def apply_decouple(
        self,
        coefficients: Sequence[Tensor | None],
        problems: Sequence[Side],
        blocks: Sequence[Tensor],
        omegas: Sequence[Sequence[float]],
        scale: float,
        dtype: torch.dtype,
        full: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        counts = _counts(problems)
        every = [w for w, count in zip(omegas, counts) for _ in range(_number(count))]
        given = _apart(coefficients, counts), each(problems), _apart(blocks, counts), every
        whole = full and _apart(full, counts)
        a, norms = self._module.apply_decouple(*given, scale, dtype, whole)
        return joined(a, counts), joined(norms, counts)


def each(problems: Iterable[Side]) -> list[Side]:
    """The sides of all modules."""
    return [one for p in problems for one in p.each()]


def _counts(problems: Iterable[Side]) -> list[int | None]:
    return [p.count for p in problems]


def _number(count: int | None) -> int:
    return 1 if count is None else count


def _apart(tensors: Sequence[Tensor | None], counts: Sequence[int | None]) -> list[Tensor | None]:
    """Those of every module; None for every one where there is none."""
    found: list[Tensor | None] = []
    for x, count in zip(tensors, counts):
        found += [x] * _number(count) if x is None or count is None else x.unbind()
    return found


def joined(results: Iterable[Tensor], counts: Iterable[int | None]) -> list[Tensor]:
    """The results of every side, in the memory layout that each of them has."""
    every, found = iter(results), []
    for count in counts:
        if count is None:
            found.append(next(every))
            continue
        own = list(islice(every, count))
        in_columns = own[0].dim() == 2 and not own[0].is_contiguous()
        found.append(torch.stack([x.T for x in own]).mT if in_columns else torch.stack(own))
    return found
