"""Changes of parameters that are no product of thin factors: biases, norms, rows of an embedding,
whole weights.

They are linear in the parameters. A merge that is a sum takes them along as

    λ Σ w_i d_i

in float64, rounded once, whether the updates are cut or not; any other refuses them. A reader puts
the change of a parameter into `Adapter.differences`, under the parameter's name and in its shape,
as a tensor that is read on demand (`Scaled` puts a factor before one); a format whose `Holds` has
`changes` writes `Target.changes.tensors(dtype)`. Of an embedding of which only some rows were
trained, these rows are in `Adapter.token_rows`: they are a change once the parameter before
training is at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import AdapterError, DomergeError, some
from ..storage.lazy import LazyTensor, dtype_name
from .adapter import Adapter, TokenRows

__all__ = [
    "NO_CHANGES",
    "Changes",
    "Origin",
    "Scaled",
    "Sum",
    "TokenSum",
    "check_none",
    "owner_of",
    "summed",
]

T = TypeVar("T")
Coefficients = Callable[[str, Adapter], Sequence[float]]
"""(parameter, an adapter that changes it) -> λ w_i of all adapters; raises where the merge is no
sum."""
Origin = Callable[[str], LazyTensor | None]
"""What a parameter was before training; None where that is not at hand."""

_NOISE = 1e-12
_SUM = "merge it by 'linear' to files, or leave it out"


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """A stored tensor times a factor, in float64."""

    tensor: LazyTensor
    factor: float

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        return self.tensor.read().double() * self.factor

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor.rows(start, stop).double() * self.factor


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """Σ c_i d_i of a parameter, computed piece by piece whenever it is read."""

    name: str
    terms: tuple[tuple[float, LazyTensor], ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0][1].shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        return self._of([x.read() for _, x in self.terms])

    def rows(self, start: int, stop: int) -> Tensor:
        return self._of([x.rows(start, stop) for _, x in self.terms])

    def times(self, factor: float) -> Sum:
        return replace(self, terms=tuple((factor * c, x) for c, x in self.terms))

    def _of(self, tensors: Sequence[Tensor]) -> Tensor:
        parts = [c * x.cpu().double() for (c, _), x in zip(self.terms, tensors)]
        return _rounded(self.name, sum(parts[1:], parts[0]), self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class TokenSum:
    """The change of a parameter [V, d] of which adapters have trained rows: in row t

        (1 - Σ c_i) W0 + Σ c_i W_i - W0

    over the adapters that have trained it. origin: W0; None where the first term is nothing in
    all rows, and only the rows as they become are known.
    """

    name: str
    terms: tuple[tuple[float, TokenRows], ...]
    origin: LazyTensor | None
    dtype: torch.dtype

    @property
    def at(self) -> tuple[int, ...]:
        """The rows that change, in order."""
        return tuple(sorted({t for _, rows in self.terms for t in rows.at}))

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.origin
        return self.origin.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        assert self.origin
        found = torch.zeros(stop - start, *self.shape[1:], dtype=self.dtype)
        at = [t for t in self.at if start <= t < stop]
        for t, row in zip(at, self._trained(at)):
            change = row - self.origin.rows(t, t + 1)[0].cpu().double()
            found[t - start] = _rounded(self.name, change, self.dtype)
        return found

    def trained(self) -> Tensor:
        """Rows `at` as they become."""
        return _rounded(self.name, torch.stack(list(self._trained(self.at))), self.dtype)

    def _trained(self, at: Sequence[int]) -> Iterator[Tensor]:
        """Rows as they become, in float64."""
        places = [{t: i for i, t in enumerate(x.at)} for _, x in self.terms] if at else []
        shares = self.shares_of_origin() if at else {}
        for t in at:
            having = [(c, x.rows, i[t]) for (c, x), i in zip(self.terms, places) if t in i]
            rows = [(c, rows.rows(i, i + 1)[0]) for c, rows, i in having]
            if t in shares:
                assert self.origin
                rows.append((shares[t], self.origin.rows(t, t + 1)[0]))
            parts = [c * row.cpu().double() for c, row in rows]
            yield sum(parts[1:], parts[0])

    def shares_of_origin(self) -> dict[int, float]:
        """1 - Σ c_i of the rows where it is not zero."""
        found: dict[int, list[float]] = {}
        for c, x in self.terms:
            for t in x.at:
                found.setdefault(t, []).append(c)
        shares = {t: 1 - math.fsum(found[t]) for t in found}
        return {t: share for t, share in shares.items() if abs(share) > _NOISE}


@dataclass(frozen=True)
class Changes:
    """What a merge does to parameters beside ΔW = B A, by name. Of tokens: rows of embeddings."""

    differences: Mapping[str, Sum] = field(default_factory=dict)
    tokens: Mapping[str, TokenSum] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return sorted({*self.differences, *self.tokens})

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of them."""
        if not self.names:
            return ()
        return (f"added up beside the updates, as no products of factors: {some(self.names)}",)

    def tensors(self, dtype: torch.dtype) -> dict[str, LazyTensor]:
        """All as changes of whole parameters, in a dtype."""
        found: dict[str, Sum | TokenSum] = {**self.differences, **self.tokens}
        return {name: replace(found[name], dtype=dtype) for name in self.names}


