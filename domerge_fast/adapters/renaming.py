"""An adapter under other names."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

from ..errors import AdapterError
from .adapter import Adapter, without_paths
from .names import PREFIX
from .stems import joined, split
from .whole import parameter

__all__ = ["ONE_CLASS", "with_names"]

ONE_CLASS = "load both with one class of the model and save them again"
"""What to do where names do not fit together."""


def with_names(adapter: Adapter, stems: Mapping[str, str]) -> Adapter:
    """An adapter whose modules, and all else of it, have other stems. stems: the new ones, by those
    that it has. AdapterError where two modules come to have one name."""

    def name_of(name: str) -> str:
        stem, rest = split(name)
        return joined(stems[stem], rest)

    new = {name: name_of(name) for name in adapter.modules}
    if len(set(new.values())) < len(new):
        name = next(name for name, count in Counter(new.values()).items() if count > 1)
        one, other = (old for old, renamed in new.items() if renamed == name)
        problem = f"has both {one!r} and {other!r}, which are {name!r} in the other adapters"
        raise AdapterError(adapter.name, None, problem, ONE_CLASS)
    modules = {new[n]: dataclasses.replace(m, name=new[n]) for n, m in adapter.modules.items()}
    whole = {key: PREFIX + name_of(key.removeprefix(PREFIX)) for key in adapter.carried}
    paths = {parameter(key): parameter(renamed) for key, renamed in whole.items()}
    paths |= {name: name_of(name) for name in adapter.token_rows}
    saved = [_saved_as(name, paths) for name in adapter.config.modules_to_save or ()]
    config = dataclasses.replace(without_paths(adapter.config), modules_to_save=saved or None)
    return dataclasses.replace(
        adapter,
        config=config,
        modules=dict(sorted(modules.items(), key=lambda item: item[1].place)),
        stored={new[name]: pair for name, pair in adapter.stored.items()},
        carried={whole[key]: tensor for key, tensor in adapter.carried.items()},
        originals={paths[path]: tensor for path, tensor in adapter.originals.items()},
        magnitudes={new[name]: x for name, x in adapter.magnitudes.items()},
        differences={name_of(name): x for name, x in adapter.differences.items()},
        token_rows={name_of(name): x for name, x in adapter.token_rows.items()},
    )


def _saved_as(module: str, paths: Mapping[str, str]) -> str:
    """What a module that the config names as saved whole is called now."""
    owners = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in paths.items()}
    return owners.get(module, module)
