"""merge, run, inspect and check: from adapters to a merged one, or to what is to be said of
them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from . import direction, options
from .adapters.adapter import called
from .adapters.plan import Plan
from .backends import registry
from .conversion import Conversion, convert
from .dry_run import Estimate
from .dry_run import estimate as of_job
from .engine import pipeline as engine
from .engine.details import DetailSums
from .engine.interference import InterferenceSums
from .engine.progress_bar import shown
from .engine.reader import Budget
from .errors import OptionError, some
from .formats.choose import asked_for
from .job import Progress
from .merged import Merged
from .on_inputs import on_inputs
from .planning import choose_device, plan_job
from .reading import Source, read
from .recipe import DETAILS, FULL, NORMS, Recipe
from .results.report import Interference
from .runtimes.check import Check, check
from .storage.features_file import FeaturesFile

__all__ = [
    "Check",
    "Conversion",
    "check",
    "convert",
    "estimate",
    "inspect",
    "merge",
    "run",
]


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
    verify: bool = False,
    form: str = "adapter",
    format: str | None = None,
    runtime: str | None = None,
    base: str | os.PathLike[str] | None = None,
    whole: str = "auto",
    dtype: str | None = None,
    base_model: str | None = None,
    rules: Sequence[Mapping[str, Any]] = (),
    weights_for: Mapping[str, Sequence[float]] | None = None,
    report: str = "full",
    features: str | os.PathLike[str] | None = None,
    features_energy: float | None = None,
    **method_options: Any,
) -> Merged:
    """Merge LoRA adapters of one base model into one adapter.

    adapters: folders or files of a format that is read (docs/formats.md), ids on the Hugging Face
        Hub (`owner/name`, also with `/folder` and `@revision`), or adapters from `load`,
        `from_model` or `from_tensors`.
    method: one of `list_methods()`; its own options are keyword arguments. "auto" looks at how
        large the updates are and takes what keeps most of such; a note in the report says what.
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
        device the factors are on (files: the CPU). Factors of a merge in memory stay there. The
        report's recipe says which backend it was, of each op where they differ.
    max_device_memory: bytes (or "4GiB") of that device that groups of modules may take at once,
        besides the kernels' scratch memory (256 MiB at most); None: 80 % of what is free on a GPU.
    progress: True for a bar on stderr, or a function of (modules done, modules in all), called
        after every module, which is gone through twice for "auto" and for "svc"; an error that it
        raises stops the merge, and nothing is written.
    output: write a folder while merging, or a file where a name ends as that of a format that is
        one (".safetensors"), so that no more than a group of modules is in memory. It appears whole
        or not at all, and is on the disk when this returns.
    overwrite: replace an existing output that domerge_fast wrote. force: replace also one that
        others wrote (a trained adapter, a model), if it holds nothing but regular files with the
        names of this form. Other files, folders, the adapters and the base are never replaced.
    verify: merge up to eight modules again by the float64 reference: DomergeError, and nothing is
        written, where what is written of one is off by more than rounding to its dtype explains.
        The report says by how much it is off.
    form: what is written: "adapter", A and B of every module; "deltas", ΔW of every module as dense
        tensors; "model", the model in the folder `base` with ΔW added to its weights. In memory,
        "deltas" keeps ΔW dense in float32: `Merged.delta` then gives it exactly.
    format: how that is stored, of `list_formats()`. None: as the adapters are, where all have one
        format that can be written, otherwise as a PEFT folder; a note in the report says which.
    runtime: the program that the output is for, of `list_runtimes()`: it takes the form that this
        one demands, where it can by itself; Unmet, with every demand that is not met and what to do
        about it, before anything is merged where it cannot.
    base: the folder of the base model (safetensors), or its id on the Hub: for form "model", for
        the others where the adapters save tensors whole that differ.
    whole: what is kept of tensors that adapters save whole (modules_to_save, embeddings). "auto":
        what is the same in all that save it, or saved by one; several that differ become
        W0 + Σ w_i (W_i - W0), where W0 is at hand (`base`, or a copy that an adapter has), and are
        refused otherwise. "drop": none. "from:NAME": those of one adapter.
    dtype: of the merged factors, "float32", "bfloat16" or "float16"; None takes that of the
        inputs (float32 where they differ). Arithmetic is float32 throughout.
    base_model: says which base model all adapters belong to, where their configs disagree.
    rules: of modules by name, each a mapping with "modules", a pattern ("*.mlp.*"), and "leave_out"
        (True), "weights", "rank", "energy", or "method" with its options. Modules that a rule sets
        a rank, an energy or a method for are merged by themselves: λ is found of them alone.
    weights_for: rules of weights alone, by pattern: {"double_blocks.*": [0.5, 1.0]}.
    report: what is found out about the adapters beside the merge, of which no byte depends on it.
        "full": how much every two of up to 64 overlap, and the norm of every update. "details":
        that also by module, the singular values of some modules, and what share of every update
        the merge keeps, for which each module is gone through once more. "norms": only
        these, which takes half the work where the method itself takes no Grams. "none": neither;
        the factors are read once then, to be checked and merged, by a method that takes none.
    features: a file of `osrm_save_features`, for pre=["osrm_project"]: what layers are given, by
        tasks that are called as the adapters. features_energy: the share of the other tasks' energy
        that this step takes out; None is 0.9.

    Returns a Merged. Raises DomergeError (AdapterError, OptionError, OutputError), one line, for
    whatever cannot be merged exactly or written; nothing is left written then. An OutputWarning
    says what went wrong beside an output that is in its place: an old one could not be removed.
    """
    given = dict(locals())
    for name in (
        "adapters",
        "progress",
        "output",
        "overwrite",
        "force",
        "verify",
        "max_device_memory",
    ):
        del given[name]
    recipe = Recipe.make(**given.pop("method_options"), **given)
    return run(
        recipe,
        adapters,
        max_device_memory=max_device_memory,
        progress=progress,
        output=output,
        overwrite=overwrite,
        force=force,
        verify=verify,
    )


def run(
    recipe: Recipe,
    adapters: Iterable[Source] | None = None,
    *,
    max_device_memory: int | str | None = None,
    progress: Progress = False,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    force: bool = False,
    verify: bool = False,
) -> Merged:
    """Merge as a recipe says; the other arguments, and what is raised, as of `merge`.

    adapters: None for those that the recipe names, at their paths. Of a card, `Recipe.read(card,
    folder)` finds them by their files' sums; the merge is then bitwise what the card stands beside,
    on the same backend and instruction set.
    """
    if asked_for(recipe).needs_base and recipe.base and output is None:
        problem = f"{recipe.form!r} is written, not kept in memory"
        raise OptionError("form", problem, "give an output")
    sources = [x.name for x in recipe.adapters] if adapters is None else adapters
    job = dataclasses.replace(plan_job(recipe, sources, max_device_memory), verify=verify)
    if output is None:
        return job.in_memory(progress)
    return job.written(options.folder("output", output), overwrite, force, progress)


def estimate(
    recipe: Recipe,
    adapters: Iterable[Source] | None = None,
    *,
    max_device_memory: int | str | None = None,
) -> Estimate:
    """What `run` will read, write and take. Reads headers and merges a sample of the modules, which
    it drops; writes nothing. Raises as `merge` does."""
    sources = [x.name for x in recipe.adapters] if adapters is None else adapters
    return of_job(plan_job(recipe, sources, max_device_memory))


def inspect(
    adapters: Iterable[Source],
    *,
    backend: str = "auto",
    device: str = "auto",
    progress: Progress = False,
    base_model: str | None = None,
    against: Source | None = None,
    report: str = FULL,
    features: str | os.PathLike[str] | None = None,
) -> Interference:
    """How much adapters of one base model interfere, from their Gram matrices alone.

    Pairwise overlap of row spaces (A) and column spaces (B), the cosine between the updates, and
    each adapter's norm with its spread over modules; what names were brought together is in its
    notes. against: another adapter, taken for a direction (that of refusals, say): the cosines of
    the adapters with it, by module, are in `direction`. features: a file of `osrm_save_features`:
    how far each adapter moves outputs on other tasks' inputs is in `on_inputs`. report: "full",
    "details" or "norms", as of `merge`, but "full" compares any number of adapters. Raises as
    `merge` does.
    """
    report = options.choose("report", report, (DETAILS, FULL, NORMS))
    loaded, notes = read(adapters, base_model)
    of = None
    if against is not None:
        (*together, other), notes = read([*loaded, against], base_model)
        of = direction.against(together, other)
    given = None
    if features is not None:
        given = on_inputs(loaded, FeaturesFile(options.folder("features", features)))
    plan = Plan.make(loaded, [1.0] * len(loaded))
    where = choose_device(device, loaded)
    details = DetailSums.of(plan.names, len(loaded)) if report == DETAILS else None
    counted = FULL if report == DETAILS else report
    sums = InterferenceSums([a.name for a in loaded], counted, details)
    with shown(progress, len(plan.names)) as show, torch.no_grad():
        chosen = registry.choose(backend, where.type)
        engine.survey(plan, Budget(where), chosen, sums, show)
    for adapter in loaded:
        for file in adapter.inputs:
            file.check()
    found = sums.result()
    assert found
    for k, adapter in enumerate(loaded):
        if adapter.changed:
            what = f"beside its updates it changes {some(adapter.changed)}, which is not compared"
            notes.append(f"{called(k, adapter)}: {what}")
    return dataclasses.replace(found, notes=tuple(notes), direction=of, on_inputs=given)
