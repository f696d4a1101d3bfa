"""merge and inspect: from adapters to a merged adapter, or to a table of their interference."""

from __future__ import annotations

import dataclasses
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import options
from ._version import __version__
from .adapters import Adapter, Kept, check_compatible, keep, one_spelling
from .adapters.plan import Plan
from .adapters.whole import check_policy
from .backends import registry
from .engine import pipeline as engine
from .engine.interference import InterferenceSums
from .engine.progress_bar import shown
from .engine.work import Cut, Work
from .errors import OptionError
from .formats import FORMATS, load, tokenizer
from .formats.format import Format
from .formats.model.checkpoint import open_checkpoint
from .formats.model.fit import originals
from .formats.peft import write as peft
from .formats.target import Target
from .merged import Merged
from .methods import TABLE, choose
from .methods.base import Chosen, Method, ScaleRule, Settings
from .methods.steps import POST, PRE
from .methods.steps.base import PostStep, PreStep
from .registry import Registry, Row
from .results.report import Interference, Report
from .storage.lazy import dtype_name

Source = str | os.PathLike[str] | Adapter
Progress = bool | Callable[[int, int], None]

S = TypeVar("S", bound=Row)

DTYPES = ("float32", "bfloat16", "float16")
AUTO, SVC = "auto", "svc"


