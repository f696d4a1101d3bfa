"""What A an adapter starts training with, so that it disturbs other tasks little once it is merged:
`osrm_init` for one task, `osrm_init_all` for each of several."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import options
from ..algebra import subspace
from ..errors import OptionError, is_text
from ..formats.target import Layout
from .features import MEAN, MOMENTS, STATISTICS, Sums, checked, energy_of, passes
from .inputs import Batch
from .layers import Linear, chosen
from .write import Factors, write, written

__all__ = ["Initial", "InitialModule", "osrm_init", "osrm_init_all"]

SMALLEST, PROJECT = "smallest", "project"
UNIT, KAIMING = "unit", "kaiming"
KAIMING_NORM = 1 / math.sqrt(3)
"""Of a row as PEFT draws it: n numbers between -1/√n and 1/√n."""


@dataclass(frozen=True)
class InitialModule:
    """A layer of an initial adapter.

    n: its inputs. off: directions of these that A is orthogonal to. others: energy of the other
    tasks' inputs that A lets through, own: of the task's where it was given; random rows have 1.
    None where only means were kept.
    """

    n: int
    off: int
    others: float | None
    own: float | None


@dataclass(frozen=True)
class Initial:
    """A folder to start training from. tokens: of every task that A was made of, in the layer with
    fewest."""

    path: Path
    task: str
    tokens: Mapping[str, int]
    modules: Mapping[str, InitialModule]

    @property
    def others(self) -> float | None:
        """The mean over the layers; None where only means were kept."""
        found = [x.others for x in self.modules.values() if x.others is not None]
        return sum(found) / len(found) if found else None


@dataclass(frozen=True)
class _Asked:
    rank: int
    alpha: float
    avoid: str
    energy: float
    statistic: str
    norm: str
    seed: int

    @classmethod
    def make(cls, given: Mapping[str, Any]) -> _Asked:
        """Checked; OptionError."""
        alpha = options.check("alpha", given["alpha"], float, low=0.0)
        if alpha == 0:
            raise OptionError("alpha", "0 leaves nothing of the update", "give a positive number")
        energy = options.check("energy", given["energy"], float)
        if not 0 < energy < 1:
            raise OptionError("energy", f"{energy!r} is no share", "give one between 0 and 1")
        return cls(
            options.check("rank", given["rank"], int, low=1),
            alpha,
            options.choose("avoid", given["avoid"], (SMALLEST, PROJECT)),
            energy,
            options.choose("statistic", given["statistic"], STATISTICS),
            options.choose("norm", given["norm"], (UNIT, KAIMING)),
            options.check("seed", given["seed"], int, low=0),
        )

    def generator(self, task: str, layer: str) -> torch.Generator:
        """Of these alone: other layers make no difference, and tasks do not start alike, as those
        do that are trained with one seed."""
        digest = hashlib.sha256(repr((self.seed, task, layer)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def osrm_init(
    model: nn.Module,
    batches: Mapping[str, Iterable[Batch]],
    *,
    task: str,
    target_modules: Sequence[str] | str,
    output: str | os.PathLike[str],
    rank: int = 16,
    alpha: float = 32,
    avoid: str = PROJECT,
    energy: float = 0.99,
    statistic: str = MOMENTS,
    norm: str = UNIT,
    seed: int = 0,
    max_memory: int | str = "4GiB",
    overwrite: bool = False,
    force: bool = False,
) -> Initial:
    """Write a PEFT folder to start training a task's adapter from: rows of A that the inputs of
    other tasks hardly excite, and B = 0.

        peft.PeftModel.from_pretrained(model, "init/", is_trainable=True)

    model: the base model, as torch runs it; its weights are not changed.
    batches: by the names of tasks, unlabelled batches as the model takes them: tensors of token
        numbers [texts, length], or mappings (input_ids, attention_mask, …) in which padding is
        masked; without a mask all tokens count. They are run once, and again as often as
        `max_memory` demands.
    task: the one to be trained. Its own batches may be left out; they are not avoided, and say how
        much of its own inputs A lets through.
    target_modules: as in PEFT, ends of names or a regular expression; linear layers alone.
    rank, alpha: of the adapter.
    avoid: "project": random directions that are orthogonal to the fewest that hold the share
        `energy` of the others' energy. "smallest": the directions in which the others' inputs have
        least energy, which the task's own inputs may have little in, too.
    statistic: "moments": Σ x xᵀ over all tokens x of a task, its trace 1 for each. "mean": the mean
        alone, as the authors' code has it: random directions that are orthogonal to the T - 1
        means, for comparison.
    norm: of a row of A: "unit" 1, "kaiming" 0.577, which PEFT's own initial rows have.
    seed: decides what is left open, for every task and layer another; the same one gives the same
        file on the same machine.
    max_memory: bytes (or "4GiB") that sums may take at once, 4 n² a task and input.
    overwrite, force: as for `merge`.

    Raises DomergeError, one line, for a layer that a task's tokens do not reach, or whose input is
    not finite, and for options that do not fit; nothing is written then.
    Source: arXiv 2505.22934.
    """
    asked = _Asked.make(locals())
    options.text("task", task)
    given = checked(batches)
    if not [name for name in given if name != task]:
        raise OptionError("batches", f"are of {task!r} alone", "give those of other tasks, too")
    paths = {task: options.folder("output", output)}
    most = options.size("max_memory", max_memory)
    return _made(model, given, paths, target_modules, asked, most, overwrite, force)[task]


def osrm_init_all(
    model: nn.Module,
    batches: Mapping[str, Iterable[Batch]],
    *,
    target_modules: Sequence[str] | str,
    output: str | os.PathLike[str],
    rank: int = 16,
    alpha: float = 32,
    avoid: str = PROJECT,
    energy: float = 0.99,
    statistic: str = MOMENTS,
    norm: str = UNIT,
    seed: int = 0,
    max_memory: int | str = "4GiB",
    overwrite: bool = False,
    force: bool = False,
) -> dict[str, Initial]:
    """`osrm_init` for every task of `batches`, each against all others, in the passes of one: the
    folders `output`/TASK, each of which appears whole or not at all."""
    asked = _Asked.make(locals())
    given = checked(batches)
    if len(given) < 2:
        raise OptionError("batches", "are of one task", "give those of other tasks, too")
    folder = options.folder("output", output)
    for task in given:
        if task in (".", "..") or {"/", "\\", "\0"} & set(task):
            raise OptionError("batches", f"{task!r} cannot name a folder", "rename the task")
    paths = {task: folder / task for task in given}
    most = options.size("max_memory", max_memory)
    return _made(model, given, paths, target_modules, asked, most, overwrite, force)


def _made(
    model: nn.Module,
    batches: Mapping[str, Sequence[Batch]],
    paths: Mapping[str, Path],
    target_modules: Sequence[str] | str,
    asked: _Asked,
    most_bytes: int | None,
    overwrite: bool,
    force: bool,
) -> dict[str, Initial]:
    """The folder of each of these tasks, against all others of the batches."""
    linears = chosen(model, target_modules)
    _check_rank(linears.values(), asked.rank)
    made = {task: _Made(asked) for task in paths}
    with contextlib.ExitStack() as outputs:
        places = {
            task: outputs.enter_context(written(path, overwrite, force))
            for task, path in paths.items()
        }
        for one, sums in passes(model, linears, batches, asked.statistic, most_bytes or 0):
            for task, own in made.items():
                own.add([linears[name] for name in one.layers], sums, task)
        for task, own in made.items():
            said = {"task": task, "others": [x for x in batches if x != task], **vars(asked)}
            scales = dict.fromkeys(own.factors, asked.alpha / asked.rank)
            write(places[task], own.layouts, own.factors, scales, _config(model, linears), said)
    return {task: Initial(paths[task], task, own.tokens, own.modules) for task, own in made.items()}


def _config(model: nn.Module, linears: Mapping[str, Linear]) -> dict[str, object]:
    """What a PEFT config says of the base model."""
    name = getattr(model, "name_or_path", None)
    return {
        "base_model_name_or_path": name if is_text(name) and name else None,
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "fan_in_fan_out": any(linear.transposed for linear in linears.values()),
    }


def _check_rank(linears: Iterable[Linear], rank: int) -> None:
    for linear in linears:
        if rank > linear.n:
            problem = f"{rank} is more than the {linear.n} inputs of {linear.name!r}"
            raise OptionError("rank", problem, "say a smaller one, or leave the layer out")


@dataclass
class _Made:
    """What has been made of a task's adapter."""

    asked: _Asked
    layouts: dict[str, Layout] = field(default_factory=dict)
    factors: Factors = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    modules: dict[str, InitialModule] = field(default_factory=dict)

    def add(self, layers: Sequence[Linear], sums: Mapping[str, Sums], task: str) -> None:
        """The layers that share an input, of which these are every task's sums."""
        others = {name: x for name, x in sums.items() if name != task}
        for name, x in others.items():
            self.tokens[name] = min(self.tokens.get(name, x.tokens), x.tokens)
        asked, first = self.asked, layers[0]
        means = asked.statistic == MEAN
        c = None if means else energy_of(first.name, others)
        own = None if means or task not in sums else energy_of(first.name, {task: sums[task]})
        draw, held = self._space(task, first, others, c)
        for layer in layers:
            rows = draw(asked.generator(task, layer.name))
            self.modules[layer.name] = InitialModule(
                layer.n,
                held,
                None if c is None else subspace.seen(rows, c),
                None if own is None else subspace.seen(rows, own),
            )
            shape = (layer.n,)
            self.layouts[layer.name] = Layout(layer.name, "linear", layer.m, shape, asked.rank)
            length = KAIMING_NORM if asked.norm == KAIMING else 1.0
            a = (length * rows).float().cpu()
            self.factors[layer.name] = a, torch.zeros(layer.m, asked.rank)

    def _space(
        self, task: str, layer: Linear, others: Mapping[str, Sums], c: Tensor | None
    ) -> tuple[Callable[[torch.Generator], Tensor], int]:
        """What draws the rows of A, and how many directions these have nothing of."""
        asked, generator = self.asked, self.asked.generator(task, f"{layer.name} and its like")
        if c is not None and asked.avoid == SMALLEST:
            basis = subspace.smallest(c, asked.rank, generator)
            return lambda g: subspace.inside(basis, asked.rank, g), layer.n - basis.shape[1]
        if c is None:
            basis = subspace.spanned(torch.stack([x.unit_mean() for x in others.values()]))
        else:
            basis = subspace.largest(c, asked.energy, None, generator)
        if (held := basis.shape[1]) + asked.rank > layer.n:
            problem = (
                f"{asked.energy} of the energy before {layer.name!r} is in {held} of {layer.n}"
            )
            problem += f" directions, which leaves less than {asked.rank} others"
            raise OptionError("energy", problem, "say a smaller share, or a smaller rank")
        return lambda g: subspace.off(basis, asked.rank, g), held
