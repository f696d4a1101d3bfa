"""What a method that lives in R x R is: a function on Grams.

    coefficients(grams, state, weights, options) -> C_A [k, R], C_B [k, R] and a report, by module
    ΔW = λ (C_B B^T)^T (C_A A)

in plain torch and float64, of a batch of modules that are alike: it reads nothing, calls no op and
knows no device. Who runs it (running.py) has the Grams once, takes the Grams of what it makes from
these, cuts there, and applies the coefficients once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..adapters.plan import Stack

__all__ = [
    "BATCH_BYTES",
    "Batch",
    "Coefficients",
    "Contract",
    "Found",
    "Needs",
    "State",
    "alike",
    "batch",
]

BATCH_BYTES = 64 << 20
"""What the R x R matrices of one kind may take in a batch of modules."""


@dataclass(frozen=True)
class Needs:
    """What a method has to be given.

    gram: the dtype of its Grams, None for none. bare: those of B^T are without the scalings s_i,
    and so is the B^T that C_B is applied to. host: they are in the host's memory. calibrates:
    whether it can do what `State.calibrated` asks for.
    """

    gram: torch.dtype | None = None
    bare: bool = False
    host: bool = False
    calibrates: bool = False

    @property
    def passes(self) -> int:
        """How often the factors are read for a merge at a given λ."""
        return 1 if self.gram is None else 2


@dataclass(frozen=True)
class State:
    """What a method is told besides: what `Method.reduce` made of the whole model; the Schatten
    norm of the merge that is wanted with it; and whether it is to be calibrated (svc.py)."""

    whole: Any = None
    order: int | None = None
    calibrated: bool = False


@dataclass(frozen=True, eq=False)
class Batch:
    """P modules of the same ranks: A A^T and B^T B [P, R, R], without any rows where the method
    needs none; the sides n and m as far as they limit the rank; and by module its name, its
    adapters, their scalings s_i, and the powers of two that were taken out of A and B."""

    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]
    sides: tuple[int, int]
    names: Sequence[str]
    adapters: Sequence[tuple[int, ...]]
    scales: Sequence[tuple[float, ...]]
    powers: Sequence[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Found:
    """What was found of a module before anything is made. size: the Schatten norm of its merge at
    λ = 1, where one was wanted. overlaps: <ΔW, τ_i> and ||τ_i||^2 of every adapter, [2, T], where
    it was calibrated."""

    size: float | None = None
    overlaps: Tensor | None = None

    def kept(self) -> Found:
        """What is worth keeping until the whole model is known: what is R x R."""
        return self


@dataclass(frozen=True, eq=False)
class Coefficients(Found):
    """A merge at λ = 1 as A' = C_A A and B'^T = C_B B^T.

    a: C_A [k, R], None for A as it is. b: C_B [k, R], or [T], what the rows of every adapter are
    multiplied by. strengths: where it is calibrated, s_i^r of every adapter and row, [T, k].
    grams: A' A'^T and B'^T B' [k, k], where they will be cut.
    """

    a: Tensor | None = field(kw_only=True)
    b: Tensor = field(kw_only=True)
    strengths: Tensor | None = field(default=None, kw_only=True)
    grams: tuple[Tensor, Tensor] | None = field(default=None, kw_only=True)


Contract = Callable[[Batch, State, Sequence[Sequence[float]], Any], Sequence[Coefficients]]
"""(grams, state, weights w_i of every module, options) -> the coefficients of every module.

options is the method's frozen dataclass. OptionError or FlatCut for what has no merge.
"""


def alike(stacks: Sequence[Stack]) -> list[list[int]]:
    """Positions of stacks whose ranks and coordinates have the same shapes, in batches."""
    found: dict[tuple, list[int]] = {}
    for k, s in enumerate(stacks):
        found.setdefault((s.a.ranks, min(s.rank, s.a.d), min(s.rank, s.b.d)), []).append(k)
    batches = []
    for (ranks, *_), members in found.items():
        most = max(1, BATCH_BYTES // (8 * sum(ranks) ** 2))
        batches += [members[at : at + most] for at in range(0, len(members), most)]
    return batches


def batch(stacks: Sequence[Stack], grams_a: Sequence[Tensor], grams_b: Sequence[Tensor]) -> Batch:
    """Of stacks that are alike, with their Grams; none of these where the method needs none."""
    first = stacks[0]
    nothing = torch.empty(len(stacks), 0, 0, dtype=torch.float64)
    return Batch(
        torch.stack([*grams_a]) if grams_a else nothing,
        torch.stack([*grams_b]) if grams_b else nothing,
        first.a.ranks,
        (min(first.rank, first.a.d), min(first.rank, first.b.d)),
        [s.name for s in stacks],
        [s.adapters for s in stacks],
        [s.b.scales for s in stacks],
        [s.powers for s in stacks],
    )
