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

from .. import ops
from ..adapters.plan import Stack
from ..algebra.host import gather
from ..options import option
from .base import Factors, Method, Settings
from .entrywise import elementwise
from .spectral.space import BATCH_BYTES, SUPPORT


@dataclass(frozen=True)
class LegoOptions:
    clusters: int = option(
        0, "ranks of a merged module; 0 for the largest rank of its adapters", low=0
    )
    balance: bool = option(False, "bring both vectors of every unit to one length first")
    seed: int = elementwise.seed()


def merge(
    stacks: Sequence[Stack],
    grams_a: Sequence[Tensor | None],
    grams_b: Sequence[Tensor | None],
    options: LegoOptions,
    settings: Settings,
) -> list[Factors]:
    count = len(stacks)
    problems = [*(s.a for s in stacks), *(s.b for s in stacks)]
    grams = gather(ops.gram(problems, dtype=torch.float64, backend=settings.backend))
    coefficients: list[Tensor | None] = [None] * len(problems)
    for clusters, members in _alike(stacks, options):
        gram_a = torch.stack([grams[k] for k in members])
        gram_b = torch.stack([grams[count + k] for k in members])
        gain_a, gain_b = _gains([stacks[k] for k in members], gram_a, gram_b, options.balance)
        x = gain_a[:, :, None] * gram_a * gain_a[:, None]
        units_b = gain_b if options.balance else gain_b * _powers([stacks[k] for k in members])
        x += units_b[:, :, None] * gram_b * units_b[:, None]
        means = centroids(x, clusters, options.seed)
        for p, k in enumerate(members):
            factor = settings.scale * math.sqrt(max(stacks[k].a.ranks) / clusters)
            kept = means[p][_present(means[p])]
            device = stacks[k].a.device
            coefficients[k] = (kept * gain_a[p]).float().to(device)
            coefficients[count + k] = (factor * kept * gain_b[p]).float().to(device)
    found = ops.apply(coefficients, problems, settings.dtype, backend=settings.backend)
    return [Factors(a, bt.T) for a, bt in zip(found, found[count:])]


def _alike(stacks: Sequence[Stack], options: LegoOptions) -> list[tuple[int, list[int]]]:
    """Numbers of clusters, and positions of stacks with as many and as many units, in batches."""
    found: dict[tuple[int, int], list[int]] = {}
    for k, s in enumerate(stacks):
        found.setdefault((s.rank, _most_clusters(s.a.ranks, options)), []).append(k)
    batches = []
    for (rank, number), members in found.items():
        most = max(1, BATCH_BYTES // (8 * rank**2))
        batches += [(number, members[at : at + most]) for at in range(0, len(members), most)]
    return batches


def _gains(
    stacks: Sequence[Stack], gram_a: Tensor, gram_b: Tensor, balance: bool
) -> tuple[Tensor, Tensor]:
    """What the rows of A_i and of s_i B_i^T are multiplied by in their units, [P, R] each."""
    weights = torch.tensor(
        [[w for w, r in zip(s.weights, s.a.ranks) for _ in range(r)] for s in stacks],
        dtype=torch.float64,
    )
    if not balance:
        return torch.ones_like(weights), weights
    length_a = gram_a.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    length_b = gram_b.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt() * weights.abs()
    present = length_a * length_b > 0
    ratio = torch.where(present, length_b / length_a, 0.0).sqrt()
    return ratio, torch.where(present, weights / ratio, 0.0)


def _powers(stacks: Sequence[Stack]) -> Tensor:
    """What brings the stacks' B to the size it has beside their A, [P, 1]."""
    found = [[2.0 ** (s.powers[1] - s.powers[0])] for s in stacks]
    return torch.tensor(found, dtype=torch.float64)


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


def _present(means: Tensor) -> Tensor:
    """Which rows [c, R] are not zero; the first one, where all are."""
    present = (means != 0).any(1)
    present[0] |= ~present.any()
    return present


def _most_clusters(ranks: Sequence[int], options: LegoOptions) -> int:
    return min(options.clusters or max(ranks), sum(ranks))


METHOD = Method(
    "lego",
    "LoRA-LEGO: clusters of the adapters' rank-1 parts, one rank each",
    LegoOptions,
    merge,
    rank=_most_clusters,
    own_scale=True,
    cost="two reads of the factors, 2 R^2 (m + n) flops, k-means on R x R",
    source="arXiv 2409.16167",
)
