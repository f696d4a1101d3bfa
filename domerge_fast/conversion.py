"""One adapter in another format: its factors as they are, its scales where the format has a place
for them. Nothing is merged."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import options, runtimes
from .adapters import Adapter, Style, keep
from .adapters.plan import Plan
from .engine.changes import changes
from .errors import AdapterError, OptionError
from .formats import FORMATS
from .formats.format import NONE, ONE, Format
from .formats.model.checkpoint import open_checkpoint
from .formats.names.refit import Refit
from .formats.peft.write import PEFT
from .formats.single_file.write import ROWS as FILES
from .formats.target import Target
from .job import versions
from .ops.largest import largest
from .planning import target_of
from .reading import Source, read
from .recipe import Input, Recipe
from .results.report import Report
from .runtimes.runtime import PATTERNS, Runtime
from .storage.digests import sha256
from .storage.lazy import dtype_name

__all__ = ["Conversion", "convert"]

LOST = 0.01
"""Of the norm of a factor, at most, when its scale goes into it."""


@dataclass(frozen=True)
class Conversion:
    """path: what was written, in which format, with how many modules; notes: what a user has to
    know."""

    path: Path
    format: str
    modules: int
    notes: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"path": os.fspath(self.path)}


def convert(
    adapter: Source,
    output: str | os.PathLike[str],
    *,
    format: str | None = None,
    runtime: str | None = None,
    whole: str = "auto",
    dtype: str | None = None,
    base: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> Conversion:
    """Write an adapter in another format.

    Factors are written as they are stored, bit for bit, in the names that the format has; modules
    are split or fused where it has others, exactly. The scale in front of B A stays beside them
    where the format has a place for it (lora_alpha and alpha_pattern, alphas, MLX's scale if all
    modules have one), and goes into B elsewhere; a note says so. Tensors saved whole come along.

    adapter: as for `merge`. format: of `list_formats()`; runtime: of `list_runtimes()`, whose form
    it gets; one of them is needed. whole: "auto", or "drop" to leave tensors saved whole out.
    dtype: of the factors, None as they are. base: for what a runtime wants to know of the base
    model. base_model: which one it is, where the names leave that open. overwrite, force: as for
    `merge`. DomergeError, one line, for what the format cannot hold; nothing is written then.
    """
    began = time.perf_counter()
    asked = Recipe.make(
        method="linear",
        format=format,
        runtime=runtime,
        whole=whole,
        dtype=dtype,
        base=base,
        base_model=base_model,
    )
    path = options.folder("output", output)
    _check_format(asked)
    asked, loads = runtimes.settled(asked)
    [found], said = read([adapter], base_model)
    row, _ = runtimes.format_of(asked, [found], loads)
    target, refit, notes = _planned(asked, found, row, loads)
    report = _report(asked, found, row, (*said, *notes), began)
    _write(path, found, row, target, refit, report, overwrite, force)
    return Conversion(path, row.name, len(target.layouts), report.notes)


def _check_format(asked: Recipe) -> None:
    if asked.format is None and asked.runtime is None:
        raise OptionError("format", "is not given", "say one, or what it is for (runtime, --for)")
    if asked.format and FORMATS.choose("format", asked.format).form != PEFT.form:
        remedy = "a merge of one writes it (domerge-fast merge)"
        raise OptionError("format", f"{asked.format!r} is no format of adapters", remedy)


def _planned(
    asked: Recipe, adapter: Adapter, row: Format, runtime: Runtime | None
) -> tuple[Target, Refit | None, tuple[str, ...]]:
    """What is written, how it gets its modules, and what is to be said of it."""
    plan = Plan.make([adapter], [1.0])
    ranks = {name: adapter.stored[name][0].shape[0] for name in plan.names}
    own_ranks = len(set(ranks.values())) > 1 or _renamed(adapter, row)
    takes = row.holds.ranks and (runtime is None or runtime.ragged)
    asked = dataclasses.replace(asked, ragged=own_ranks and takes)
    dtype = plan.dtype() if asked.dtype is None else getattr(torch, asked.dtype)
    base = open_checkpoint(asked.base.name, row.config_only) if asked.base else None
    kept = keep([adapter], [1.0], asked.whole)
    changed = changes(plan, (), kept, None, dtype, row.dense)
    matrices = _matrices(adapter, row, runtime)
    target, refit, notes = target_of(plan, dtype, asked, kept, ranks, base, row, changed, matrices)
    scales = _kept_scales(adapter, row, target, refit, runtime)
    target = dataclasses.replace(target, scales=scales, styles=_styles(adapter, row))
    target, fitted = runtimes.written_for(runtime, row, target)
    told = runtimes.notes(runtime.name if runtime else None, row, target, ())
    baked = () if scales else _baked(adapter, row, dtype)
    return target, refit, (*notes, *fitted, *baked, *told)


def _matrices(adapter: Adapter, row: Format, runtime: Runtime | None) -> frozenset[str]:
    """The modules that are written as the matrices that they are."""
    takes = row.holds.differences and (runtime is None or runtime.differences)
    return frozenset(n for n, module in adapter.modules.items() if takes and module.dense)


def _renamed(adapter: Adapter, row: Format) -> bool:
    return adapter.style is not None and adapter.style.names != row.names


def _styles(adapter: Adapter, row: Format) -> tuple[Style, ...]:
    """How the adapter was stored, where the format says so: of other single files the metadata."""
    if not adapter.style or adapter.style.format == row.name:
        return () if adapter.style is None else (adapter.style,)
    if row in FILES and any(adapter.style.format == other.name for other in FILES):
        return (Style(row.name, row.names, metadata=adapter.style.metadata),)
    return ()


def _kept_scales(
    adapter: Adapter, row: Format, target: Target, refit: Refit | None, runtime: Runtime | None
) -> dict[str, float]:
    """What is in front of B A, by the modules that are written; {} where it goes into B."""
    place = row.holds.scales
    if row is PEFT and runtime and runtime.scale != PATTERNS:
        place = ONE  # for such a runtime all modules have one rank
    found: dict[str, set[float]] = {}
    for name in target.layouts:
        sources = {part.source for part in refit.parts[name]} if refit else {name}
        found[name] = {adapter.modules[source].scaling for source in sources}
    several = place == ONE and len(set().union(*found.values())) > 1
    if place == NONE or several or any(len(scales) > 1 for scales in found.values()):
        return {}
    return {name: scale for name, [scale] in found.items()}


def _baked(adapter: Adapter, row: Format, dtype: torch.dtype) -> tuple[str, ...]:
    """What is to be said where scales go into B."""
    scales = {module.scaling for module in adapter.modules.values()} - {1.0}
    if not scales:
        return ()
    exact = all(math.frexp(abs(scale))[0] == 0.5 for scale in scales)
    how = "exactly" if exact else f"rounded to {dtype_name(dtype)}"
    span = " to ".join(f"{x:.4g}" for x in dict.fromkeys((min(scales), max(scales))))
    return (f"the scale ({span}) is in the factors, {how}: this form has no place for it",)


def _report(
    asked: Recipe, adapter: Adapter, row: Format, notes: tuple[str, ...], began: float
) -> Report:
    source = Input(adapter.name, {file.path.name: sha256(file) for file in adapter.inputs})
    recipe = dataclasses.replace(asked, adapters=(source,), format=row.name)
    seconds = time.perf_counter() - began
    return Report(recipe, 1.0, versions(), {}, None, seconds, notes, converted=True)


def _write(
    path: Path,
    adapter: Adapter,
    row: Format,
    target: Target,
    refit: Refit | None,
    report: Report,
    overwrite: bool,
    force: bool,
) -> None:
    assert row.write
    with row.write(path, target, overwrite, force) as written:
        add = refit.sink(written.add) if refit else written.add
        for name in adapter.modules:
            a, b = (x.read().flatten(1).contiguous() for x in adapter.stored[name])
            if not largest([a, b]).isfinite().all():
                remedy = "train or download it again"
                raise AdapterError(adapter.name, name, "NaN or an infinite value", remedy)
            add(name, a, b if target.scales else _scaled(adapter, name, b, target.dtype))
        written.finish(report)
        target.check_inputs()


def _scaled(adapter: Adapter, name: str, b: Tensor, dtype: torch.dtype) -> Tensor:
    """B with the scale in it. AdapterError where the dtype does not hold that."""
    scale = adapter.modules[name].scaling
    if scale == 1:
        return b
    exact = b.double() * scale
    found = exact.to(dtype)
    if not (found.double() - exact).norm() <= LOST * exact.norm():
        problem = f"its factor B times its scale ({scale:.4g}) does not fit {dtype_name(dtype)}"
        raise AdapterError(adapter.name, name, problem, "say another dtype (--dtype float32)")
    return found