def merge(
    adapters: Iterable[Source],
    method: str = "auto",
    *,
    weights: Sequence[float] | None = None,
    scale: float | str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    ragged: bool = False,
    pre: Sequence[str] = (),
    post: Sequence[str] = (),
    backend: str = "auto",
    device: str = "auto",
    max_device_memory: int | str | None = None,
    progress: Progress = False,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    force: bool = False,
    form: str = "adapter",
    base: str | os.PathLike[str] | None = None,
    whole: str = "auto",
    dtype: str | None = None,
    base_model: str | None = None,
    **method_options: Any,
) -> Merged:
    """Merge LoRA adapters of one base model into one adapter.

    adapters: PEFT folders, or adapters from `load`, `from_model` or `from_tensors`.
    method: one of `methods()`; its own options are keyword arguments. "auto" looks at how large the
        updates are and takes what keeps most of such; a note in the report says what.
    weights: one number an adapter, negative to subtract, 0 to leave out; None is 1 for each.
        "do" uses w_i / sum |w| over the adapters that have a module, "slerp" and "multislerp"
        w_i / sum w; all others use the weights as they are, or as proportions where λ is found.
    scale: λ, a factor on the merged update, or "auto": found from the adapters alone, for the
        whole model (scaling.py); weights are proportions then, [1, 1] is [2, 2], and a module that
        one adapter alone has keeps λ = 1. None is "auto" but for methods that are a defined sum
        ("linear", "cat", "svd") or set their norm themselves, where it is 1. The report says what
        was found.
    rank, energy: truncate every module to rank k, or to the smallest rank that keeps this share
        of ||ΔW||_F^2; with both, whichever is smaller. None: exact, of the rank that the method
        gives, which is sum r_i in most and never more than min(m, n); a method whose result is
        dense ("ties" and the like) is cut to the largest rank of the adapters, unless
        the form keeps it whole. The report says what share was kept.
    ragged: write every module with its own rank and rank_pattern, which PEFT reads right and
        several servers do not. By default a written adapter has one rank, by rows of zeros; in
        memory nothing is padded. `energy` implies it.
    pre: steps on the adapters before the method, in order, of `steps.PRE`; e.g. ["canonicalize"].
    post: steps on the merge after it, of `steps.POST`; e.g. ["norm_match"]. "svc" comes first,
        and before a truncation of factors; it brings the merge to the adapters, and "auto" to that.
    backend, device: where the ops run; "auto" takes the fastest backend for the device, and the
        device the factors are on (files: the CPU). Factors of a merge in memory stay there.
    max_device_memory: bytes (or "4GiB") of that device that groups of modules may take at once,
        besides the kernels' scratch memory (256 MiB at most); None: 80 % of what is free on a GPU.
    progress: True for a bar on stderr, or a function of (modules done, modules in all), called
        after every module, which is gone through twice for "auto" and for "svc"; an error that it
        raises stops the merge, and nothing is written.
    output: write a folder while merging, so that no more than a group of modules is in
        memory. It appears whole or not at all, and is on the disk when this returns.
    overwrite: replace an existing output that domerge_fast wrote. force: replace also one that
        others wrote (a trained adapter, a model), if it holds nothing but regular files with the
        names of this form. Other files, folders, the adapters and the base are never replaced.
    form: what is written: "adapter", a PEFT folder; "deltas", ΔW of every module as dense tensors;
        "model", the model in the folder `base` with ΔW added to its weights. In memory, "deltas"
        keeps ΔW dense in float32: `Merged.delta` then gives it exactly.
    base: the folder of the base model (safetensors), for form "model"; for the others where the
        adapters save tensors whole that differ.
    whole: what is kept of tensors that adapters save whole (modules_to_save, embeddings). "auto":
        what is the same in all that save it, or saved by one; several that differ become
        W0 + Σ w_i (W_i - W0), where W0 is at hand (`base`, or a copy that an adapter has), and are
        refused otherwise. "drop": none. "from:NAME": those of one adapter.
    dtype: of the merged factors, "float32", "bfloat16" or "float16"; None takes that of the
        inputs (float32 where they differ). Arithmetic is float32 throughout.
    base_model: says which base model all adapters belong to, where their configs disagree.

    Returns a Merged. Raises DomergeError (AdapterError, OptionError, OutputError), one line, for
    whatever cannot be merged exactly or written; nothing is left written then. An OutputWarning
    says what went wrong beside an output that is in its place: an old one could not be removed.
    """
    started = time.perf_counter()
    asked = chosen = choose(method, method_options)
    before, (calibrated, after) = _steps("pre", pre, PRE), _post(post)
    check_scale(1.0 if scale in (None, AUTO) else scale)
    cut = _cut(rank, energy)
    ragged = options.check("ragged", ragged, bool) or energy is not None
    written = _form(form, output, base)
    options.text("base_model", base_model)
    check_policy(whole)
    if ragged and written.dense and energy is None:
        raise OptionError("ragged", f"{form!r} has no ranks", "leave it out")
    loaded, renamed = _load(adapters, base_model, weights)
    plan = Plan.make(loaded, _weights(weights, len(loaded)))
    out_dtype = _dtype(dtype, plan)
    place = engine.Place(
        choose_device(device, loaded), options.size("max_device_memory", max_device_memory)
    )
    running = registry.choose(backend, place.device.type)
    said: tuple[str, ...] = ()
    alone = chosen.method.taken is not None
    if chosen.method.taken:
        taken = chosen.method.taken(plan)
        chosen, calibrated, said = taken.chosen, calibrated or taken.calibrated, (taken.what,)
    factor, rule = _scale(scale, chosen, plan, after)
    settings = Settings(factor, out_dtype, running)
    work = _work(plan, chosen, settings, cut, before, after, deltas=written.dense)
    work = dataclasses.replace(work, rule=rule, calibrated=calibrated, alone=alone)
    checkpoint = None if base is None else open_checkpoint(Path(base))
    origin = (
        None
        if checkpoint is None
        else originals({n: plan.module(n) for n in plan.names}, checkpoint)
    )
    kept = keep(loaded, plan.weights, whole, origin)
    if kept.owner is not None:
        whole = f"from:{loaded.index(kept.owner) + 1}"  # the recipe has no paths
    target, notes = _target(plan, out_dtype, base_model, kept, work.ranks(plan), ragged)
    target = dataclasses.replace(target, base=checkpoint)
    if work.restores_norms:
        said = (*said, "auto: every module has the norm that it had before the cut")
    notes = (*said, *renamed, *notes)
    sums = InterferenceSums([a.name for a in loaded])

    def finished(outcome: engine.Outcome) -> Report:
        modules, scales = outcome.modules, outcome.scales
        return Report(
            method=method,
            adapters=sums.names,
            weights=tuple(plan.weights),
            scale=scales[max(scales)] if scales else factor,
            scales=scales,
            auto=scale == AUTO or (scale is None and not chosen.own_scale),
            options=_recipe(asked, rank, energy, ragged, pre, post, form, base, whole),
            backend=settings.backend,
            device=str(place.device),
            dtype=dtype_name(out_dtype),
            versions=versions(),
            modules=modules,
            interference=sums.result() if len(loaded) <= engine.MOST_COMPARED else None,
            seconds=time.perf_counter() - started,
            notes=(*notes, *written.notes(target, [m.rank for m in modules.values()])),
        )

    def run(sink: engine.Sink, to_host: bool) -> Report:
        with shown(progress, len(plan.names)) as show, torch.no_grad():
            return finished(engine.run(plan, work, place, sums, sink, to_host, show))

    if output is None:
        results: dict[str, tuple[torch.Tensor, ...]] = {}

        def collect(name: str, *tensors: torch.Tensor) -> None:
            results[name] = tuple(x.contiguous() for x in tensors)

        report = run(collect, False)
        target.check_inputs()
        return Merged(report, target, results)
    path = options.folder("output", output)
    assert written.write
    with written.write(path, target, overwrite, force) as folder:
        report = run(folder.add, True)
        report = dataclasses.replace(report, notes=(*report.notes, *folder.notes))
        folder.finish(report)
        target.check_inputs()
    return Merged(report, target, {}, path)


