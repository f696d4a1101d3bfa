"""A PEFT adapter folder: adapter_config.json, adapter_model.safetensors, README.md.

All modules are written with one rank R, the largest that one of them needs: the others get rows of
zeros under A and columns of zeros beside B. With r = lora_alpha = R and no patterns every reader
scales every module by 1, whether it takes alpha / r (SGLang), alpha over the tensor's own rank
(llama.cpp, TensorRT-LLM) or the patterns (PEFT, vLLM). R has to be known before the first module is
written, so it is what the merge needs at most. A ragged folder has a pattern for every rank.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...adapters import Adapter, AdapterConfig, Kept
from ...adapters.names import PREFIX
from ...adapters.plan import Plan
from ...adapters.whole import lacks_head
from ...errors import some
from ...results.card import CARD, Heading
from ...results.report import Report
from ...storage.stream import SafetensorsWriter, copy_file
from .. import tokenizer
from ..format import Format, holds
from ..merge_folder import MergeFolder
from ..target import Layout, Target
from .read import CONFIG, WEIGHTS, load_folder

__all__ = ["ADAPTER", "WHERE", "PeftFolder", "keys", "largest", "notes", "rank_fields", "target"]

FILES = (CONFIG, WEIGHTS, CARD)

WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields of a config that say which modules it adapts."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for max_lora_rank (0.33); it serves no adapter of a larger rank."""


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
    ranks = ranks or plan.ranks
    layouts = {}
    for name in plan.names:
        module = plan.module(name)
        shape = module.a_shape[1:]
        layouts[name] = Layout(name, module.kind, module.m, shape, ranks[name])
    merging = [a for a, w in zip(plan.adapters, plan.weights) if w != 0]
    config = _config(merging, plan.names, base_model, whole)
    inputs = frozenset(a.file.path.parent.resolve() for a in plan.adapters if a.file)
    files = tuple(file for a in plan.adapters for file in a.inputs)
    return Target(config, layouts, whole, dtype, inputs, files, ragged=ragged)


def _config(
    adapters: Sequence[Adapter], names: Sequence[str], base_model: str | None, whole: Kept
) -> dict[str, object]:
    """The fields that do not depend on ranks.

    Where the adapters name their modules alike, in lists, and adapt the same ones, their own
    selection is kept; otherwise every module is named in full.
    """
    configs = [a.config for a in adapters]
    first = configs[0]
    where = _selection(first)
    alike = all(_selection(c) == where for c in configs[1:])
    same = all(set(a.modules) == set(names) for a in adapters)
    listed = isinstance(first.target_modules, list) and first.target_modules
    if not (alike and same and listed):
        where = dict.fromkeys(WHERE) | {"target_modules": _exactly(names)}

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


def _exactly(names: Sequence[str]) -> list[str] | str:
    """`target_modules` for these modules and no others.

    PEFT takes a name in a list also for the end of a longer dotted name. Where an outermost module
    ends another one's name, a regular expression is needed, which PEFT matches whole and SGLang
    does not take.
    """
    if not _ambiguous(names):
        return sorted(names)
    return "|".join(re.escape(name) for name in sorted(names))


def _ambiguous(names: Sequence[str]) -> list[str]:
    """The outermost modules that end another one's name."""
    endings = {name.rpartition(".")[2] for name in names if "." in name}
    return sorted(endings.intersection(names))


def keys(layout: Layout) -> tuple[str, str]:
    """The names of A and B in the file."""
    stem = f"{PREFIX}{layout.name}.lora_"
    if layout.kind == "embedding":
        return f"{stem}embedding_A", f"{stem}embedding_B"
    return f"{stem}A.weight", f"{stem}B.weight"


def rank_fields(ranks: Mapping[str, int]) -> dict[str, object]:
    """r, lora_alpha and the patterns for modules of these ranks: every scaling is 1.

    PEFT tries every pattern on every module and matches it against the end of the name, so there
    is one anchored pattern for each rank that is not r. r is the largest: servers size their memory
    by it.
    """
    largest = max(ranks.values())
    members: dict[int, list[str]] = {}
    for name, rank in ranks.items():
        if rank != largest:
            members.setdefault(rank, []).append(re.escape(name))
    pattern = {f"^(?:{'|'.join(n)})": r for r, n in sorted(members.items())}
    return {"r": largest, "lora_alpha": largest, "rank_pattern": pattern, "alpha_pattern": pattern}


