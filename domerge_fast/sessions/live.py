"""A prepared merge on a live model: one frozen LoRA adapter that takes any coefficients.

The bases R and L of every module are the adapter's A and B, of scaling 1. What coefficients make of
them is done to activations by hooks on A,

    z = A (h o x)  ->  g o z, or C z

so that nothing is copied when coefficients change, gradients reach them, and every sample of a
batch may have those of another merge. Or it is written into A and B in place, whose addresses stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .coefficients import Addresses, Kappa
from .densities import Density
from .injecting import Injected
from .kinds.alike import Alike, Found, Inner
from .part import Bases

__all__ = ["Attached", "attached"]


class Merging(Protocol):
    """What is attached of a `Prepared`."""

    @property
    def alike(self) -> Sequence[Alike]: ...

    @property
    def bases(self) -> Mapping[str, Bases]: ...

    @property
    def addresses(self) -> Addresses: ...

    def inner(self, kappa: Tensor, densities: Tensor | None = None) -> list[Inner]: ...

    def shares(self, density: Density) -> Tensor: ...


class _Slot:
    """What a module's hooks do: gains [k], or N of them [N, k]; a core [k, k] or [N, k, k]; columns
    [n] or [N, n]. ids: the candidate of every sample of a batch, where there are N."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.gains: Tensor | None = None
        self.core: Tensor | None = None
        self.columns: Tensor | None = None
        self.ids: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Of a forward of A: its inputs times h."""
        if self.columns is None:
            return None
        x = args[0]
        return (self._times(x, self.columns), *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], z: Tensor) -> Tensor:
        """Of a forward of A: its outputs times g, or C of them; zeros before there are any."""
        if self.gains is not None:
            return self._times(z, self.gains)
        if self.core is None:
            return torch.zeros_like(z)
        core = self.core if self.ids is None else self._of_samples(z, self.core)
        if self.ids is None:
            return (z.to(core.dtype) @ core.mT).to(z.dtype)
        flat = z.to(core.dtype).flatten(1, -2) if z.dim() > 2 else z.to(core.dtype)[:, None]
        return torch.bmm(flat, core.mT).view(z.shape).to(z.dtype)

    def _times(self, x: Tensor, factor: Tensor) -> Tensor:
        if self.ids is not None:
            factor = self._of_samples(x, factor)
            factor = factor.view(len(factor), *[1] * (x.dim() - 2), factor.shape[-1])
        return (x * factor).to(x.dtype)

    def _of_samples(self, x: Tensor, factor: Tensor) -> Tensor:
        """Of every sample the factor of its candidate."""
        count, ids = len(factor), self.ids
        assert ids is not None
        if not len(ids):
            if x.dim() < 2 or x.shape[0] % count:
                raise self._no_samples(x, f"{count} candidates in equal shares")
            return factor.repeat_interleave(x.shape[0] // count, 0)
        if x.dim() < 2 or x.shape[0] != len(ids):
            raise self._no_samples(x, f"the {len(ids)} samples that have ids")
        return factor.index_select(0, ids)

    def _no_samples(self, x: Tensor, wanted: str) -> OptionError:
        problem = f"{self.name!r} was given {list(x.shape)}, which is no batch of {wanted}"
        return OptionError("candidates", problem, "run them one after the other, by set")


_Slots = tuple[Sequence[_Slot], Sequence[tuple[torch.device, torch.dtype]]]
"""Of modules that are alike, and where each is and what its activations are multiplied in."""


@dataclass(eq=False)
class Attached:
    """A prepared merge as an adapter of a model, from `Prepared.attach`; the adapter adds nothing
    before coefficients are set. A context manager that detaches."""

    merging: Merging
    injected: Injected
    slots: Sequence[_Slots]
    in_place: bool
    _many: bool = False

    @property
    def adapter(self) -> str:
        """The adapter's name in the model."""
        return self.injected.adapter

    def set(self, kappa: Kappa, level: str | None = None, density: Density | None = None) -> None:
        """Let the model be merged at coefficients, of any level (`Prepared.expand`), and densities
        (`Prepared.at_density`). Gradients of what it computes reach κ, unless it was attached in
        place. OptionError."""
        self._check_attached()
        expanded = self.merging.addresses.expand_one(kappa, level, "candidates")
        found = self.merging.inner(expanded, self._shares(density, expanded))
        if self.in_place:
            self._write(expanded, found)
        else:
            self._take(found, None)

    def candidates(
        self,
        kappas: Kappa,
        ids: Tensor | Sequence[int] | None = None,
        level: str | None = None,
        density: Density | None = None,
    ) -> None:
        """Let every sample of a batch see a merge of its own, of N at coefficients [N, ..].

        density: as of `set`, for all of them, or [N, modules]. ids: the candidate of every sample,
        [batch]. None: a batch is N equal shares, one after the other. The samples have to be what
        the inputs of all adapted modules have first. OptionError where they are not, when the model
        runs.
        """
        self._check_attached()
        expanded = self.merging.addresses.expand_many(kappas, level)
        if self.in_place:
            problem = "the adapter was attached in place, for one merge at a time"
            raise OptionError("candidates", problem, "attach it with in_place=False")
        given = torch.as_tensor([] if ids is None else ids, dtype=torch.long)
        if ids is not None and not len(given):
            raise OptionError("ids", "there are none", "leave it out for equal shares")
        if len(given) and not 0 <= int(given.min()) <= int(given.max()) < len(expanded):
            problem = f"{given.tolist()[:8]} are not all of {len(expanded)} candidates"
            raise OptionError("ids", problem, f"give numbers from 0 to {len(expanded) - 1}")
        self._take(self.merging.inner(expanded, self._shares(density, expanded)), given)

    def detach(self) -> None:
        """Take the adapter away: the model is what it was. Again: nothing happens."""
        self.injected.undo()

    def __enter__(self) -> Attached:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _check_attached(self) -> None:
        if self.injected.undone:
            raise OptionError("model", "the adapter was detached from it", "attach it again")

    def _shares(self, density: Density | None, kappa: Tensor) -> Tensor | None:
        """Densities that fit coefficients [.., modules, T]."""
        if density is None:
            return None
        found = self.merging.shares(density)
        if found.dim() > 1 and found.shape[:-1] != kappa.shape[:-2]:
            problem = f"is {list(found.shape)}, for coefficients {list(kappa.shape)}"
            raise OptionError("density", problem, "give those of as many merges")
        return found

    def _take(self, found: Sequence[Inner], ids: Tensor | None) -> None:
        """Give every module's hooks what coefficients make of it."""
        many = ids is not None
        for (slots, places), inner in zip(self.slots, found):
            core = None if inner.left is None else _square(inner.core)
            parts = {"gains": inner.gains, "core": core, "columns": inner.columns}
            for part, x in parts.items():
                if x is not None:
                    for slot, row in zip(slots, _rows(x, places, many)):
                        setattr(slot, part, row)
            if many or self._many:
                for slot, (device, _) in zip(slots, places):
                    slot.ids = None if ids is None else ids.to(device)
        self._many = many

    @torch.no_grad()
    def _write(self, kappa: Tensor, found: Sequence[Inner]) -> None:
        """Into A and B."""
        if kappa.requires_grad:
            problem = "no gradient goes through an adapter that was attached in place"
            raise OptionError("kappa", problem, "attach it with in_place=False, or detach kappa")
        for alike, inner in zip(self.merging.alike, found):
            for at, name in enumerate(alike.names):
                bases, into = self.merging.bases[name], self.injected.weights(name)
                Found.of(inner, at).write(*bases, *into)


