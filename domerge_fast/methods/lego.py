"""LoRA-LEGO: the rank-1 parts of all adapters in clusters, one merged rank for each.

    units: rows a_u of A_i with rows b_u of w_i s_i B_i^T, x_u = [a_u, b_u], R of a module
    c clusters of the x_u by k-means, means x_c = [a_c, b_c], ρ_c = mean ||x_u|| / ||x_c||
    ΔW = λ sqrt(r / c) sum_c (ρ_c b_c) (ρ_c a_c)^T,  r the largest rank of the module's adapters

From the paper: units, their clusters and centroids, ρ against means being shorter than what they
are the means of, and a factor on the output against its variance growing with the number of ranks.
We know its abstract and summaries of it; the Euclidean norm in ρ, sqrt(r / c), the weight on b_u,
and the start (k-means++, from the units in descending length, with the same random numbers for
every module, so that neither the order of adapters nor other modules matter) are ours. All
distances come from G_A + G_B.

The result depends on how an update is split into factors, not on the update alone: x_u with -x_u
is one and the same update, but far apart; and of a_u and b_u the longer one decides. `balance`
makes them equally long first. Where there are as many clusters as units, every unit keeps its own;
so one adapter comes back as it is. Units that are equal share a cluster, and clusters that lose all
their units are left out, as is one whose units cancel. Cost: two reads of the factors,
2 R^2 (m + n) flops and 2 c R^2 a step of k-means. Returns the exact result, of rank c at most.
Source: arXiv 2409.16167.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..options import option
from .base import Method
from .contract import Batch, Coefficients, Needs, State
from .entrywise import elementwise
from .spectral.space import SUPPORT

__all__ = ["METHOD"]


@dataclass(frozen=True)
class LegoOptions:
    clusters: int = option(
        0, "ranks of a merged module; 0 for the largest rank of its adapters", low=0
    )
    balance: bool = option(False, "bring both vectors of every unit to one length first")
    seed: int = elementwise.seed()


def coefficients(grams: Batch, state: State, weights: Tensor, options: LegoOptions) -> Coefficients:
    clusters = _most_clusters(grams.ranks, options)
    gain_a, gain_b = _gains(grams, weights, options.balance)
    x = gain_a[:, :, None] * grams.a * gain_a[:, None]
    power_a, power_b = grams.powers  # of B beside A
    units_b = gain_b if options.balance else gain_b * 2.0 ** (power_b - power_a)
    x += units_b[:, :, None] * grams.b * units_b[:, None]
    factor = math.sqrt(max(grams.ranks) / clusters)
    means = centroids(x, clusters, options.seed)
    return Coefficients(a=means * gain_a[:, None], b=factor * means * gain_b[:, None])


def _gains(grams: Batch, given: Tensor, balance: bool) -> tuple[Tensor, Tensor]:
    """What the rows of A_i and of s_i B_i^T are multiplied by in their units, [P, R] each."""
    weights = grams.of_rows(given)
    if not balance:
        return torch.ones_like(weights), weights
    length_a = grams.a.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    length_b = grams.b.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt() * weights.abs()
    present = length_a * length_b > 0
    ratio = torch.where(present, length_b / length_a, 0.0).sqrt()
    return ratio, torch.where(present, weights / ratio, 0.0)


def centroids(gram: Tensor, clusters: int, seed: int) -> Tensor:
    """ρ_c times the means of clusters as combinations of the points, [P, clusters, R], from their
    inner products [P, R, R] in float64. Rows of empty clusters are zero."""
    lengths = gram.diagonal(dim1=1, dim2=2).clamp_min(0)
    order = lengths.argsort(dim=1, descending=True, stable=True)
    across = order[:, None].expand_as(gram)
    ordered = gram.gather(2, across).gather(1, across.mT)
    means = _lloyd(ordered, _start(ordered, clusters, seed), clusters)
    norms = (means @ ordered * means).sum(2).clamp_min(0).sqrt()
    wanted = means @ lengths.gather(1, order).sqrt()[..., None]
    ratio = torch.where(norms > SUPPORT * wanted[..., 0], wanted[..., 0] / norms, 0.0)
    return (ratio[..., None] * means).gather(2, order.argsort(dim=1)[:, None].expand_as(means))


def _start(gram: Tensor, clusters: int, seed: int) -> Tensor:
    """The first labels [P, R], by k-means++: a point is chosen in proportion to the square of its
    distance from those that are."""
    modules, points = gram.shape[:2]
    if clusters == points:
        return torch.arange(points).expand(modules, points)
    draws = torch.rand(
        clusters, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).tolist()
    lengths = gram.diagonal(dim1=1, dim2=2)
    labels = torch.zeros(modules, points, dtype=torch.long)
    nearest = torch.full_like(lengths, math.inf)
    chances = torch.ones_like(lengths)
    for k, draw in enumerate(draws):
        sums = chances.cumsum(1)
        chosen = torch.searchsorted(sums, draw * sums[:, -1:], right=True).clamp_max(points - 1)
        size = lengths + lengths.gather(1, chosen)
        products = gram.gather(2, chosen[..., None].expand(-1, points, 1))[..., 0]
        distance = size - 2 * products
        distance = torch.where(distance > SUPPORT**2 * size, distance, 0.0)
        closer = distance < nearest
        labels, nearest = labels.where(~closer, k), nearest.where(~closer, distance)
        chances = nearest
    return labels


def _lloyd(gram: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """The means of the clusters [P, clusters, R], once no point is closer to another one's."""
    lengths = gram.diagonal(dim1=1, dim2=2)[:, None]
    while True:
        member = torch.nn.functional.one_hot(labels, clusters).mT.double()
        counts = member.sum(2, keepdim=True)
        means = member / counts.clamp_min(1)
        products = means @ gram
        norms = (products * means).sum(2, keepdim=True)
        distance = torch.where(counts > 0, lengths - 2 * products + norms, math.inf)
        least, best = distance.min(1)
        own = distance.gather(1, labels[:, None])[:, 0]
        moves = least < own - SUPPORT**2 * (lengths[:, 0] + own.abs())
        if not moves.any():
            return means
        labels = torch.where(moves, best, labels)


def _most_clusters(ranks: Sequence[int], options: LegoOptions) -> int:
    return min(options.clusters or max(ranks), sum(ranks))


METHOD = Method(
    "lego",
    "LoRA-LEGO: clusters of the adapters' rank-1 parts, one rank each",
    LegoOptions,
    coefficients=coefficients,
    takes=lambda options: Needs(torch.float64, host=True),
    rank=_most_clusters,
    own_scale=True,
    cost="two reads of the factors, 2 R^2 (m + n) flops, k-means on R x R",
    source="arXiv 2409.16167",
)