def inspect(
    adapters: Iterable[Source],
    *,
    backend: str = "auto",
    device: str = "auto",
    progress: Progress = False,
    base_model: str | None = None,
) -> Interference:
    """How much adapters of one base model interfere, from their Gram matrices alone.

    Pairwise overlap of row spaces (A) and column spaces (B), the cosine between the updates, and
    each adapter's norm with its spread over modules; what names were brought together is in its
    notes. Raises as `merge` does.
    """
    loaded, notes = _load(adapters, base_model)
    plan = Plan.make(loaded, [1.0] * len(loaded))
    where = choose_device(device, loaded)
    sums = InterferenceSums([a.name for a in loaded])
    with shown(progress, len(plan.names)) as show, torch.no_grad():
        chosen = registry.choose(backend, where.type)
        engine.survey(plan, engine.Place(where), chosen, sums, show)
    for adapter in loaded:
        for file in adapter.inputs:
            file.check()
    return dataclasses.replace(sums.result(), notes=tuple(notes))


@dataclass(frozen=True)
class MethodInfo:
    """A merge method in a few words each: what it does, what it returns ("exact" factors of rank
    R, factors cut to a "rank", "dense" ΔW, "inner": what the method inside it returns), what it
    costs a module, what it needs besides adapters, where it is from, and why it cannot be used
    here, if it cannot."""

    summary: str
    returns: str
    cost: str
    needs: str
    source: str
    why_not: str | None


def list_methods() -> dict[str, MethodInfo]:
    """The merge methods by name."""
    return {name: _info(row) for name, row in TABLE.items()}


def _info(row: Method) -> MethodInfo:
    returns = "rank" if row.truncates else "dense" if row.dense else "exact"
    returns = "inner" if row.dense is None else returns
    return MethodInfo(row.summary, returns, row.cost, row.needs, row.source, row.why_not())


@dataclass(frozen=True)
class FormatInfo:
    """A format in a few words: what it is, whether adapters are read from it, whether merges are
    written in it (`form`), and why it cannot be used here, if it cannot."""

    summary: str
    reads: bool
    writes: bool
    why_not: str | None


