"""Core Space: the updates in one R x R space, merged there by another method.

    [s_1 B_1 .. s_T B_T] = U .. ,  [A_1; ..; A_T] = .. V^T,  τ_i = U t_i V^T
    ΔW = U merge(t_1 .. t_T) V^T

U and V are the singular vectors of the stacked factors without those below 1e-6 of the strongest,
so that the result depends on how an update is split into B_i and A_i where the inner method depends
on the basis (`tsvm` and `svd` do not, `ties` does). Where singular values are equal the basis is
not determined. The inner method works on R x R matrices: `tsvm` by default. Cost: two reads of the
factors, 4 R^2 (m + n) flops, four eigenproblems of R x R, and the inner method. Returns the exact
result, of rank R at most. Source: arXiv 2509.17786.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...options import option
from ..base import Settings
from . import shared_basis

__all__ = ["METHOD"]


@dataclass(frozen=True)
class CoreOptions:
    inner: str = option("tsvm", "the method that merges the updates in their shared basis")


def spectra(
    b: Tensor, a: Tensor, ranks: tuple[int, ...], options: CoreOptions, settings: Settings
) -> tuple[Tensor, Tensor]:
    return b.mT @ b, a.mT @ a


METHOD = shared_basis.method(
    "core",
    "another method on the updates in one R x R space",
    CoreOptions,
    spectra,
    cost="R x R, and the inner method there",
    source="arXiv 2509.17786",
    needs="an inner method",
)
