"""Prepare once, merge many times: `prepare` reads adapters once and keeps all of a merge that does
not depend on coefficients; a `Prepared` then merges with any number of them, cheaply, in batches,
and so that gradients reach them.

    p = dm.prepare(["a/", "b/"], "tsvm")
    A, B = p.merge([1.0, 0.5])["model.layers.0.self_attn.q_proj"]
    p.save([1.0, 0.5], "out/")

At coefficients κ that are nowhere 0 a merge is what `merge(adapters, method, weights=κ)` makes. An
adapter with the coefficient 0 is left out by `merge` before anything is merged; of what was
prepared it adds nothing, but is still there: directions were orthogonalized against its own, and
means count it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import options
from ..errors import OptionError
from ..merged import Merged
from ..methods.thresholds import Counted
from ..planning import choose_device
from ..recipe import DTYPES, Recipe, check_scale
from . import stored
from .coefficients import Addresses, Kappa
from .densities import Density, check, of_modules, with_densities
from .kinds.alike import Found, Inner, Weights, selection
from .kinds.calibrating import calibrated
from .kinds.rotated import Cores
from .live import Attached, attached
from .making import asked_of, made, made_all
from .prepared_merge import Made, PreparedMerge
from .replays import Replays
from .saving import Writing, writing, written
from .stored import Kept, opened

__all__ = ["TILES", "Prepared", "check_stays"]

TILES = "tiles"
ORDER = ("scaled", "rotated", "gains")
"""Kinds; of a `Prepared` that has several, the first. Modules that one adapter alone has may be of
another than the rest."""
MANY = 4
"""Candidates whose R x R matrices are worked on at once."""


@dataclass(frozen=True, eq=False)
class Prepared(Kept):
    """What `prepare` made. adapters: their names, T. scale: λ of modules that the most adapters
    have; scales: by the number of these, where it was found. interference: of the adapters.
    remarks: what cards of its merges say besides, a sentence each. counted: what merges that are
    made anew keep of the adapters' updates for the next one."""

    counted: Counted = field(default_factory=Counted)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], device: str = "cpu") -> Prepared:
        """What `state` wrote to a folder. The adapters are needed only where merges are saved, and
        are read then. device: where its bases go. OptionError."""
        place = choose_device(device, ())
        kept = opened(options.folder("folder", folder), place)
        return cls(**{f.name: getattr(kept, f.name) for f in dataclasses.fields(kept)})

    def state(
        self, folder: str | os.PathLike[str], overwrite: bool = False, force: bool = False
    ) -> None:
        """Write all of it to a folder, whole or not at all, for `open`, in other processes among
        them. overwrite, force: as for `merge`. OutputError; OptionError for kind "tiles"."""
        stored.written(self, options.folder("folder", folder), overwrite, force)

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules, in the order of coefficients."""
        return tuple(self.shapes)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers, in the order of coefficients of level "layer"."""
        return self.addresses.layers

    @property
    def kind(self) -> str:
        """ "gains", "rotated", "scaled" or "tiles": how merges are made (docs/sessions.md)."""
        kinds = {x.kind for x in self.alike}
        return next((kind for kind in ORDER if kind in kinds), TILES)

    @cached_property
    def addresses(self) -> Addresses:
        """What coefficients are of."""
        return Addresses(self.modules, len(self.adapters), max(self.ranks.values()))

    def expand(self, kappa: Kappa, level: str | None = None) -> Tensor:
        """Coefficients of any level as [.., modules, T], or [.., modules, R] for single directions
        (`Addresses.expand`)."""
        return self.addresses.expand(kappa, level)

    def shares(self, density: Density) -> Tensor:
        """Densities [modules], or [N, modules] of several merges, from one for all, or for each
        layer or module. OptionError where the method has none, or they fit no level."""
        found = of_modules(density, self.addresses)
        check(self.recipe, found, anew=not self.alike)
        return found

    def at_density(self, density: Density | None) -> Prepared:
        """The same, but that its method keeps this share of the entries of updates (`shares`);
        None: as it is."""
        if density is None:
            return self
        found = self.shares(density)
        if found.dim() != 1:
            problem = f"is {list(found.shape)}: of many merges"
            raise OptionError("density", problem, "give those of one")
        own = tuple(found.tolist())
        recipe = with_densities(self.recipe, self.modules, own)
        return dataclasses.replace(self, recipe=recipe, densities=own)

    def at_scale(self, scale: float) -> Prepared:
        """The same, but with this λ in all modules."""
        own = check_scale(scale)
        return dataclasses.replace(
            self,
            recipe=dataclasses.replace(self.recipe, scale=own),
            alike=tuple(
                dataclasses.replace(x, scale=torch.full_like(x.scale, own)) for x in self.alike
            ),
            scale=own,
            scales={},
        )

    def merge(
        self,
        kappa: Kappa,
        level: str | None = None,
        dtype: str = "float32",
        density: Density | None = None,
    ) -> PreparedMerge | Made:
        """The merge at coefficients: by module, A [k, n] and B [m, k]. dtype: of these; gradients
        reach κ with any. density: as of `at_density`. On a GPU it is the replay of a CUDA graph,
        which the first merge captures (docs/sessions.md). OptionError for coefficients that do not
        fit."""
        word = options.choose("dtype", dtype, (*DTYPES, "float64"))
        expanded = self.addresses.expand_one(kappa, level, "merge_many")
        return self.at_density(density)._merge(expanded, getattr(torch, word), self._replays)

    def merge_many(
        self,
        kappas: Kappa,
        level: str | None = None,
        dtype: str = "float32",
        density: Density | None = None,
    ) -> Iterator[PreparedMerge | Made]:
        """The merges at each of the coefficients [N, ..], as `merge` makes them, all at one
        density; what is R x R is worked on in batches."""
        word = options.choose("dtype", dtype, (*DTYPES, "float64"))
        expanded = self.addresses.expand_many(kappas, level)
        return self.at_density(density)._many(expanded, getattr(torch, word), self._replays)

    def attach(
        self,
        model: Any,
        adapter: str = "merged",
        *,
        in_place: bool = False,
        dtype: str | None = None,
    ) -> Attached:
        """Put the merge on a live model as a frozen LoRA adapter of PEFT's, alone active, that
        takes coefficients (`Attached.set`), or those of many merges at once
        (`Attached.candidates`).

        model: of transformers, or any of torch with these modules, or a PeftModel. in_place: write
        what coefficients make into the adapter's weights, which keep their addresses, in place of
        hooks; no gradients and one merge at a time then. dtype: of the adapter, None for that of
        the model's weights. Takes R (m + n) numbers a module, none of which is copied where dtype
        and device are those of what was prepared.

        Raises OptionError for modules that the model lacks or that are not linear layers, adapters
        that are merged into it, dropout that is on, a name that is taken, and a method whose
        merges are made anew (kind "tiles"). DomergeError without PEFT.
        """
        options.check("in_place", in_place, bool)
        word = dtype and options.choose("dtype", dtype, (*DTYPES, "float64"))
        check_stays(self)
        return attached(self, model, adapter, in_place, getattr(torch, word) if word else None)

    def save(
        self,
        kappa: Kappa,
        output: str | os.PathLike[str],
        *,
        level: str | None = None,
        density: Density | None = None,
        overwrite: bool = False,
        force: bool = False,
        **asked: Any,
    ) -> Merged:
        """Write the merge at coefficients, as `merge(..., output=)` writes: whole or not at all,
        with its card and report, of which the recipe has the coefficients as weights.

        density: as of `at_density`. asked: rank, energy, ragged, form, format, runtime, base and
        dtype, as of `merge`. Raises as that does.
        """
        path = options.folder("output", output)
        expanded = self.addresses.expand_one(kappa, level, "save_many")
        given: dict[str, Any] = {"names": [path.name], "overwrite": overwrite, "force": force}
        whole = self.at_density(density)
        (found,) = whole.save_many(expanded[None], path.parent, **given, **asked).values()
        return found

    def save_many(
        self,
        kappas: Kappa,
        output: str | os.PathLike[str],
        *,
        names: Sequence[str] | None = None,
        level: str | None = None,
        overwrite: bool = False,
        force: bool = False,
        **asked: Any,
    ) -> dict[str, Merged]:
        """Write the merges at each of the coefficients [N, ..] to folders of their own in `output`,
        by name, in one pass over what was prepared: with one rank in all, as servers want it. Those
        with the same coefficients are written once, under the first of their names.

        names: of the folders, "0", "1", .. where there are none. The rest is as of `save`.
        """
        expanded = self.addresses.expand_many(kappas, level)
        called = [str(k) for k in range(len(expanded))] if names is None else list(names)
        if len(set(called)) != len(expanded) or not all(map(_is_name, called)):
            problem = f"there are {len(expanded)} merges, and {len(set(called))} names of folders"
            raise OptionError("names", problem, "give each a name of its own, without slashes")
        recipe = asked_of(self.recipe, asked)
        place = options.folder("output", output)
        firsts, distinct = _distinct(expanded.detach())
        paths = [place / called[k] for k in firsts]
        if self.alike:
            found = written(self._writings(recipe, distinct), paths, overwrite, force)
        else:
            given = recipe, self.sources(), distinct, self.modules, self.counted
            found = made_all(*given, paths, overwrite, force, self.remarks)
        return {called[k]: x for k, x in zip(firsts, found)}

    def _writings(self, recipe: Recipe, kappas: Tensor) -> list[Writing]:
        """Merges at expanded coefficients, each of which is cut as it is written."""
        uncut = [
            dataclasses.replace(x, rank=None) if isinstance(x, Cores) else x for x in self.alike
        ]
        whole = dataclasses.replace(self, alike=tuple(uncut))
        merges = whole._many(kappas, torch.float32)
        return [writing(self, recipe, *pair) for pair in zip(kappas, merges)]

    def _many(
        self, kappas: Tensor, dtype: torch.dtype, replays: Replays | None = None
    ) -> Iterator[PreparedMerge | Made]:
        if not self.alike:
            yield from (self._merge(kappa, dtype) for kappa in kappas)
            return
        for part in kappas.split(MANY):
            found = self.inner(part)
            for k in range(len(part)):
                yield self._together([_chosen(x, k) for x in found], dtype, replays)

    def _merge(
        self, kappa: Tensor, dtype: torch.dtype, replays: Replays | None = None
    ) -> PreparedMerge | Made:
        if not self.alike:
            given = self.recipe, self.sources(), kappa, self.modules, self.counted
            return Made(made(*given), self.shapes)
        return self._together(self.inner(kappa), dtype, replays)

    @cached_property
    def _replays(self) -> Replays:
        """Graphs of merges that are held in memory, not of those that are written module by
        module."""
        return Replays(self.alike, self.bases)

    def _together(
        self, inner: Sequence[Inner], dtype: torch.dtype, replays: Replays | None
    ) -> PreparedMerge:
        found = {
            name: Found.of(one, at)
            for x, one in zip(self.alike, inner)
            for at, name in enumerate(x.names)
        }
        replayed = replays.of(inner, dtype) if replays else None
        return PreparedMerge(self.bases, found, dtype, replayed)

    def inner(self, kappa: Tensor, densities: Tensor | None = None) -> list[Inner]:
        """What expanded coefficients [.., modules, T or R] make of every one of `alike`, with λ.
        densities: [.., modules], None for its own."""
        device = self.alike[0].scale.device
        kappa = kappa.to(device, torch.float64)
        if densities is None and self.densities is not None:
            densities = torch.tensor(self.densities, dtype=torch.float64)
        found = [x.found(of(kappa, densities)) for x, of in zip(self.alike, self._selections)]
        rows = zip(self.alike, calibrated(self.alike, found))
        return [inner.times(x.scale) for x, inner in rows]

    @cached_property
    def _selections(self) -> list[Callable[[Tensor, Tensor | None], Weights]]:
        places = {name: k for k, name in enumerate(self.modules)}
        return [selection(x, places, len(self.adapters)) for x in self.alike]


def check_stays(prepared: Prepared, option: str = "method", beside: str = "") -> None:
    """OptionError of an option for a method whose merges are made anew (kind "tiles"). beside: what
    else may be done about it."""
    if prepared.kind == TILES:
        problem = f"{prepared.recipe.method!r} has no factors that stay"
        raise OptionError(option, problem, f"prepare 'core' with it inside{beside}")


def _is_name(name: Any) -> bool:
    """Whether it is that of a folder, in another."""
    return isinstance(name, str) and Path(name).name == name


def _distinct(kappas: Tensor) -> tuple[list[int], Tensor]:
    """The places of the first of equal coefficients [N, ..], and these."""
    firsts: dict[bytes, int] = {}
    for k, kappa in enumerate(kappas.double().cpu()):
        firsts.setdefault((kappa + 0.0).numpy().tobytes(), k)
    places = [*firsts.values()]
    return places, kappas[places]


def _chosen(inner: Inner, at: int) -> Inner:
    """One of a batch of candidates."""
    parts = inner.gains, inner.left, inner.right, inner.columns
    return Inner(*(None if x is None else x[at] for x in parts))