def list_formats() -> dict[str, FormatInfo]:
    """The formats of files by name."""
    return {
        name: FormatInfo(row.summary, row.read is not None, row.write is not None, row.why_not())
        for name, row in FORMATS.items()
    }


def list_backends() -> dict[str, registry.BackendStatus]:
    """The backends by name: `available`, `devices`, and `why_not` where one cannot run here."""
    return registry.backends()


def versions() -> dict[str, str]:
    """Versions of what a merge depends on."""
    return {
        "domerge-fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _load(
    sources: Iterable[Source], base_model: str | None, weights: Sequence[float] | None = None
) -> tuple[list[Adapter], list[str]]:
    """The adapters, their modules under one name each, and what is to be said of that."""
    if isinstance(sources, (str, os.PathLike, Adapter)):
        raise OptionError("adapters", "is one adapter, not a list", "put it in a list: [adapter]")
    registry.check_environment()
    found = [_one(source) for source in sources]
    given = _weights(weights, len(found)) if found else None
    loaded, notes = one_spelling(found, base_model, given)
    check_compatible(loaded, base_model)
    named: dict[str, Adapter] = {}
    for adapter in loaded:
        numbered = (f"{adapter.name} ({k})" for k in itertools.count(2))
        names = itertools.chain([adapter.name], numbered)
        name = next(n for n in names if n not in named)
        named[name] = dataclasses.replace(adapter, name=name)
    return list(named.values()), notes


def _one(source: Source) -> Adapter:
    if isinstance(source, Adapter):
        return source
    if isinstance(source, (str, os.PathLike)):
        return load(source)
    remedy = "give a folder, from_model(model, name) or from_tensors(factors)"
    raise OptionError("adapters", f"a {type(source).__name__} is not an adapter", remedy)


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    checked = check_weights(weights, count)
    if not any(checked):
        raise OptionError("weights", "all are zero", "give at least one adapter a weight")
    return checked


def _scale(
    scale: float | str | None, chosen: Chosen, plan: Plan, after: Sequence[PostStep]
) -> tuple[float, ScaleRule | None]:
    """λ, or the rule that it is found by: none where one adapter is merged, or a step sets the
    norm."""
    if scale is None:
        scale = 1.0 if chosen.own_scale else AUTO
    if scale != AUTO:
        return check_scale(scale), None
    alone = sum(weight != 0 for weight in plan.weights) == 1
    if alone or any(step.name == "norm_match" for step in after):
        return 1.0, None
    return 1.0, chosen.rule


def _post(names: Sequence[str]) -> tuple[bool, tuple[PostStep, ...]]:
    """Whether the merge is calibrated, and the steps after that."""
    calibrated = not isinstance(names, str) and [*names][:1] == [SVC]
    rest = [*names][1:] if calibrated else names
    if SVC in rest and not isinstance(rest, str):
        raise OptionError("post", f"{SVC!r} works on the merge itself", "put it first, once")
    return calibrated, _steps("post", rest, POST)


def check_scale(given: float | str) -> float:
    scale: float = options.check("scale", given, float)
    if scale == 0:
        raise OptionError("scale", "0 leaves nothing of the merge", "give another factor")
    return scale


def check_weights(
    weights: Sequence[float] | None, count: int, each: str = "weights"
) -> list[float]:
    """One for each of `count` adapters; None is 1 for each. each: the option that one is of."""
    if weights is None:
        return [1.0] * count
    if isinstance(weights, str) or not isinstance(weights, Iterable):
        problem = f"{str(weights)[:40]!r} is no list of numbers"
        raise OptionError("weights", problem, "give one number for each adapter, in order")
    weights = list(weights)
    if len(weights) != count:
        problem = f"{len(weights)} weights for {count} adapters"
        raise OptionError("weights", problem, "give one number for each adapter, in order")
    return [options.check(each, w, float) for w in weights]