def notes(target: Target, ranks: Collection[int]) -> tuple[str, ...]:
    """What whoever serves the adapter has to know. ranks: those of its modules in memory."""
    rank = target.rank or max(ranks)
    found = []
    if target.ragged and len(set(ranks)) > 1:
        found.append(
            f"modules have ranks from {min(ranks)} to {rank} (ragged): llama.cpp and TensorRT-LLM "
            "scale such adapters wrongly, SGLang refuses them"
        )
    if allowed := [r for r in VLLM_RANKS if r >= rank]:
        found.append(f"written with rank {rank}: serve it with vLLM's --max-lora-rank {allowed[0]}")
    else:
        most = VLLM_RANKS[-1]
        found.append(f"written with rank {rank}, vLLM serves {most} at most: --rank {most} cuts it")
    if isinstance(target.config["target_modules"], str):
        names = ", ".join(_ambiguous(list(target.layouts)))
        found.append(
            f"target_modules is a regular expression, which SGLang refuses: {names} ends the names "
            "of other modules too"
        )
    if target.carried:
        saved = some([key.removeprefix(PREFIX) for key in target.carried], 1)
        found.append(
            f"{saved}: saved whole, which SGLang does not load and vLLM refuses (but for "
            "classifier and score)"
        )
    return tuple(found)


class PeftFolder(MergeFolder):
    """Writes a merged adapter module by module, padded to one rank unless the target is ragged."""

    heading = Heading("Merged LoRA adapter", "peft")

    def __init__(self, path: Path, target: Target, overwrite: bool, force: bool = False) -> None:
        super().__init__(path, target, overwrite, force, (*FILES, *tokenizer.FILES))
        self._ranks: dict[str, int] = {}
        self._shapes = dict(largest(target, target.rank))

    def _open(self, folder: Path, files: contextlib.ExitStack) -> None:
        self._writer = files.enter_context(SafetensorsWriter(folder / WEIGHTS, self._shapes))

    def add(self, name: str, a: Tensor, b: Tensor) -> None:
        """A [k, n] and B [m, k] of a module, with ΔW = B A."""
        layout = self._target.layouts[name]
        if self._target.rank is not None:
            missing = self._target.rank - a.shape[0]
            a, b = _longer(a, missing), _longer(b.T, missing).T
        for key, tensor in zip(keys(layout), layout.stored(a, b)):
            self._writer.add(key, tensor.to(self._target.dtype))
        self._ranks[name] = a.shape[0]

    def finish(self, report: Report) -> None:
        """Everything but the merged factors: carried tensors, tokenizer, config and card."""
        for key, tensor in self._target.carried.items():
            self._writer.add_pieces(key, tensor)
        for file in self._target.copied:
            copy_file(file, self._folder / file.path.name)
        self._write_json(CONFIG, dict(self._target.config) | rank_fields(self._ranks))
        self._write_card(report)


def _longer(x: Tensor, rows: int) -> Tensor:
    """x with so many rows of zeros below it."""
    if rows < 0:
        raise AssertionError(f"a module has rank {len(x)}, more than was planned")
    return torch.cat([x, x.new_zeros(rows, x.shape[1])]) if rows else x


def largest(
    target: Target, rank: int | None = None
) -> Iterable[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """The dtype and the largest shape of every tensor, by key. rank: of all modules, None: each
    one's own."""
    for layout in target.layouts.values():
        key_a, key_b = keys(layout)
        rank_of, ones = rank or layout.largest_rank, (1,) * (len(layout.inputs) - 1)
        yield key_a, (target.dtype, (rank_of, *layout.inputs))
        yield key_b, (target.dtype, (layout.m, rank_of, *ones))
    for key, tensor in target.carried.items():
        yield key, (tensor.dtype, tensor.shape)


ADAPTER = Format(
    "adapter",
    "a PEFT folder: A and B of every module",
    functools.partial(holds, file=WEIGHTS),
    load_folder,
    PeftFolder,
    notes=notes,
)
