"""A PEFT adapter folder: adapter_config.json, adapter_model.safetensors, README.md.

All modules are written with one rank R, the largest that one of them needs: the others get rows of
zeros under A and columns of zeros beside B. With r = lora_alpha = R and no patterns every reader
scales every module by 1, whether it takes alpha / r (SGLang), alpha over the tensor's own rank
(llama.cpp, TensorRT-LLM) or the patterns (PEFT, vLLM). R has to be known before the first module is
written, so it is what the merge needs at most. A ragged folder has a pattern for every rank.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...adapters import Adapter, AdapterConfig, Kept
from ...adapters.names import PREFIX
from ...adapters.parts import Parts
from ...adapters.plan import Plan
from ...adapters.whole import lacks_head
from ...errors import DomergeError
from ...results.card import CARD, Heading
from ...results.report import Report
from ...storage.stream import SafetensorsWriter, copy_file
from .. import tokenizer
from ..format import EACH, Format, Holds, has_file
from ..merge_folder import MergeFolder
from ..target import Layout, Layouts, Target
from .beside import fields, written
from .gather import Gathered, joined
from .parameters import BASE, order, owner_of
from .read import CONFIG, PICKLE, WEIGHTS, load_folder

__all__ = [
    "PEFT",
    "WHERE",
    "PeftFolder",
    "exactly",
    "keys",
    "largest",
    "rank_fields",
    "target",
    "wrappers",
]

FILES = (CONFIG, WEIGHTS, CARD)

WHERE = (
    *("target_modules", "target_parameters", "exclude_modules"),
    *("layers_to_transform", "layers_pattern"),
)
"""Fields of a config that say which modules it adapts."""


def target(
    plan: Plan,
    dtype: torch.dtype,
    base_model: str | None,
    whole: Kept,
    ranks: Mapping[str, int] | None = None,
    ragged: bool = False,
) -> Target:
    """What the merge of a plan is written as; `copied` is left to the caller. ranks: what every
    module's rank is at most, None: that of the stacked adapters."""
    ranks = plan.ranks if ranks is None else ranks
    merging = [a for a, w in zip(plan.adapters, plan.weights) if w != 0]
    config = _config(merging, plan, base_model, whole)
    inputs = frozenset(a.folder.resolve() for a in plan.adapters if a.folder)
    files = tuple(file for a in plan.adapters for file in a.inputs)
    layouts = Layouts(plan, ranks)
    return Target(config, layouts, whole, dtype, inputs, files, ragged=ragged)


def _config(
    adapters: Sequence[Adapter],
    plan: Plan,
    base_model: str | None,
    whole: Kept,
) -> dict[str, object]:
    """The fields that do not depend on ranks.

    Where the adapters name their modules alike, in lists, and adapt the same ones, their own
    selection is kept; otherwise every module is named in full.
    """
    configs = [a.config for a in adapters]
    first = configs[0]
    where = _selection(first)
    alike = all(_selection(c) == where for c in configs[1:])
    same = plan.is_uniform or all(a.modules.keys() == {*plan.names} for a in adapters)
    names: Sequence[str] = plan.names
    parameters: list[str] = []
    if plan.is_sliced:
        modules = plan.described
        names = [name for name, x in modules.items() if not x.slice]
        parameters = sorted({x.parameter for x in modules.values() if x.slice})
    listed = isinstance(first.target_modules, list) and bool(first.target_modules) == bool(names)
    if not (alike and same and listed):
        parts = Parts(names) if plan.is_sliced else plan.parts
        where = dict.fromkeys(WHERE) | {"target_modules": exactly(names, parts)}
        where["target_parameters"] = parameters or None

    def stated(field: str) -> object:
        return next((v for c in configs if (v := getattr(c, field))), None)

    headless = any(lacks_head(config, whole.modules_to_save) for config in configs)
    return {
        "peft_type": "LORA",
        "task_type": None if headless else stated("task_type"),
        "auto_mapping": stated("auto_mapping"),
        "base_model_name_or_path": base_model or stated("base_model_name_or_path"),
        "revision": stated("revision"),
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": any(c.fan_in_fan_out for c in configs),
        "init_lora_weights": True,
        "layer_replication": first.layer_replication,
        "lora_dropout": 0.0,
        "modules_to_save": whole.modules_to_save,
        "use_dora": False,
        "use_rslora": False,
        **where,
    }


