"""Methods that take the updates of a module into one basis and let another method merge them there.

    τ_i = U t_i V^T  ->  ΔW = U merge(t_1 .. t_T) V^T

with orthonormal columns in U [m, K_B] and V [n, K_A], or V = I. The t_i are stacks of factors
again, K_B x K_A instead of m x n large, so that the inner method is any method there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...adapters.plan import Stack
from ...algebra.side import Side
from ...errors import FlatCut
from ..base import Based, Chosen, Merge, Method, ScaleRule, Settings, bare_sides
from ..groups import Groups, Here, Through
from ..made import Dense, Factors
from ..running import Run, prepared
from ..spectral import space

__all__ = ["method"]

Spectra = Callable[[Tensor, Tensor, tuple[int, ...], Any, Settings], tuple[Tensor, Tensor | None]]
"""(b [P, R, K_B] with the scalings s_i, a [P, R, K_A], ranks, options, settings) -> symmetric
[P, K_B, K_B] and [P, K_A, K_A] (None: A stays) whose eigenvectors are the bases, in orthonormal
coordinates."""


def method(name: str, summary: str, options: type, spectra: Spectra, **row: Any) -> Method:
    """The row of a method that merges in the bases that `spectra` gives."""

    def basis(stacks: Sequence[Stack], options: Any, settings: Settings) -> list[Based]:
        return _reduce(name, stacks, spectra, options, settings)

    def prepare(groups: Groups[Sequence[Stack]], options: Any, settings: Settings) -> Merge:
        assert settings.inner

        def reduce(stacks: Sequence[Stack]) -> list[Based]:
            return basis(stacks, options, settings)

        based: Groups[Sequence[Stack]] = Through(
            groups, lambda stacks: [x.stack for x in reduce(stacks)]
        )
        inner = prepared(settings.inner, based, settings)
        return lambda stacks, grams_a, grams_b, options, settings: _merge(
            inner, reduce(stacks), stacks, settings
        )

    def merge(
        stacks: Sequence[Stack],
        grams_a: Sequence[Tensor | None],
        grams_b: Sequence[Tensor | None],
        options: Any,
        settings: Settings,
    ) -> list[Factors]:
        """Of a model that consists of these modules."""
        found = prepare(Here([stacks]), options, settings)(
            stacks, grams_a, grams_b, options, settings
        )
        return [x for x in found if isinstance(x, Factors)]

    return Method(
        name,
        summary,
        options,
        merge,
        inner="inner",
        basis=basis,
        prepare=prepare,
        own_scale=None,
        rule=_inner_rule,
        **row,
    )


def _inner_rule(options: Any, inner: Chosen | None) -> ScaleRule:
    """As for the method inside."""
    return inner.rule if inner else ScaleRule()


def _reduce(
    name: str, stacks: Sequence[Stack], spectra: Spectra, options: Any, settings: Settings
) -> list[Based]:
    """name: of the method, for its errors."""
    found: dict[int, Based] = {}
    for members, x, to_a, to_b in space.in_coordinates(stacks, settings.backend):
        gains = torch.tensor([_scalings(stacks[k]) for k in members], dtype=torch.float64)
        b = gains[..., None].to(x.bare) * x.bare
        try:
            energy_b, energy_a = spectra(b, x.a, x.ranks, options, settings)
        except FlatCut as error:
            raise error.of(stacks[members[error.at]].name, name) from None
        turns_b, turns_a = _bases(energy_b), None if energy_a is None else _bases(energy_a)
        for p, k in enumerate(members):
            s = stacks[k]
            small = replace(s, b=_side(b[p] @ turns_b[p], x.ranks))
            basis = None
            if turns_a is not None:
                small = replace(small, a=_side(x.a[p] @ turns_a[p], x.ranks))
                basis = (turns_a[p].T @ to_a[p]).float()
            found[k] = Based(small, basis, (turns_b[p].T @ to_b[p]).float())
    return [found[k] for k in range(len(stacks))]


def _scalings(stack: Stack) -> list[float]:
    return [c for c, rank in zip(stack.b.scales, stack.b.ranks) for _ in range(rank)]


def _side(x: Tensor, ranks: Sequence[int]) -> Side:
    return Side(x.float().contiguous().split_with_sizes(list(ranks)), (1.0,) * len(ranks))


def _bases(energies: Tensor) -> list[Tensor]:
    """Eigenvectors [K, k] of every [K, K], by falling eigenvalue; those of noise left out (one
    stays)."""
    values, vectors = torch.linalg.eigh(energies)
    present = (space.inverse(values) > 0).sum(1).clamp_min(1).tolist()
    return [v[:, -k:].flip(1) for v, k in zip(vectors, present)]


def _merge(
    inner: Run, small: Sequence[Based], stacks: Sequence[Stack], settings: Settings
) -> list[Factors]:
    merged = inner([x.stack for x in small], replace(settings, dtype=torch.float32))
    pairs = [_thin(m) for m in merged]
    coefficients: list[Tensor | None] = [b.T @ x.to_b for x, (_, b) in zip(small, pairs)]
    problems = bare_sides(stacks)
    bare = problems[len(stacks) :]
    turned = [k for k, x in enumerate(small) if x.to_a is not None]
    coefficients += [a @ x.to_a for x, (a, _) in zip(small, pairs) if x.to_a is not None]
    found = ops.apply(
        coefficients,
        [*bare, *(problems[k] for k in turned)],
        settings.dtype,
        backend=settings.backend,
    )
    rows = [a.to(settings.dtype) for a, _ in pairs]
    for k, a in zip(turned, found[len(stacks) :]):
        rows[k] = a
    return [Factors(a, bt.T) for a, bt in zip(rows, found)]


def _thin(merged: Factors | Dense) -> tuple[Tensor, Tensor]:
    """Factors A [k, K_A] and B [K_B, k] of a merge in the basis, k the smaller of both."""
    if isinstance(merged, Factors):
        return merged.a, merged.b
    delta = merged.delta
    count, columns = delta.shape
    identity = torch.eye(min(count, columns)).to(delta)
    return (delta, identity) if count <= columns else (identity, delta)
