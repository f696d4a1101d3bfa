"""Of a trained adapter, what does not touch the inputs of other tasks: τ (I - V Vᵀ), V [n, k] being
the directions that hold most of their energy."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import options
from ..adapters import Adapter
from ..adapters.style import MODEL
from ..algebra import subspace
from ..errors import AdapterError, OptionError, printable, some
from ..formats import load
from ..formats.target import Layout
from ..reading import Source
from ..storage import features_file
from ..storage.features_file import FeaturesFile
from ..storage.lazy import MemoryTensor
from ..storage.replacing import check_apart
from .features import MOMENTS, checked, energy_of, inputs_of, passes
from .inputs import Batch
from .layers import chosen
from .write import write, written

__all__ = [
    "Projected",
    "ProjectedModule",
    "energies",
    "osrm_features",
    "osrm_project",
    "osrm_save_features",
    "projected",
]


@dataclass(frozen=True)
class ProjectedModule:
    """A module of a projected adapter.

    off: the directions that were taken out. kept: of ||τ||². before, after: tr(τ C τᵀ) n / (||τ||²
    tr C), how far the update moves outputs on the others' inputs, 1 being as far as on inputs
    without any preferred direction; after: of what is left.
    """

    off: int
    kept: float
    before: float
    after: float


@dataclass(frozen=True)
class Projected:
    """adapter: to be merged. path: where it was written. kept: the share of Σ ||τ||² over all
    modules."""

    adapter: Adapter
    path: Path | None
    kept: float
    modules: Mapping[str, ProjectedModule]


def osrm_features(
    model: nn.Module,
    batches: Mapping[str, Iterable[Batch]],
    *,
    target_modules: Sequence[str] | str,
    task: str | None = None,
    max_memory: int | str = "4GiB",
) -> dict[str, Tensor]:
    """What the inputs x of layers are on these tasks but one: the mean over tasks of Σ x xᵀ / Σ xᵀx
    [n, n], float32, by layer. Layers with one input share the tensor.

    task: the one that is left out. The rest as for `osrm_init`, which raises the same.
    """
    most = options.size("max_memory", max_memory)
    found = energies(model, batches, target_modules, task, most or 0)
    return {name: c for names, c in found for name in names}


def osrm_save_features(
    model: nn.Module,
    batches: Mapping[str, Iterable[Batch]],
    *,
    target_modules: Sequence[str] | str,
    output: str | os.PathLike[str],
    max_memory: int | str = "4GiB",
    overwrite: bool = False,
    force: bool = False,
) -> Path:
    """Write what layers are given, by task, to one safetensors file: C = Σ x xᵀ / Σ xᵀx [n, n] of
    every task and input, 4 n² bytes each. `merge(pre=["osrm_project"], features=)`,
    `inspect(features=)` and `osrm_project` take it. The arguments and what is raised are as of
    `osrm_init`.
    """
    most = options.size("max_memory", max_memory) or 0
    given, path = checked(batches), options.folder("output", output)
    linears = chosen(model, target_modules)
    inputs = inputs_of(model, linears, given)
    found = (
        {task: energy_of(one.first, {task: own}) for task, own in sums.items()}
        for one, sums in passes(model, linears, given, MOMENTS, most, inputs)
    )
    sizes = [(one.layers, one.n) for one in inputs]
    features_file.write(path, [*given], sizes, found, overwrite, force)
    return path


def energies(
    model: nn.Module,
    batches: Mapping[str, Iterable[Batch]],
    target_modules: Sequence[str] | str,
    task: str | None,
    most_bytes: int,
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """`osrm_features` as they are found, with the layers that share them."""
    given = checked({name: own for name, own in checked(batches).items() if name != task})
    linears = chosen(model, target_modules)
    for one, sums in passes(model, linears, given, MOMENTS, most_bytes):
        yield one.layers, energy_of(one.first, sums).div_(len(sums)).float()


def osrm_project(
    adapter: Source,
    features: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    task: str | None = None,
    energy: float | None = None,
    k: int | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    force: bool = False,
) -> Projected:
    """Take out of an adapter what other tasks' inputs excite: A (I - V Vᵀ), B as it is.

    adapter: a PEFT folder, an id on the Hub, or an adapter from `load` or `from_tensors`.
    features: C [n, n] of the others' inputs by module, as `osrm_features` has them, or a file of
        `osrm_save_features`; all modules of the adapter are needed. task: the adapter's own in the
        file, which is left out; None where the file is of others alone.
    energy, k: V is the fewest eigenvectors that hold this share of tr C (0.9 where nothing is
        said), or this number of them.
    output: a PEFT folder to write, in the dtypes of the adapter. Without it the adapter in the
        result goes into `merge`. overwrite, force: as for `merge`.

    Nothing is trained afterwards; the result says what is left of every update. Raises AdapterError
    for an update that is no product of factors of a linear layer, or of which nothing is left;
    OptionError for features that do not fit. Source: arXiv 2505.22934, whose code fits B anew to
    r random directions instead, and so keeps r / n of the update.
    """
    found: Iterable[tuple[Sequence[str], Tensor]]
    if isinstance(features, (str, os.PathLike)):
        found = _of_file(FeaturesFile(options.folder("features", features)), task)
    elif isinstance(features, Mapping) and task is None:
        found = [((name,), c) for name, c in features.items()]
    else:
        problem = "are of other tasks already" if task else f"are a {type(features).__name__}"
        remedy = "leave task out" if task else "give C by module (osrm_features), or a file"
        raise OptionError("features", problem, remedy)
    return projected(adapter, found, energy, k, output, overwrite, force)


def _of_file(file: FeaturesFile, task: str | None) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Of every input that layers share, these and the mean over the other tasks."""
    if task is not None and task not in file.tasks:
        problem = f"are of {some(file.tasks)}, not of {task!r}"
        raise OptionError("features", problem, "name one of these, or leave it out")
    for number in range(max(file.inputs.values()) + 1):
        names = tuple(name for name, k in file.inputs.items() if k == number)
        yield names, file.others(names[0], task)
    file.input.check()


