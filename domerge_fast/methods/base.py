"""What a merge method is: a function on a group of stacks, written in ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..plan import Stack
from ..report import SideReport


@dataclass(frozen=True)
class Settings:
    """What every method is given: λ, the dtype of its results, and where its ops run."""

    scale: float
    dtype: torch.dtype
    backend: str


@dataclass(frozen=True, eq=False)
class Factors:
    """A merged module: ΔW = B A with A [R, n] and B [m, R], and how it came about.

    norms: ||ΔW_i||_F of the stack's adapters, where the method worked them out.
    """

    a: Tensor
    b: Tensor
    a_side: SideReport | None = None
    b_side: SideReport | None = None
    norms: Sequence[float] | None = None


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    merge(stacks, grams_a, grams_b, options, settings) -> Factors of every stack; the Grams are
    [R, R] in float32, of the scaled factors, None where `needs_grams(stack, options)` is false
    and nobody else wanted them. options is the method's frozen dataclass. truncates: with
    neither rank nor energy given, cut to the largest rank of the adapters.
    """

    name: str
    summary: str
    options: type
    merge: Callable[
        [Sequence[Stack], Sequence[Tensor | None], Sequence[Tensor | None], Any, Settings],
        list[Factors],
    ]
    needs_grams: Callable[[Stack, Any], bool]
    truncates: bool = False