def _selection(config: AdapterConfig) -> dict[str, object]:
    """Which modules a config adapts; PEFT writes its sets as lists in any order."""
    values = {field: getattr(config, field) for field in WHERE}
    return {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in values.items()}


def exactly(names: Sequence[str], parts: Parts | None = None) -> list[str] | str:
    """`target_modules` for these modules and no others. parts: theirs, if they are known.

    PEFT takes a name in a list also for the end of a longer dotted name. Where an outermost module
    ends another one's name, a regular expression is needed, which PEFT matches whole and SGLang
    does not take.
    """
    parts = parts or Parts(names)
    if not parts.ambiguous:
        return sorted(names)
    return "|".join(re.escape(name) for name in sorted(names))


def wrappers(layouts: Collection[Layout]) -> dict[str, str]:
    """The paths of the wrappers that adapt these modules' parameters, by parameter. DomergeError
    where nothing says how they lie in each other."""
    owners: dict[str, dict[str, int]] = {}
    for layout in layouts:
        if layout.slice:
            owner = owners.setdefault(owner_of(layout.parameter), {})
            owner.setdefault(layout.parameter, layout.slice.depth)
    return {p: path for owner, depths in owners.items() for p, path in _nested(owner, depths)}


def _nested(owner: str, depths: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    if sorted(depths.values()) != [*range(len(depths))]:
        # Not all adapters have all of them.
        if (found := order([*depths])) is None:
            names = ", ".join(map(repr, sorted(depths)))
            problem = f"adapters adapt different ones of {names}, whose order no file says"
            raise DomergeError(f"{problem}; merge adapters of the same parameters")
        depths = {name: k for k, name in enumerate(reversed(found))}
    for name, depth in depths.items():
        yield name, f"{owner}{depth * BASE}"


def keys(layout: Layout, path: str | None = None) -> tuple[str, str]:
    """The names of A and B in the file. path: of the module or wrapper, if that is not its name."""
    stem = f"{PREFIX}{path or layout.name}.lora_"
    if layout.kind == "embedding":
        return f"{stem}embedding_A", f"{stem}embedding_B"
    return f"{stem}A.weight", f"{stem}B.weight"


def rank_fields(
    ranks: Mapping[str, int], scales: Mapping[str, float] | None = None
) -> dict[str, object]:
    """r, lora_alpha and the patterns for modules of these ranks and scales, which are 1 where
    nothing is said. r is the largest: servers size their memory by it; lora_alpha is what most
    modules of that rank have."""
    largest = max(ranks.values())
    alphas = {name: _alpha((scales or {}).get(name, 1.0), rank) for name, rank in ranks.items()}
    counts = Counter(alphas[name] for name, rank in ranks.items() if rank == largest)
    usual = counts.most_common(1)[0][0]
    return {
        "r": largest,
        "lora_alpha": usual,
        "rank_pattern": _pattern(ranks, largest),
        "alpha_pattern": _pattern(alphas, usual),
    }


def _alpha(scale: float, rank: int) -> float:
    """alpha with alpha / rank = scale, to the bit where there is one; a whole number where it is
    one."""
    near = scale * rank
    tried = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    found = next((alpha for alpha in tried if alpha / rank == scale), near)
    return int(found) if found == int(found) else found


def _pattern(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """PEFT tries every pattern on every module and matches it against the end of the name, so there
    is one anchored pattern for each value that is not the usual one."""
    members: dict[float, list[str]] = {}
    for name, value in values.items():
        if value != usual:
            members.setdefault(value, []).append(re.escape(name))
    return {f"^(?:{'|'.join(names)})": x for x, names in sorted(members.items())}


class PeftFolder(MergeFolder):
    """Writes a merged adapter module by module, padded to one rank unless the target is ragged."""

    heading = Heading("Merged LoRA adapter", "peft")

    def __init__(self, path: Path, target: Target, overwrite: bool, force: bool = False) -> None:
        super().__init__(path, target, overwrite, force, (*FILES, *tokenizer.FILES))
        self._ranks: dict[str, int] = {}
        self._scales: dict[str, float] = {}
        self._shapes = dict(largest(target, target.rank))
        self._wrappers = wrappers(target.layouts.values())
        self._gathered = Gathered(target.layouts.values(), target.dtype)
        numbered = any(layout.is_numbered for layout in target.layouts.values())
        self.is_placed = target.rank is not None and not numbered

    def _open(self, folder: Path, files: contextlib.ExitStack) -> None:
        if self.is_placed:  # of one rank, wherever they are added
            for layout in self._target.layouts.values():
                self._note(layout, self._target.rank or 0)
        writer = SafetensorsWriter(
            folder / WEIGHTS, self._shapes, placed=self.is_placed, attached=self.is_attached
        )
        self._writer = files.enter_context(writer)

    def add(self, name: str, a: Tensor, b: Tensor) -> None:
        """A [k, n] and B [m, k] of a module, with ΔW = B A."""
        layout, rank = self._target.layouts[name], self._target.rank
        if not layout.is_numbered:
            a, b = self._target.padded(a, b)
            self._write(layout, a, b, len(a))
        elif pairs := self._gathered.add(layout, a, b):
            assert layout.slice
            rank = rank or max(len(a) for a, _ in pairs.values())
            self._write(layout, *joined(pairs, layout.slice.count, rank), rank)

    def _write(self, layout: Layout, a: Tensor, b: Tensor, rank: int) -> None:
        for key, tensor in zip(keys(layout, self._wrappers.get(layout.key)), layout.stored(a, b)):
            self._writer.add(key, tensor.to(self._target.dtype))
        self._note(layout, rank)

    def _note(self, layout: Layout, rank: int) -> None:
        self._ranks[layout.key] = rank
        self._scales[layout.key] = self._target.scale(layout.name)

    def finish(self, report: Report) -> None:
        """Everything but the merged factors: modules of zeros, carried tensors, tokenizer, config
        and card."""
        for name in self._target.empty:
            layout = self._target.layouts[name]
            self.add(name, torch.zeros(1, math.prod(layout.inputs)), torch.zeros(layout.m, 1))
        for key, tensor in (*self._target.carried.items(), *written(self._target)):
            self._writer.add_pieces(key, tensor)
        for file in self._target.copied:
            copy_file(file, self._folder / file.path.name)
        config = (
            dict(self._target.config)
            | rank_fields(self._ranks, self._scales)
            | fields(self._target)
        )
        self._write_json(CONFIG, config)
        self._write_card(report)


def largest(
    target: Target, rank: int | None = None
) -> Iterable[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """The dtype and the largest shape of every tensor, by key. rank: of all modules, None: each
    one's own."""
    paths = wrappers(target.layouts.values())
    most: dict[str, int] = {}
    for x in target.layouts.values():
        most[x.key] = max(most.get(x.key, 0), x.largest_rank)
    for layout in {x.key: x for x in target.layouts.values()}.values():
        key_a, key_b = keys(layout, paths.get(layout.key))
        count = layout.slice.count if layout.slice else 1
        for key, shape in zip((key_a, key_b), layout.shapes(count * (rank or most[layout.key]))):
            yield key, (target.dtype, shape)
    for key, tensor in (*target.carried.items(), *written(target)):
        yield key, (tensor.dtype, tensor.shape)


PEFT = Format(
    "peft",
    "a PEFT folder: A and B of every module",
    lambda path: has_file(path, WEIGHTS) or has_file(path, PICKLE),
    load_folder,
    PeftFolder,
    holds=Holds(
        ranks=True,
        whole=True,
        convolutions=True,
        embeddings=True,
        experts=True,
        biases=True,
        rows=True,
        scales=EACH,
    ),
    files=(CONFIG, WEIGHTS),
)
