"""Which format a merge is written in, and whether it can hold the merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from .. import options
from ..adapters import Adapter, Module
from ..adapters.differences import check_none, owner_of
from ..errors import OptionError
from ..recipe import Recipe
from . import FORMATS
from .format import FORMS, Format
from .names.models import STYLES
from .names.refit import Refit, refit
from .peft.write import PEFT, WHERE, exactly
from .target import Layout, Target

__all__ = ["asked_for", "check_holds", "is_ragged", "of_adapters", "respelled"]


def asked_for(recipe: Recipe) -> Format:
    """The format that a recipe names, or the first of its form: PEFT's, which `of_adapters` may
    replace. OptionError for one that is unknown, is only read, or is of another form."""
    options.choose("form", recipe.form, FORMS)
    if recipe.format is None:
        return next(x for x in FORMATS.values() if x.write and x.form == recipe.form)
    row = FORMATS.choose("format", recipe.format)
    if row.write is None:
        others = ", ".join(name for name, x in FORMATS.items() if x.write)
        raise OptionError("format", f"{row.name!r} is only read", f"use one of: {others}")
    if row.form != recipe.form:
        problem = f"{row.name!r} is of the form {row.form!r}, not {recipe.form!r}"
        raise OptionError("format", problem, f"say form={row.form!r}")
    return row


def of_adapters(recipe: Recipe, adapters: Sequence[Adapter]) -> tuple[Format, tuple[str, ...]]:
    """The format that a merge of these is written in, and what is to be said of it: theirs, where
    all that have one have the same and none is asked for. OptionError as `asked_for`, and where
    their modules have other names than those it is written with."""
    row, notes = asked_for(recipe), tuple[str, ...]()
    formats = dict.fromkeys(a.style.format for a in adapters if a.style)
    if recipe.form == PEFT.form and recipe.format is None and formats:
        row, notes = _own([FORMATS[name] for name in formats])
    strange = next((a.style for a in adapters if a.style and a.style.names != row.names), None)
    if strange and not (row.form == PEFT.form and row.names in STYLES):
        problem = f"{row.name!r} is not written with the names of modules that {strange.format!r}"
        remedy = "leave it out" if recipe.format else "say another form or format"
        raise OptionError("format", f"{problem} has", remedy)
    return row, notes


def _own(rows: Sequence[Format]) -> tuple[Format, tuple[str, ...]]:
    """The adapters' own format, the first of several with names of their own, or PEFT's, and
    why."""
    if len(rows) == 1 and rows[0].write:
        return rows[0], ()
    names = " and ".join(repr(row.name) for row in rows)
    why = "is only read" if len(rows) == 1 else "are the adapters' formats"
    several = len({row.names for row in rows}) > 1
    chosen = next((x for x in rows if several and x.write and x.names in STYLES), PEFT)
    return chosen, (f"{names} {why}: written in {chosen.name!r}; --format names another",)


def respelled(
    row: Format, adapters: Sequence[Adapter], target: Target, base_model: str | None
) -> tuple[Target, Refit | None, tuple[str, ...]]:
    """What a merge is written as in the names and modules of a format; how it comes to them, None
    where it has them; and what is to be said of that."""
    if all(a.style is None or a.style.names == row.names for a in adapters):
        return target, None, ()
    for adapter in adapters if target.changes.names else ():
        check_none(adapter, f"{row.name!r}, with other names of modules,")
    made = refit(adapters, target.layouts, row.names, base_model)
    where = dict.fromkeys(WHERE) | {"target_modules": exactly([*made.layouts])}
    config = {**target.config, **where}
    new = dataclasses.replace(target, layouts=made.layouts, config=config)
    return new, made, tuple(_told(row, made, target, new))


def _told(row: Format, made: Refit, merged: Target, written: Target) -> Iterator[str]:
    """What is to be said of modules that are written as others."""
    if not made.renames:
        yield f"written in the modules of {row.name!r}: some are split or fused, which is exact"
    if merged.rank and written.rank and written.rank > merged.rank:
        note = f"modules fused of others have rank {written.rank} at most, to which all are padded"
        yield f"{note}; --ragged writes own ranks"


def is_ragged(recipe: Recipe, row: Format) -> bool:
    """Whether every module is written with its own rank. OptionError where a format cannot."""
    if recipe.ragged and recipe.energy is None and not row.holds.ranks:
        problem = f"{row.name!r} has {'no ranks' if row.dense else 'one rank for all modules'}"
        raise OptionError("ragged", problem, "leave it out")
    return row.holds.alphas or (recipe.ragged and row.holds.ranks)


def check_holds(row: Format, target: Target) -> None:
    """OptionError where a merge has what the format cannot hold."""
    held, modules = row.holds, target.modules
    kinds: tuple[tuple[bool, Callable[[Layout | Module], bool], str], ...] = (
        (held.embeddings, lambda x: x.kind == "embedding", "embeddings"),
        (held.convolutions, lambda x: x.kind not in ("embedding", "linear"), "convolutions"),
        (held.experts, lambda x: bool(x.slice), "parameters without a layer of their own"),
    )
    for can, is_such, what in kinds:
        found = None if can else next((n for n, x in modules.items() if is_such(x)), None)
        _check(row, can, found, what, "rules with leave_out drop them")
    carried = next(iter(target.carried), None)
    _check(row, held.whole, carried, "tensors saved whole", "whole='drop' leaves them out")
    other = next(_not_held(row, target), None) if target.changes.names else None
    _check(row, False, other, "such changes of parameters", "merge into the base (form model)")


def _not_held(row: Format, target: Target) -> Iterator[str]:
    """The parameters whose change, which is no product of factors, has no place."""
    layouts, held = target.layouts, row.holds
    numbered = {layout.parameter for layout in layouts.values() if layout.is_numbered}
    adapted = {layout.parameter for layout in layouts.values()}
    biased = {n for n, x in layouts.items() if x.kind != "embedding" and not x.slice}
    for name in target.changes.names:
        is_bias = name.endswith(".bias") and owner_of(name) in biased
        has_place = held.rows if name in target.changes.tokens else held.biases and is_bias
        if name in (numbered if held.changes else adapted) or not (held.changes or has_place):
            yield name


def _check(row: Format, can: bool, found: str | None, what: str, remedy: str) -> None:
    if found and not can:
        problem = f"{row.name!r} holds no {what}, as {found!r} is"
        raise OptionError("format", problem, f"say another, or: {remedy}")