def projected(
    adapter: Source,
    features: Iterable[tuple[Sequence[str], Tensor]],
    energy: float | None,
    k: int | None,
    output: str | os.PathLike[str] | None,
    overwrite: bool,
    force: bool,
) -> Projected:
    """`osrm_project` with the modules that share a C, one C at a time."""
    if energy is not None and k is not None:
        raise OptionError("k", "is given, and energy, too", "give one of both")
    energy = 0.9 if energy is None and k is None else energy
    if energy is not None and not 0 < options.check("energy", energy, float) < 1:
        raise OptionError("energy", f"{energy!r} is no share", "give one between 0 and 1")
    if k is not None:
        options.check("k", k, int, low=1)
    path = None if output is None else options.folder("output", output)
    found = adapter if isinstance(adapter, Adapter) else load(adapter)
    _check(found)
    if path and found.folder:
        check_apart(path, found.folder, "the adapter to project")
    stored = {}
    modules: dict[str, ProjectedModule] = {}
    norms: list[tuple[float, float]] = []
    for names, c in features:
        own = [name for name in names if name in found.modules]
        if own:
            _check_features(own[0], c, found.modules[own[0]].n, k)
            basis = subspace.largest(c, energy, k, torch.Generator().manual_seed(0))
        for name in own:
            a, b = found.factors(name)
            less, modules[name], both = _less(found.name, name, a, b, basis, c)
            norms.append(both)
            shape = (len(a), *found.modules[name].a_shape[1:])
            stored[name] = MemoryTensor(less.to(a.dtype).reshape(shape)), MemoryTensor(b)
    if missing := sorted(found.modules.keys() - stored.keys()):
        problem = f"have nothing of {some(missing)}, which the adapter has"
        raise OptionError("features", problem, "name all its modules in target_modules")
    kept = math.fsum(after for _, after in norms) / math.fsum(before for before, _ in norms)
    ordered = {name: stored[name] for name in found.modules}
    made = dataclasses.replace(
        found, name=f"{found.name} (projected)", stored=ordered, inputs=(), style=None
    )
    if path:
        _write(path, made, energy, k, overwrite, force)
    for file in found.inputs:
        file.check()
    return Projected(made, path, kept, {name: modules[name] for name in found.modules})


