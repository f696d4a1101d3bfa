"""The adapters of a merge: read, brought to the same modules, and checked against each other."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Sequence

from .adapters import Adapter, check_compatible, one_spelling
from .adapters.adapter import called
from .adapters.differences import owner_of
from .adapters.names import PREFIX
from .adapters.one_shape import one_shape
from .adapters.whole import COPY
from .backends import registry
from .errors import OptionError
from .formats import load
from .formats.names.join import joined
from .formats.names.language import parted
from .recipe import check_weights

__all__ = ["Source", "opened", "read", "weights_of", "without"]

Source = str | os.PathLike[str] | Adapter


def read(
    sources: Iterable[Source],
    base_model: str | None,
    weights: Sequence[float] | None = None,
    plain: Callable[[Adapter], Adapter] = lambda adapter: adapter,
) -> tuple[list[Adapter], list[str]]:
    """The adapters, their modules under one name each, and what is to be said of that. plain: makes
    factors of what an adapter has instead."""
    registry.check_environment()
    found = [plain(adapter) for adapter in opened(sources)]
    given = weights_of(weights, len(found)) if found else None
    found, told = joined(found, base_model)
    loaded, notes = one_spelling(found, base_model, given)
    said = [f"{called(k, a)}: {note}" for k, a in enumerate(loaded) for note in a.notes]
    loaded, notes = one_shape(loaded), [*said, *notes]
    loaded, split = parted(loaded)
    check_compatible(loaded, base_model)
    named: dict[str, Adapter] = {}
    for adapter in loaded:
        numbered = (f"{adapter.name} ({k})" for k in itertools.count(2))
        names = itertools.chain([adapter.name], numbered)
        name = next(n for n in names if n not in named)
        named[name] = adapter if name == adapter.name else dataclasses.replace(adapter, name=name)
    return list(named.values()), [*told, *notes, *split]


def opened(sources: Iterable[Source]) -> list[Adapter]:
    """The adapters as they are. OptionError for what is none."""
    if isinstance(sources, (str, os.PathLike, Adapter)):
        raise OptionError("adapters", "is one adapter, not a list", "put it in a list: [adapter]")
    return [_one(source) for source in sources]


def _one(source: Source) -> Adapter:
    if isinstance(source, Adapter):
        return source
    if isinstance(source, (str, os.PathLike)):
        return load(source)
    remedy = "give a folder, from_model(model, name) or from_tensors(factors)"
    raise OptionError("adapters", f"a {type(source).__name__} is not an adapter", remedy)


def weights_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """A weight for each of so many adapters, not all of them 0."""
    checked = check_weights(weights, count)
    if not any(checked):
        raise OptionError("weights", "all are zero", "give at least one adapter a weight")
    return checked


def without(adapters: Sequence[Adapter], left_out: set[str]) -> list[Adapter]:
    """The adapters without these modules; what is left is named one by one in their config."""
    if not left_out:
        return list(adapters)
    return [_less(adapter, left_out) for adapter in adapters]


def _less(adapter: Adapter, left_out: set[str]) -> Adapter:
    modules = {n: m for n, m in adapter.modules.items() if n not in left_out}
    copies = tuple(f"{PREFIX}{name}{COPY}" for name in left_out)
    carried = {k: t for k, t in adapter.carried.items() if not k.startswith(copies)}
    kept = {n: x for n, x in adapter.differences.items() if owner_of(n) not in left_out}
    config = dataclasses.replace(adapter.config, target_modules=None, exclude_modules=None)
    return dataclasses.replace(
        adapter, modules=modules, carried=carried, config=config, differences=kept
    )
