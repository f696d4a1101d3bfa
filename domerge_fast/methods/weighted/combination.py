"""Methods whose result is sum_i c_i τ_i: the coefficients come from the updates' inner products.

    <τ_i, τ_j> = s_i s_j tr[(B_i^T B_j) (A_j A_i^T)]

is the sum of G_B o G_A over block (i, j), so no update is formed. The result is exact, of rank R.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...adapters.plan import Stack
from ...algebra.host import gather
from ...errors import OptionError
from ..base import wide_grams
from ..contract import Batch, Needs
from ..spectral.space import NOISE

__all__ = ["NEEDS", "inner_products", "of_grams", "of_stacks", "shares_of"]

NEEDS = Needs(torch.float64, host=True)


def inner_products(grams: Batch) -> Tensor:
    """<τ_i, τ_j> of the τ_i = s_i B_i A_i of every module, [P, T, T] in float64.

    An update that is rounding noise of its parts of rank 1 is zero.
    """
    return of_grams(grams.a, grams.b, grams.ranks)


def of_stacks(stacks: Sequence[Stack], backend: str) -> list[Tensor]:
    """`inner_products` of stacks, in the host's memory."""
    pairs = zip(*wide_grams(stacks, backend, bare=False), stacks)
    return gather([of_grams(a, b, s.a.ranks) for a, b, s in pairs])


def shares_of(names: Sequence[str], weights: Tensor) -> Tensor:
    """w_i / sum w of the adapters that have a module, for weights [.., P, T] of modules by name,
    through which gradients go; OptionError where a sum is zero."""
    total = weights.sum(-1, keepdim=True)
    gone = total.abs() <= NOISE * weights.abs().sum(-1, keepdim=True)
    if bool(gone.any()):
        name = names[int(gone.flatten().nonzero()[0]) % len(names)]
        problem = f"those of the adapters that have module {name!r} add up to zero"
        raise OptionError("weights", problem, "give others: each adapter gets its share of the sum")
    return weights / total


def of_grams(gram_a: Tensor, gram_b: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """<τ_i, τ_j> [..., T, T] from A A^T and B^T B [..., R, R], scalings in the latter; 0 where a
    τ_i is noise."""
    rows = torch.stack([block.sum(-2) for block in (gram_a * gram_b).split(ranks, -2)], -2)
    found = torch.stack([block.sum(-1) for block in rows.split(ranks, -1)], -1)
    own = gram_a.diagonal(dim1=-2, dim2=-1) * gram_b.diagonal(dim1=-2, dim2=-1)
    parts = own.clamp_min(0).sqrt().split(ranks, -1)
    size = torch.stack([part.sum(-1) for part in parts], -1)
    present = found.diagonal(dim1=-2, dim2=-1) > (NOISE * size) ** 2
    return found * present[..., None, :] * present[..., None]
