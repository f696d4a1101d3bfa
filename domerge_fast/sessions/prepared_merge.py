"""One merge of what was prepared: factors by module, made when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra import powers
from ..algebra.full_precision import full_precision
from ..errors import OptionError
from ..merged import Merged
from ..options import suggest
from .kinds.alike import Found
from .part import Bases
from .replays import Replayed

__all__ = ["Made", "PreparedMerge"]


@dataclass(frozen=True, eq=False)
class PreparedMerge(Mapping[str, tuple[Tensor, Tensor]]):
    """By module, A [k, n] and B [m, k] with ΔW = B A, through which gradients reach the
    coefficients. dtype: of these; products are float32, or float64 where that is asked for.
    replayed: what makes all modules at once, if they are not made one by one. DomergeError for a
    module that the dtype does not hold."""

    bases: Mapping[str, Bases]
    found: Mapping[str, Found]
    dtype: torch.dtype
    replayed: Replayed | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The modules, in order."""
        return tuple(self.bases)

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        if name not in self.bases:
            raise KeyError(name)
        if self.replayed:
            a, bt, finite = self.replayed.of(name)
        else:
            a, bt = self.wide(name)
        if self.dtype.itemsize < 4 and not (a.requires_grad or bt.requires_grad):
            return powers.fitted(name, a.float(), bt.float().mT, (0, 0), self.dtype)
        if not self.replayed:
            a, bt = a.to(self.dtype), bt.to(self.dtype)
            finite = bool(a.detach().isfinite().all() & bt.detach().isfinite().all())
        if not finite:
            raise powers.refusal(name, self.dtype, "large")
        return a, bt.mT

    def __iter__(self) -> Iterator[str]:
        return iter(self.bases)

    def __len__(self) -> int:
        return len(self.bases)

    def wide(self, name: str) -> Bases:
        """A [k, n] and B^T [k, m] before they are rounded."""
        a, bt = self.bases[name]
        wide = torch.float64 if self.dtype == torch.float64 else full_precision(a.device)
        return self.found[name].factors(a.to(wide), bt.to(wide))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The same as [name], with an OptionError for an unknown name."""
        if name not in self.bases:
            raise OptionError("name", f"no module is called {name!r}", suggest(name, self.names))
        return self[name]

    def delta(self, name: str) -> Tensor:
        """ΔW = B A [m, n] in float32, or in float64 where that is the dtype."""
        a, b = self.factors(name)
        return b @ a if self.dtype == torch.float64 else powers.product(name, a, b)


@dataclass(frozen=True, eq=False)
class Made(Mapping[str, tuple[Tensor, Tensor]]):
    """The same of a merge that was made anew; modules whose coefficients are all zero have no
    update in it."""

    merged: Merged | None
    shapes: Mapping[str, tuple[int, int]]

    @property
    def names(self) -> tuple[str, ...]:
        """The modules, in order."""
        return tuple(self.shapes)

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        m, n = self.shapes[name]
        if self.merged is None or name not in self.merged.results:
            return torch.zeros(1, n), torch.zeros(m, 1)
        result = self.merged.results[name]
        if len(result) == 1:
            problem = f"the merge of {name!r} is no product of thin factors"
            raise OptionError("name", problem, "take its delta, or save the merge with a rank")
        return result[0], result[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The same as [name], with an OptionError for an unknown name."""
        if name not in self.shapes:
            raise OptionError("name", f"no module is called {name!r}", suggest(name, self.names))
        return self[name]

    def delta(self, name: str) -> Tensor:
        """ΔW [m, n] in float32."""
        if name in self.shapes and (self.merged is None or name not in self.merged.results):
            return torch.zeros(self.shapes[name])
        assert self.merged
        return self.merged.delta(name)
