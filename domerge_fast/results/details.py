"""What is told of every module beside the means over all: how much its adapters interfere, and the
spectra of some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Details", "Overlap"]


@dataclass(frozen=True)
class Overlap:
    """How much the adapters of one module interfere: means over the pairs of those that have it.

    rows, columns: overlap of the row spaces (A) and column spaces (B), 0 to 1. cosine: |cosine|
    between the updates ΔW, 0 to 1. strongest: the cosine that is farthest from 0, -1 to 1, and
    pair: the positions of the two adapters that have it.
    """

    rows: float
    columns: float
    cosine: float
    strongest: float
    pair: tuple[int, int]


@dataclass(frozen=True)
class Details:
    """modules: those that several adapters have, by name. energies: by adapter the sums of σ_k^2
    over the sampled modules, the largest singular value of each ΔW_i first. sampled: how many
    modules these are of."""

    modules: Mapping[str, Overlap]
    energies: tuple[tuple[float, ...], ...]
    sampled: int
