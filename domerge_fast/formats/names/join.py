"""Adapters whose files call the same modules by different names, under the one spelling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ...adapters import Adapter, Module
from ...adapters.differences import check_none
from ...adapters.style import MODEL
from ...errors import AdapterError
from .models import MODELS, Model, Piece, Size
from .split import Split, split

__all__ = ["ONE", "agreed", "joined", "models_of"]

ONE = "diffusers"
"""Whose names the one spelling has (`Style.names`)."""

Pieces = dict[str, tuple[Piece, ...]]
Meaning = TypeVar("Meaning")


def joined(
    adapters: Sequence[Adapter], base_model: str | None = None
) -> tuple[list[Adapter], list[str]]:
    """The adapters, under the one spelling and in its modules where their files have names of
    different kinds, and what is to be said of that. AdapterError for a name that is in no table
    where others are in one, and where it is not clear which model they are of."""
    if not _differ(adapters):
        return list(adapters), []
    for adapter in adapters:
        check_none(adapter, "a merge of files that have different names for modules")
    known = models_of(adapters)
    models, pieces = agreed(adapters, known, base_model, lambda model: _names(adapters, model))
    told = tuple(model.name for model in models)
    found = [_respelled(adapter, into, told) for adapter, into in zip(adapters, pieces)]
    note = "the adapters have different names for the same modules: merged in those of diffusers' "
    note += models[0].title + _cut(adapters, found)
    return _of_one_base(found, models[0]), [note]


def _differ(adapters: Sequence[Adapter]) -> bool:
    """Whether adapters have names of different kinds that are known, or of one kind, but different
    ones for the same module: `lora_unet_` comes before those of a model's first code and before
    diffusers'."""
    kinds = {a.style.names for a in adapters if a.style}
    if len(kinds) > 1:
        return any(_known(adapters, model) for model in MODELS.values())
    if kinds <= {MODEL} or all(a.modules.keys() == adapters[0].modules.keys() for a in adapters):
        return False
    return any(_clash(adapters, model) for model in MODELS.values())


def _clash(adapters: Sequence[Adapter], model: Model) -> bool:
    """Whether a model's tables have all modules, and one under several names."""
    if not all(_strange(a, model) is None for a in adapters):
        return False
    names: dict[str, str] = {}
    of_pieces = (
        (p.name, n) for found in _names(adapters, model) for n, ps in found.items() for p in ps
    )
    return any(names.setdefault(piece, name) != name for piece, name in of_pieces)


def _of_one_base(adapters: Sequence[Adapter], model: Model) -> list[Adapter]:
    """Without the base models that files name by their kind alone (`flux1`), where others say which
    it is."""
    told = any(a.config.base_model_name_or_path for a in adapters if _is_peft(a))
    return [_without_base(a) if told and _names_kind(a, model) else a for a in adapters]


def _is_peft(adapter: Adapter) -> bool:
    return adapter.style is not None and adapter.style.format == "peft"


def _names_kind(adapter: Adapter, model: Model) -> bool:
    return not _is_peft(adapter) and model.is_base(adapter.config.base_model_name_or_path or "")


def _without_base(adapter: Adapter) -> Adapter:
    config = dataclasses.replace(adapter.config, base_model_name_or_path=None)
    return dataclasses.replace(adapter, config=config)


def _cut(before: Sequence[Adapter], after: Sequence[Adapter]) -> str:
    """What is said of modules that were split."""
    gone = sum(len(new.modules) > len(old.modules) for old, new in zip(before, after))
    return f", fused ones of {gone} adapter{'s' * (gone > 1)} split" if gone else ""


def _size(module: Module) -> Size:
    """Outputs, and inputs of one place of a convolution."""
    return module.m, module.a_shape[1]


def models_of(adapters: Sequence[Adapter]) -> list[Model]:
    """The models whose tables have all modules of the adapters; AdapterError if there is none."""
    known = [
        model for model in MODELS.values() if all(_strange(a, model) is None for a in adapters)
    ]
    if known:
        return known
    raise _unknown(adapters)


