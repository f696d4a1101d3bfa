"""What was prepared, as a session on disk (disk.py). Other processes open it without the adapters,
which are only needed to save merges.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapters import Adapter
from ..errors import OptionError
from ..job import versions
from ..methods import choose
from ..methods.base import Chosen
from ..recipe import Recipe, all_options
from ..results.report import Interference
from ..storage.folder import whole_output
from ..storage.stream import SafetensorsWriter
from . import disk
from .kinds.alike import Alike
from .kinds.gains import Arcs, Calibrated, Rows, Shares
from .kinds.joint import Joint
from .kinds.rotated import Cores, Given, Inside
from .kinds.scaled import Columns, Unit
from .part import Bases
from .sources import listed, loaded

__all__ = ["Kept", "Sources", "opened", "written"]

PREPARED = disk.Kind(
    "prepared",
    "prepared merge",
    "check the path",
    "prepare again",
    "prepared.json",
)
CLASSES: dict[str, type[Alike]] = {
    x.__name__: x
    for x in (Arcs, Calibrated, Rows, Shares, Joint, Cores, Given, Inside, Columns, Unit)
}
BASES = "bases."

Sources = Callable[[], Sequence[Adapter]]
"""The adapters, which are read when they are wanted."""


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """The fields of a `Prepared`. method: what the recipe asks for, or took. places: where the
    adapters were read from, None for those in memory. densities: of every module, where they are
    not those of the method's options."""

    recipe: Recipe
    method: Chosen
    sources: Sources
    places: tuple[str | None, ...]
    adapters: tuple[str, ...]
    owners: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, int]]
    alike: tuple[Alike, ...]
    bases: Mapping[str, Bases]
    norms: Mapping[str, Sequence[float]]
    ranks: Mapping[str, int]
    interference: Interference | None
    scale: float
    scales: Mapping[int, float]
    remarks: tuple[str, ...] = ()
    densities: tuple[float, ...] | None = None


def written(kept: Kept, folder: Path, overwrite: bool, force: bool) -> None:
    """OutputError where it cannot be. OptionError for what is made anew with every merge."""
    if not kept.alike:
        problem = f"merges by {kept.recipe.method!r} are made anew from the adapters"
        raise OptionError("method", problem, "prepare it again where it is wanted")
    tensors = _tensors(kept)
    with whole_output(folder, disk.replacing(overwrite, force)) as fresh:
        shapes = {key: (x.dtype, x.shape) for key, x in tensors.items()}
        with SafetensorsWriter(fresh / disk.TENSORS, shapes) as writer:
            for key, x in tensors.items():
                writer.add(key, x)
        disk.seal(PREPARED, fresh, _plain(kept))


def opened(folder: Path, device: torch.device) -> Kept:
    """OptionError unless it is what was written. device: where its bases go."""
    refuse = disk.refusing(folder)
    plain = disk.read(PREPARED, folder)
    file = disk.tensors(PREPARED, folder, refuse)
    tensors = {
        key: x.read().to(device if key.startswith(BASES) else "cpu")
        for key, x in file.tensors().items()
    }
    try:
        return _kept(plain, tensors)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        problem = f"{disk.STATE} is damaged ({type(error).__name__}: {error})"
        raise refuse(problem, PREPARED.remedy) from error


def _tensors(kept: Kept) -> dict[str, torch.Tensor]:
    found = {}
    for name, (a, bt) in kept.bases.items():
        found[f"{BASES}{name}.A"], found[f"{BASES}{name}.B"] = a, bt.mT
    for k, x in enumerate(kept.alike):
        found |= {f"alike.{k}.{field}": y for field, y in x.tensors.items()}
    return found


def _plain(kept: Kept) -> dict[str, Any]:
    adapters = listed(kept.adapters, kept.places, kept.sources())
    return {
        "versions": versions(),
        "recipe": kept.recipe.plain(),
        "method": kept.method.method.name,
        "options": all_options(kept.method),
        "adapters": adapters,
        "modules": {
            name: {
                "owners": kept.owners[name],
                "shape": kept.shapes[name],
                "rank": kept.ranks[name],
                "norms": list(kept.norms[name]),
            }
            for name in kept.shapes
        },
        "alike": [_alike_plain(x) for x in kept.alike],
        "interference": kept.interference and kept.interference.to_dict(),
        "scale": kept.scale,
        "remarks": kept.remarks,
        "densities": kept.densities,
        "scales": {str(count): scale for count, scale in kept.scales.items()},
    }


def _alike_plain(x: Alike) -> dict[str, Any]:
    own = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    plain = {n: y for n, y in own.items() if not isinstance(y, (torch.Tensor, Chosen))}
    return {"class": type(x).__name__, **plain}


def _kept(plain: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Kept:
    chosen = choose(plain["method"], plain["options"])
    modules, adapters = plain["modules"], plain["adapters"]
    found = plain["interference"]
    return Kept(
        recipe=Recipe.of_plain(plain["recipe"]),
        method=chosen,
        sources=functools.cache(functools.partial(loaded, adapters, "prepared", "prepare")),
        places=tuple(x["place"] for x in adapters),
        adapters=tuple(x["name"] for x in adapters),
        owners={name: tuple(x["owners"]) for name, x in modules.items()},
        shapes={name: (x["shape"][0], x["shape"][1]) for name, x in modules.items()},
        alike=tuple(_alike(k, x, chosen, tensors) for k, x in enumerate(plain["alike"])),
        bases={n: (tensors[f"{BASES}{n}.A"], tensors[f"{BASES}{n}.B"].mT) for n in modules},
        norms={name: x["norms"] for name, x in modules.items()},
        ranks={name: x["rank"] for name, x in modules.items()},
        interference=found and Interference(**{n: _tuples(x) for n, x in found.items()}),
        scale=plain["scale"],
        remarks=tuple(plain["remarks"]),
        densities=_tuples(plain.get("densities")),
        scales={int(count): scale for count, scale in plain["scales"].items()},
    )


def _alike(
    k: int, plain: Mapping[str, Any], chosen: Chosen, tensors: Mapping[str, torch.Tensor]
) -> Alike:
    fields: dict[str, Any] = {n: _tuples(x) for n, x in plain.items()}
    cls = CLASSES[fields.pop("class")]
    stem = f"alike.{k}."
    fields |= {key.removeprefix(stem): x for key, x in tensors.items() if key.startswith(stem)}
    if cls in (Cores, Given, Inside):
        fields["method"] = chosen.inner or chosen
    return cls(**fields)


def _tuples(x: Any) -> Any:
    """With tuples where JSON has lists."""
    return tuple(map(_tuples, x)) if isinstance(x, list) else x
