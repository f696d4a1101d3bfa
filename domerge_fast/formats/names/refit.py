"""A merge's modules as those that another style has: renamed, split, or fused again.

A fused module has the A's of the modules that it is made of one below the other, and their B's in
blocks. Rows of A that are the same in all of them stand once, so that what was split comes back as
it was. Columns of B that are zero in a part are left out of that part. Both are exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...adapters import Adapter
from ...errors import OptionError
from ..target import Layout
from .join import agreed, models_of
from .models import MODELS, Model, Piece, Size

__all__ = ["Part", "Refit", "back", "refit"]

Wanted = dict[str, tuple[tuple[Piece, ...], Layout]]
"""New modules: their pieces, and their layouts with no rank yet."""

Sources = dict[str, tuple[str, Piece]]
"""By a piece's name: the module that has it, and where."""


@dataclass(frozen=True)
class Part:
    """Rows `at` of a new module are rows `of` of a source's B; swapped: with their halves in the
    other order."""

    source: str
    of: tuple[int, int]
    at: tuple[int, int]
    swapped: bool


@dataclass(frozen=True)
class Refit:
    """model: whose names these are. before: the modules of the merge. layouts: of the new modules;
    parts: what each is made of."""

    model: Model = field(compare=False)
    before: Mapping[str, Layout] = field(repr=False)
    layouts: Mapping[str, Layout]
    parts: Mapping[str, tuple[Part, ...]]

    @cached_property
    def _users(self) -> dict[str, list[str]]:
        """The new modules that a module is in."""
        users: dict[str, list[str]] = {}
        for name, parts in self.parts.items():
            for source in dict.fromkeys(part.source for part in parts):
                users.setdefault(source, []).append(name)
        return users

    def sink(self, add: Callable[[str, Tensor, Tensor], None]) -> Callable[..., None]:
        """What takes the modules of the merge one by one, in any order, and adds the new ones as
        soon as all that they are made of is there."""
        waiting: dict[str, tuple[Tensor, Tensor]] = {}
        missing = {name: len({p.source for p in parts}) for name, parts in self.parts.items()}
        uses = {source: len(names) for source, names in self._users.items()}

        def take(name: str, a: Tensor, b: Tensor) -> None:
            waiting[name] = a, b
            for new in self._users[name]:
                missing[new] -= 1
                if not missing[new]:
                    add(new, *self.made(new, waiting))
                    for source in {part.source for part in self.parts[new]}:
                        uses[source] -= 1
                        if not uses[source]:
                            del waiting[source]
            if name in waiting:  # what is given is used again
                waiting[name] = a.clone(), b.clone()

        return take

    @property
    def renames(self) -> bool:
        """Whether all modules are the same but for their names."""
        return len(self.before) == len(self.layouts) == sum(map(len, self.parts.values()))

    def made(self, name: str, have: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A and B of a new module."""
        parts, m = self.parts[name], self.layouts[name].m
        a, b = have[parts[0].source]
        if len(parts) == 1 and parts[0].of == (0, len(b)) == (0, m) and not parts[0].swapped:
            return a, b
        sources = dict.fromkeys(part.source for part in parts)
        a, columns = _stacked([have[source][0] for source in sources])
        places = dict(zip(sources, columns))
        b = a.new_zeros(m, len(a))
        for part in parts:
            rows = have[part.source][1][slice(*part.of)]
            b[slice(*part.at), places[part.source]] = _swapped(rows) if part.swapped else rows
        return _without_zeros(a, b, [part.at[0] for part in parts])


def _stacked(matrices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The rows of the matrices, and where those of each are; a row that is also the first matrix's
    in the same place stands once."""
    first, *others = matrices
    rows, places = [first], [torch.arange(len(first))]
    count = len(first)
    for x in others:
        common = min(len(first), len(x))
        shared = torch.zeros(len(x), dtype=torch.bool)
        shared[:common] = (x[:common] == first[:common]).all(1).cpu()
        place = torch.arange(len(x))
        place[~shared] = torch.arange(count, count + int((~shared).sum()))
        rows.append(x[~shared.to(x.device)])
        places.append(place)
        count += len(rows[-1])
    return torch.cat(rows), places


def _swapped(rows: Tensor) -> Tensor:
    return rows.roll(len(rows) // 2, 0)


def _without_zeros(a: Tensor, b: Tensor, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The factors without the columns of B that are zero, and their rows of A; one stays. heads:
    rows of B, one of each part, which most often tell that there are none."""
    used = b[list(heads)].any(0)
    if used.all() or (used := b.any(0)).all():
        return a, b
    used[0] |= not used.any()
    return a[used], b[:, used]


def refit(
    adapters: Sequence[Adapter],
    layouts: Mapping[str, Layout],
    style: str,
    base_model: str | None = None,
) -> Refit:
    """How a merge of adapters is written with a style's names. AdapterError where no table has its
    modules, and where the models that these may be of have different names for them; OptionError
    where the style has no name for one."""
    told = dict.fromkeys(name for a in adapters if a.style for name in a.style.models)
    models = [MODELS[name] for name in told] or models_of(adapters)
    return agreed(adapters, models, base_model, lambda model: _to_style(layouts, model, style))[1]


def _to_style(layouts: Mapping[str, Layout], model: Model, style: str) -> Refit:
    wanted: Wanted = {}
    made_of: Sources = {}
    for layout in layouts.values():
        for piece in model.pieces(layout.name, _size(layout)):
            first, _ = made_of.setdefault(piece.name, (layout.name, piece))
            if first != layout.name:
                problem = f"modules {first!r} and {layout.name!r} are both {piece.name!r}"
                raise OptionError("format", problem, "leave one of them out by rules (leave_out)")
            name, m = _named(model, piece, layout.inputs[0], style)
            wanted[name] = _as(layout, name, m, model)
    return _made(model, layouts, wanted, made_of)


def back(made: Refit, written: Adapter) -> Refit:
    """From what was written to the modules of the merge."""
    modules = written.modules.items()
    layouts = {n: Layout(n, x.kind, x.m, x.a_shape[1:], x.rank) for n, x in modules}
    made_of = {
        piece.name: (layout.name, piece)
        for layout in layouts.values()
        for piece in made.model.pieces(layout.name, _size(layout))
    }
    wanted = {n: _as(x, n, x.m, made.model) for n, x in made.before.items()}
    return _made(made.model, layouts, wanted, made_of)


def _size(layout: Layout) -> Size:
    return layout.m, layout.inputs[0]


def _named(model: Model, piece: Piece, n: int, style: str) -> tuple[str, int]:
    """What a style calls the module with this piece, and its outputs."""
    try:
        return model.spelled(piece.name, (piece.stop - piece.start, n), style)
    except KeyError as error:
        problem = f"{style!r} has no name for {piece.name!r} of {model.title}"
        raise OptionError("format", problem, "write it in the format 'diffusers'") from error


def _as(layout: Layout, name: str, m: int, model: Model) -> tuple[tuple[Piece, ...], Layout]:
    """The pieces of a module of this name and size, and its layout, with no rank yet."""
    return model.pieces(name, (m, layout.inputs[0])), dataclasses.replace(layout, name=name, m=m)


def _made(model: Model, old: Mapping[str, Layout], wanted: Wanted, made_of: Sources) -> Refit:
    """The new modules of those that have their pieces."""
    parts = {
        name: tuple(_part(piece, *made_of[piece.name]) for piece in pieces if piece.name in made_of)
        for name, (pieces, _) in wanted.items()
    }
    layouts = {}
    for name, (_, layout) in wanted.items():
        rank = sum(old[source].largest_rank for source in {part.source for part in parts[name]})
        layouts[name] = dataclasses.replace(layout, largest_rank=rank)
    return Refit(model, old, layouts, parts)


def _part(at: Piece, source: str, of: Piece) -> Part:
    return Part(source, (of.start, of.stop), (at.start, at.stop), of.swapped != at.swapped)