def _strange(adapter: Adapter, model: Model) -> str | None:
    """The first module of an adapter that a model's tables do not have."""
    missing = (n for n, x in adapter.modules.items() if not model.pieces(n, _size(x)))
    return next(missing, None)


def _known(adapters: Sequence[Adapter], model: Model) -> int:
    """How many of the adapters' modules a model's tables have."""
    named = ((n, _size(x)) for a in adapters for n, x in a.modules.items())
    return sum(bool(model.pieces(name, measures)) for name, measures in named)


def _unknown(adapters: Sequence[Adapter]) -> AdapterError:
    """What the tables lack, by the model that they have most modules of."""
    model = max(MODELS.values(), key=lambda model: _known(adapters, model))
    adapter = next(a for a in adapters if _strange(a, model))
    format = adapter.style.format if adapter.style else "of plain tensors"
    problem = "the name is in no table of modules, so that it cannot be told what another format "
    problem += f"than {format!r} calls it (nearest: {model.title})"
    remedy = "merge adapters of one format, or convert them with the tool that made them"
    return AdapterError(adapter.name, _strange(adapter, model), problem, remedy)


def agreed(
    adapters: Sequence[Adapter],
    models: Sequence[Model],
    base_model: str | None,
    meaning: Callable[[Model], Meaning],
) -> tuple[list[Model], Meaning]:
    """Those of several models that mean the same, and what: all of them, or all that the base
    model's name leaves, or else the numbers of layers. AdapterError where they differ."""
    stated = base_model, *(a.config.base_model_name_or_path for a in adapters)
    named = [m for m in models if any(m.is_base(text) for text in stated if text)]
    counted = [m for m in models if m.has_layers_of(_pieces(adapters, m))]
    for some in (models, named, counted):
        meanings = [meaning(model) for model in some]
        if meanings and all(other == meanings[0] for other in meanings):
            return list(some), meanings[0]
    titles = " or ".join(model.title for model in models)
    remedy = f"say base_model=... ({', '.join(m.bases[0] for m in models)})"
    raise AdapterError(adapters[0].name, None, f"may be of {titles}, by its modules", remedy)


def _pieces(adapters: Sequence[Adapter], model: Model) -> list[str]:
    return [p.name for found in _names(adapters, model) for ps in found.values() for p in ps]


def _names(adapters: Sequence[Adapter], model: Model) -> list[Pieces]:
    """What every module of every adapter is in the one spelling."""
    return [{n: model.pieces(n, _size(x)) for n, x in a.modules.items()} for a in adapters]


def _respelled(adapter: Adapter, pieces: Pieces, models: tuple[str, ...]) -> Adapter:
    """The adapter in the modules of the one spelling."""
    if adapter.carried:
        problem = f"saves tensors whole ({next(iter(adapter.carried))!r}), whose names are its own"
        raise AdapterError(adapter.name, None, problem, "merge it with adapters of its format")
    found = dict(_all(adapter, pieces))
    style = adapter.style and dataclasses.replace(adapter.style, names=ONE, models=models)
    return dataclasses.replace(
        adapter,
        config=dataclasses.replace(adapter.config, target_modules=None, exclude_modules=None),
        modules={name: module for name, (module, _) in sorted(found.items())},
        stored={name: pair for name, (_, pair) in found.items()},
        style=style,
    )


def _all(adapter: Adapter, pieces: Pieces) -> Iterator[tuple[str, Split]]:
    owners: dict[str, str] = {}
    for name, module in adapter.modules.items():
        for part, pair in split(module, adapter.stored[name], pieces[name]):
            first = owners.setdefault(part.name, name)
            if first != name:
                problem = f"and {first!r} are both {part.name!r}"
                raise AdapterError(adapter.name, name, problem, "leave one of them out")
            yield part.name, (part, pair)
