"""Methods inside methods, steps around them, and what a merge of them writes, in float64."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from shapes import CASES, Case, random_case
from test_factor_space import adapters, distance, orth, product, spectrum
from torch import Tensor

import domerge_fast as dm
from domerge_fast import plan
from domerge_fast.adapters import from_tensors
from domerge_fast.backends import reference, registry
from domerge_fast.backends.entries import uniform
from domerge_fast.entries import Draw
from domerge_fast.methods.space import SUPPORT

AVAILABLE = [name for name, status in registry.backends().items() if status.available]
ELEMENTWISE = [
    name for name in AVAILABLE if hasattr(registry.load(name), "entry_merge")
]
GROUP = ("odd d", "d below R", "duplicated")  # of three adapters each
WEIGHTS = [1.0, -0.5, 2.0]
FEW = {"steps": 3, "tol": 0.0}
"""So few that rounding has no say in where the descent stops."""

Merge = Callable[..., Tensor]

every_backend = pytest.mark.parametrize("backend", AVAILABLE)
every_case = pytest.mark.parametrize("name", CASES)


def total(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum(0)


# Inner methods, dense: of values v_i with weights


def linear(values: Sequence[Tensor], weights: Sequence[float], **given: Any) -> Tensor:
    return total([w * v for w, v in zip(weights, values, strict=True)])


def ties(
    values: Sequence[Tensor],
    weights: Sequence[float],
    least: Sequence[float] | None = None,
    density: float = 0.2,
    **given: Any,
) -> Tensor:
    """PEFT's. least: the smallest size that is kept, where it is not each tensor's own."""
    least = [smallest_kept([v], density) for v in values] if least is None else least
    kept = [torch.where(v.abs() >= low, v, 0.0) for v, low in zip(values, least, strict=True)]
    sign = torch.where(total(kept) >= 0, 1.0, -1.0)
    agreeing = [v.sign() == sign for v in kept]
    merged = total([w * v * yes for w, v, yes in zip(weights, kept, agreeing, strict=True)])
    return merged / total([yes.double() for yes in agreeing]).clamp_min(1)


def smallest_kept(values: Sequence[Tensor], density: float) -> float:
    sizes = torch.cat([v.abs().flatten() for v in values])
    count = int(density * len(sizes))
    return float(sizes.sort().values[-count]) if count else math.inf


def dare(
    values: Sequence[Tensor],
    weights: Sequence[float],
    module: str = "x",
    density: float = 0.5,
    seed: int = 0,
    **given: Any,
) -> Tensor:
    draw = Draw(seed, zlib.crc32(module.encode()), tuple(range(len(values))))
    merged = torch.zeros_like(values[0])
    for i, (w, v) in enumerate(zip(weights, values, strict=True)):
        numbers = uniform(draw, i, slice(0, len(v)), v.shape[1], v.device)
        merged += w * v / density * (numbers < density)
    return merged


def tsvm(values: Sequence[Tensor], weights: Sequence[float], **given: Any) -> Tensor:
    weighted = [w * v for w, v in zip(weights, values, strict=True)]
    u, s, vh = zip(*(spectrum(v, v.norm()) for v in weighted), strict=True)
    return orth(torch.cat(u, 1)) @ torch.cat(s).diag() @ orth(torch.cat(vh).T).T


def opcm(values: Sequence[Tensor], weights: Sequence[float], alpha: float = 0.5, **given) -> Tensor:
    weighted = [w * v for w, v in zip(weights, values, strict=True)]
    merged = weighted[0]
    for update in weighted[1:]:
        u, s, vh = spectrum(merged, merged.norm())
        inside = u.T @ update @ vh.T
        leading = s.cumsum(0) <= alpha * s.sum()
        closed = (leading[:, None] & leading) | torch.eye(len(s), dtype=torch.bool)
        merged = merged + update - u @ (inside * closed) @ vh
    norms = [float(v.norm()) for v in weighted]
    return merged * sum(norms) / len(norms) / merged.norm()


INNER: dict[str, Merge] = {"linear": linear, "ties": ties, "dare": dare, "tsvm": tsvm, "opcm": opcm}


# Bases, dense


def left_vectors(x: Tensor) -> Tensor:
    """U [m, K] of x, without singular values that are noise beside the largest."""
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    return u[:, : max(1, int((s > SUPPORT * s[0]).sum()))]


def bases(case: Case, method: str) -> tuple[Tensor, Tensor]:
    """U [m, K_B] and V [n, K_A]."""
    if method == "knots":
        return left_vectors(torch.cat(case.deltas(), 1)), torch.eye(
            case.a[0].shape[1], dtype=torch.float64
        )
    a = torch.cat([a.double() for a in case.a])
    return left_vectors(torch.cat(case.exact_b(), 1)), left_vectors(a.T)


def inside(case: Case, method: str) -> list[Tensor]:
    """Every update in the basis."""
    u, v = bases(case, method)
    return [u.T @ delta @ v for delta in case.deltas()]


def shared(case: Case, method: str, inner: str, weights: Sequence[float], **given: Any) -> Tensor:
    u, v = bases(case, method)
    return u @ INNER[inner](inside(case, method), weights, **given) @ v.T


# knots and core

ROTATED = ("linear", "tsvm", "opcm")
"""These do not depend on the basis."""


def usable(inner: str) -> list[str]:
    return AVAILABLE if inner in (*ROTATED, "do", "svd") else ELEMENTWISE


RUNS = [(inner, backend) for inner in INNER for backend in usable(inner)]


@pytest.mark.parametrize(("inner", "backend"), RUNS)
@pytest.mark.parametrize("method", ["knots", "core"])
def test_a_method_in_a_shared_basis_is_its_dense_definition(method, inner, backend):
    cases = {name: CASES[name] for name in GROUP} | {"tall": random_case((3, 4, 2), 9, 50)}
    given = {"inner": inner, "weights": WEIGHTS, "scale": -0.3, "backend": backend}
    for name, case in cases.items():
        merged = dm.merge(adapters({name: case}), method, **given)
        expected = -0.3 * shared(case, method, inner, WEIGHTS, module=name)
        assert distance(product(merged, name), expected) < 1e-5, name