def _rows(
    x: Tensor, places: Sequence[tuple[torch.device, torch.dtype]], many: bool
) -> Sequence[Tensor]:
    """[P, ..] or [N, P, ..] by module, where each is."""
    first, at = places[0], 1 if many else 0
    if all(place == first for place in places):
        return x.to(*first).unbind(at)
    return [row.to(*place) for row, place in zip(x.unbind(at), places)]


def _square(core: Tensor) -> Tensor:
    """With rows or columns of zeros up to the other side's number."""
    rows, columns = core.shape[-2:]
    more = (0, max(rows - columns, 0), 0, max(columns - rows, 0))
    return core if rows == columns else torch.nn.functional.pad(core, more)


def attached(
    merging: Merging, model: Any, adapter: str, in_place: bool, dtype: torch.dtype | None
) -> Attached:
    """`Prepared.attach`."""
    injected = Injected.into(model, adapter, [*merging.bases], dtype)
    slots = {name: _Slot(name) for name in merging.bases}
    written = {n: "B" if x.kind == "gains" else "A" for x in merging.alike for n in x.names}
    try:
        for name, (a, bt) in merging.bases.items():
            injected.give(name, a, bt, copied=in_place)
            if in_place:
                injected.silence(name, written[name])
            else:
                injected.hook(name, slots[name].before, slots[name].after)
    except BaseException:
        injected.undo()
        raise
    grouped = [
        (
            [slots[name] for name in x.names],
            [(injected.device(name), injected.products(name)) for name in x.names],
        )
        for x in merging.alike
    ]
    return Attached(merging, injected, grouped, in_place)