NO_CHANGES = Changes()


def owner_of(parameter: str) -> str:
    """The module that has a parameter."""
    return parameter.rpartition(".")[0]


def summed(
    adapters: Sequence[Adapter],
    coefficients: Coefficients,
    origin: Origin,
    whole: bool,
    dtype: torch.dtype,
) -> Changes:
    """λ Σ w_i d_i of all parameters that adapters change so. whole: whether changes of rows are
    written as changes of their parameter. AdapterError for what does not fit together."""
    differences: dict[str, Sum] = {}
    for name, changing in _having(adapters, lambda a: a.differences, coefficients).items():
        _check_alike(name, [(a, x.shape) for a, _, x in changing])
        differences[name] = Sum(name, tuple((c, x) for _, c, x in changing), dtype)
    tokens: dict[str, TokenSum] = {}
    for name, training in _having(adapters, lambda a: a.token_rows, coefficients).items():
        first = training[0][0]
        _check_alike(name, [(a, x.rows.shape[1:]) for a, _, x in training])
        tokens[name] = TokenSum(name, tuple((c, x) for _, c, x in training), origin(name), dtype)
        _check_origin(tokens[name], first, whole)
        if name in differences:
            problem = f"changes rows of {name!r}, and another one all of it"
            raise AdapterError(first.name, None, problem, "leave one of them out")
    return Changes(differences, tokens)


def check_none(adapter: Adapter, where: str) -> None:
    """AdapterError for an adapter with changes, where they have no place."""
    if adapter.changed:
        problem = f"changes {some(adapter.changed)} by no product of factors, which {where} "
        raise AdapterError(adapter.name, None, f"{problem}cannot take", _SUM)


def _having(
    adapters: Sequence[Adapter],
    of: Callable[[Adapter], Mapping[str, T]],
    coefficients: Coefficients,
) -> dict[str, list[tuple[Adapter, float, T]]]:
    """By parameter the adapters that change it, with λ w_i, but for those of weight zero."""
    found: dict[str, list[tuple[Adapter, float, T]]] = {}
    for name in sorted({name for adapter in adapters for name in of(adapter)}):
        owner = next(adapter for adapter in adapters if name in of(adapter))
        pairs = zip(adapters, coefficients(name, owner))
        if having := [(a, c, of(a)[name]) for a, c in pairs if c and name in of(a)]:
            found[name] = having
    return found


def _check_alike(name: str, shapes: Sequence[tuple[Adapter, tuple[int, ...]]]) -> None:
    first, expected = shapes[0]
    for adapter, shape in shapes[1:]:
        if shape != expected:
            problem = f"changes {name!r} by {list(shape)}, adapter {first.name!r} by "
            problem += f"{list(expected)}"
            raise AdapterError(adapter.name, None, problem, "merge adapters of one base model")


def _check_origin(made: TokenSum, adapter: Adapter, whole: bool) -> None:
    origin, width = made.origin, made.terms[0][1].rows.shape[1:]
    if origin is None:
        if whole or made.shares_of_origin():
            problem = f"trains rows of {made.name!r}, whose values before training are needed"
            raise AdapterError(adapter.name, None, problem, "give the base model (base, --base)")
    elif not origin.dtype.is_floating_point or origin.dtype.itemsize < 2:
        problem = f"trains rows of {made.name!r}, which the base has as {dtype_name(origin.dtype)}"
        remedy = "give the base in float32, float16 or bfloat16"
        raise AdapterError(adapter.name, None, problem, remedy)
    elif origin.shape[1:] != width or made.at[-1] >= origin.shape[0]:
        problem = f"trains rows up to {made.at[-1]} of {list(width)} of {made.name!r}, which is "
        problem += f"{list(origin.shape)} in the base model"
        remedy = "give the base it was trained on, resized as it was then"
        raise AdapterError(adapter.name, None, problem, remedy)


def _rounded(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    found = x.to(dtype)
    if not torch.isfinite(found).all():
        problem = f"{name!r}: the merged change is not finite in {dtype_name(dtype)}"
        raise DomergeError(f"{problem}; check the adapters' values, or merge with a smaller scale")
    return found
