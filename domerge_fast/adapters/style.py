"""How an adapter was stored, for a writer to give back the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["MODEL", "Style"]

MODEL = "model"
"""Names of modules as the model's own code has them, which PEFT writes."""


@dataclass(frozen=True)
class Style:
    """format: the row that read the adapter. names: whose names its modules have (MODEL for the
    model's own; others are not those of the base): a merge goes into a format that is written with
    the same. grammar: which of a format's spellings of keys it has, "" where there is one. alphas:
    whether every module has an alpha of its own. metadata: what its file says of itself. models: of
    which models its modules may be, where they have been renamed (formats/names/). norms: modules
    whose weight and bias are said to be those of norms, where they change. kinds: what of its
    modules is stored otherwise than as a LoRA's factors (LoHa, LoKr, diff).

    Stored shapes are in its modules (`Module.a_shape`, 2-D or 4-D for a convolution of 1x1).
    """

    format: str
    names: str = MODEL
    grammar: str = ""
    alphas: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)
    models: tuple[str, ...] = ()
    norms: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()
