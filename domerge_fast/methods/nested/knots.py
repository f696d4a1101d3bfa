"""KnOTS: the updates in the basis of their joint SVD, merged there by another method.

    [τ_1 .. τ_T] = U S [V_1 .. V_T]^T,  P_i = U^T τ_i = S V_i^T  [K, n]
    ΔW = U merge(P_1 .. P_T)

The inner method sees K rows instead of m: `ties` by default. U comes from the eigenvectors of
sum_i τ_i τ_i^T, an R x R problem; K is the number of singular values above 1e-6 of the largest (the
authors': above 1e-5), at most R. Where singular values are equal U is not determined, and with it
the result of an inner method that works entry by entry. The authors' TIES seeks the largest entries
in the whole model: `conventions` "paper". Cost: two reads of the factors, 4 R^2 (m + n) flops,
three eigenproblems of R x R, and the inner method on [K, n]. Returns the exact result, of rank K at
most. Source: arXiv 2410.19735 and the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...options import option
from ..base import Settings
from . import shared_basis

__all__ = ["METHOD"]


@dataclass(frozen=True)
class KnotsOptions:
    inner: str = option("ties", "the method that merges the updates in their shared basis")


def spectra(
    b: Tensor, a: Tensor, ranks: tuple[int, ...], options: KnotsOptions, settings: Settings
) -> tuple[Tensor, None]:
    """sum_i τ_i τ_i^T."""
    energy = torch.zeros_like(b.mT @ b)
    for b_i, a_i in zip(b.split_with_sizes(ranks, 1), a.split_with_sizes(ranks, 1)):
        energy = energy + b_i.mT @ (a_i @ a_i.mT) @ b_i
    return energy, None


METHOD = shared_basis.method(
    "knots",
    "another method on the updates in the basis of their joint SVD",
    KnotsOptions,
    spectra,
    cost="R x R, and the inner method on R rows",
    source="arXiv 2410.19735",
    needs="an inner method",
)