def _check(adapter: Adapter) -> None:
    """AdapterError for what is no LoRA of linear layers under the model's own names."""
    if adapter.style and adapter.style.names != MODEL:
        problem = f"has the format {adapter.style.format!r}, whose modules are called otherwise"
        raise AdapterError(adapter.name, None, problem, "convert it first (format peft)")
    if adapter.magnitudes:
        problem = "is a DoRA, whose update is not B A"
        raise AdapterError(adapter.name, None, problem, "project a plain LoRA")
    for name, module in adapter.modules.items():
        if module.kind != "linear" or module.slice:
            problem = "is no linear layer, and only of these inputs are known"
            raise AdapterError(adapter.name, name, problem, "train linear layers alone")


def _check_features(name: str, c: Tensor, n: int, k: int | None) -> None:
    if not isinstance(c, Tensor) or c.shape != (n, n) or not c.is_floating_point():
        shape = list(c.shape) if isinstance(c, Tensor) else type(c).__name__
        problem = f"of {name!r} are {shape}, and it has {n} inputs"
        raise OptionError("features", problem, f"give C of shape [{n}, {n}]")
    size = c.abs().max()
    if not torch.isfinite(size) or (c - c.T).abs().max() > 1e-3 * size or c.trace() <= 0:
        problem = f"of {name!r} are no Σ x xᵀ (NaN, not symmetric, or no energy)"
        raise OptionError("features", problem, "make them by osrm_features")
    if k is not None and k >= n:
        problem = f"{k} leaves nothing of {name!r}, which has {n} inputs"
        raise OptionError("k", problem, "say a smaller one, or an energy")


def _less(
    adapter: str, name: str, a: Tensor, b: Tensor, basis: Tensor, c: Tensor
) -> tuple[Tensor, ProjectedModule, tuple[float, float]]:
    """A (I - V Vᵀ) [r, n], what is to be said, and ||τ||² before and after."""
    gram = b.double().T @ b.double()
    whole, c = a.double(), c.to(a.device).double()
    basis = basis.to(a.device)
    less = subspace.less(whole, basis)
    before, after = (float((gram * (x @ x.T)).sum()) for x in (whole, less))
    if not math.isfinite(before):
        raise AdapterError(adapter, name, "NaN or an infinite value", "train it again")
    if before == 0:
        problem = "its update is zero: it has not been trained"
        raise AdapterError(adapter, name, problem, "leave it out, or train it")
    if after <= subspace.NOTHING**2 * before:
        problem = f"nothing is left of its update off {basis.shape[1]} of {len(basis)} directions"
        raise AdapterError(adapter, name, problem, "say a smaller energy or k")
    moved = [subspace.moved(gram, x, c) for x in (whole, less)]
    return less, ProjectedModule(basis.shape[1], after / before, *moved), (before, after)


def _write(
    path: Path, made: Adapter, energy: float | None, k: int | None, overwrite: bool, force: bool
) -> None:
    if made.changed:
        problem = f"changes {some(made.changed)} besides, which is not written"
        raise AdapterError(made.name, None, problem, "give no output, and merge it")
    layouts, factors, scales = {}, {}, {}
    for name, module in made.modules.items():
        layouts[name] = Layout(name, module.kind, module.m, module.a_shape[1:], module.rank)
        factors[name] = made.factors(name)
        scales[name] = module.scaling
    config = {
        field: getattr(made.config, field)
        for field in (
            *("base_model_name_or_path", "revision", "task_type", "auto_mapping"),
            *("fan_in_fan_out", "modules_to_save", "layer_replication"),
        )
    }
    name = printable(os.path.basename(os.path.normpath(made.name)))
    said = {"projected": name, "energy": energy, "k": k}
    with written(path, overwrite, force) as folder:
        write(folder, layouts, factors, scales, config, said, made.carried)