def _form(form: str, output: Any, base: Any) -> Format:
    """The format that a merge of this form is written in."""
    row = FORMATS.choose("form", form, lambda row: row.write is not None)
    known = base is None or isinstance(base, (str, os.PathLike))
    if not known or "\0" in os.fspath(base or ""):
        raise OptionError("base", f"{base!r} is no folder", "give the path of the base model")
    if row.needs_base and base is None:
        raise OptionError("form", f"{form!r} needs the base model", "give its folder as base")
    if row.needs_base and output is None:
        raise OptionError("form", f"{form!r} is written, not kept in memory", "give an output")
    return row


def _target(
    plan: Plan,
    dtype: torch.dtype,
    base_model: str | None,
    kept: Kept,
    ranks: Mapping[str, int],
    ragged: bool,
) -> tuple[Target, tuple[str, ...]]:
    """What the merge is written as, and what has to be said of it."""
    merging = [adapter for adapter, weight in zip(plan.adapters, plan.weights) if weight != 0]
    files, notes = tokenizer.files(merging, kept)
    target = peft.target(plan, dtype, base_model, kept, ranks, ragged)
    return dataclasses.replace(target, copied=files), (*kept.notes, *notes)


def _steps(option: str, names: Sequence[str], table: Registry[S]) -> tuple[S, ...]:
    if isinstance(names, str):
        raise OptionError(option, "is one name, not a list", f"say [{names!r}]")
    if not isinstance(names, Iterable):
        raise OptionError(option, f"{names!r} is no list of names", "give one, or leave it out")
    return tuple(table.choose(option, name) for name in names)


def _recipe(
    chosen: Chosen,
    rank: int | None,
    energy: float | None,
    ragged: bool,
    pre: Sequence[str],
    post: Sequence[str],
    form: str,
    base: str | os.PathLike[str] | None,
    whole: str,
) -> dict[str, Any]:
    """The options that repeat the merge."""
    given: dict[str, Any] = {}
    one: Chosen | None = chosen
    while one:
        given = dataclasses.asdict(one.options) | given
        one = one.inner
    return given | {
        "rank": rank,
        "energy": energy,
        "ragged": ragged,
        "pre": list(pre),
        "post": list(post),
        "form": form,
        "base": None if base is None else os.fspath(base),
        "whole": whole,
    }


def _cut(rank: int | None, energy: float | None) -> Cut:
    if rank is not None:
        rank = options.check("rank", rank, int, low=1)
    if energy is not None:
        energy = options.check("energy", energy, float)
        if not 0 < energy <= 1:
            raise OptionError("energy", f"{energy!r} is not a share", "give one in (0, 1]")
    return Cut(rank, energy)


def _work(
    plan: Plan,
    method: Chosen,
    settings: Settings,
    cut: Cut,
    before: Sequence[PreStep],
    after: Sequence[PostStep],
    deltas: bool,
) -> Work:
    usual = _largest_rank(plan) if method.truncates or method.dense else Cut()
    if method.truncates and not cut:
        cut = usual
    settings = dataclasses.replace(settings, rank=cut.rank)
    return Work(method, settings, cut, usual, before, after, deltas, narrowing=plan.wide)


def _largest_rank(plan: Plan) -> Cut:
    """To the largest rank of an adapter."""
    return Cut(max(m.rank for name in plan.names for m in plan.modules(name)))


def _dtype(dtype: str | None, plan: Plan) -> torch.dtype:
    if dtype is None:
        return plan.dtype()
    return getattr(torch, options.choose("dtype", dtype, DTYPES))


def choose_device(device: str, adapters: Sequence[Adapter]) -> torch.device:
    if device == "auto":
        homes = {device for a in adapters for device in a.devices}
        return homes.pop() if len(homes) == 1 else torch.device("cpu")
    try:
        probe = torch.zeros(1, device=device)
        probe.item()
    except (RuntimeError, AssertionError) as error:
        remedy = "use 'cpu', or 'cuda:0' where torch sees a GPU"
        raise OptionError("device", f"torch cannot use {device!r} here", remedy) from error
    return probe.device
