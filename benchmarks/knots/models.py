"""What the sets are scored with: CLIP with zero-shot heads, and Llama with a head for each task."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from knots_sets import Task
from prompts import TEMPLATES, class_names
from torch import Tensor

import domerge_fast as dm
from domerge_fast.errors import AdapterError, DomergeError, OptionError

Batch = tuple[Mapping[str, Tensor], Tensor]
Rows = Mapping[str, Any]
"""A task's datasets by split."""


def library(name: str, package: str) -> Any:
    """A module that only the benchmarks need; DomergeError, in one line, where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DomergeError(f"{package} is not installed; pip install {package}") from error


def heads_in(path: Path, tasks: Iterable[str]) -> dict[str, Tensor]:
    """Heads [classes, d]: from TASK_head.pt of a folder, or from a file with a dict of them all."""
    try:
        if path.is_dir():
            found = {name: _loaded(path / f"{name}_head.pt") for name in tasks}
        else:
            whole = _loaded(path)
            found = {name: whole[name] for name in tasks}
    except OSError as error:
        problem = f"cannot be read ({error.strerror}: {error.filename})"
        raise OptionError("heads", problem, "give a file or folder as in README.md") from error
    except KeyError as error:
        raise OptionError("heads", f"has none of {error}", "leave it out, or add it") from error
    return found


def _loaded(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _from_pretrained(kind: str, base: str, **given: Any) -> Any:
    """What transformers' class of this name loads."""
    loaded = getattr(library("transformers", "transformers"), kind)
    try:
        return loaded.from_pretrained(base, **given)
    except (OSError, ValueError) as error:
        problem = f"{base!r} cannot be loaded ({error})"
        raise OptionError("base", problem, "name a folder or an id of the base model") from error


def _weight(tower: torch.nn.Module, module: str) -> Tensor:
    try:
        return tower.get_submodule(module).weight
    except AttributeError as error:
        problem = f"they change {module!r}, which the base does not have"
        raise OptionError("adapters", problem, "give those of this base") from error


class Images:
    """CLIP: features of its vision tower, which the adapters change, against those of texts.

    weight: of a module, by the adapters' name of it. collate: from a list of rows to inputs and
    labels. logits: [batch, classes], for a head [classes, d]. heads: those that are not given.
    """

    def __init__(self, base: str, device: str, dtype: torch.dtype) -> None:
        library("PIL", "pillow")
        self.model = _from_pretrained("CLIPModel", base, dtype=dtype).to(device).eval()
        self.processor = _from_pretrained("CLIPImageProcessor", base)
        self.base, self.device, self.dtype = base, device, dtype

    def weight(self, module: str) -> Tensor:
        return _weight(self.model.vision_model, module.removeprefix("vision_model."))

    def collate(self, task: Task) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        return functools.partial(_images, self.processor)

    def logits(self, inputs: Mapping[str, Tensor], head: Tensor) -> Tensor:
        pixels = inputs["pixel_values"].to(self.device, self.dtype)
        features = self.model.vision_model(pixel_values=pixels).pooler_output
        features = self.model.visual_projection(features).float()
        return torch.nn.functional.normalize(features) @ head.to(self.device, torch.float32).mT

    def heads(
        self, tasks: Mapping[str, Task], rows: Mapping[str, Rows], adapters: Sequence[dm.Adapter]
    ) -> dict[str, Tensor]:
        tokenizer = _from_pretrained("AutoTokenizer", self.base)
        return {name: self._head(name, rows[name]["test"], tokenizer) for name in tasks}

    @torch.no_grad()
    def _head(self, task: str, rows: Any, tokenizer: Any) -> Tensor:
        """[classes, d]: the direction of the mean over templates of normalized text features. The
        factor exp(logit_scale) of the published heads is left out: it changes no argmax."""
        names = class_names(task, getattr(rows.features["label"], "names", ()))
        if not names or None in names:
            problem = f"{task!r} has labels without names, or with unknown ones"
            raise OptionError("data", problem, "put a copy with names there, or give --heads")
        features = []
        for name in names:
            texts = [template.format(name) for template in TEMPLATES[task]]
            tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            found = self.model.text_model(**tokens.to(self.device)).pooler_output
            found = self.model.text_projection(found).float()
            features.append(torch.nn.functional.normalize(found).mean(0))
        return torch.nn.functional.normalize(torch.stack(features))


class Sentences:
    """Llama with a linear layer of three classes on the last token of a pair of sentences; the
    methods of Images."""

    def __init__(self, base: str, device: str, dtype: torch.dtype) -> None:
        kind = "AutoModelForSequenceClassification"
        self.model = _from_pretrained(kind, base, num_labels=3, dtype=dtype).to(device).eval()
        self.tokenizer = _from_pretrained("AutoTokenizer", base, padding_side="right")
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = self.tokenizer.eos_token_id
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.device = device

    def weight(self, module: str) -> Tensor:
        return _weight(self.model, module)

    def collate(self, task: Task) -> Callable[[Sequence[Mapping[str, Any]]], Batch]:
        return functools.partial(_pairs, self.tokenizer, task.columns)

    def logits(self, inputs: Mapping[str, Tensor], head: Tensor) -> Tensor:
        self.model.score.weight.copy_(head)
        return self.model(**{name: x.to(self.device) for name, x in inputs.items()}).logits.float()

    def heads(
        self, tasks: Mapping[str, Task], rows: Mapping[str, Rows], adapters: Sequence[dm.Adapter]
    ) -> dict[str, Tensor]:
        return {name: _saved_head(adapter) for name, adapter in zip(tasks, adapters)}


Model = Images | Sentences


def _images(processor: Any, rows: Sequence[Mapping[str, Any]]) -> Batch:
    inputs = processor([row["image"].convert("RGB") for row in rows], return_tensors="pt")
    return inputs, torch.tensor([row["label"] for row in rows])


def _pairs(tokenizer: Any, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Batch:
    first, second = ([row[column] for row in rows] for column in columns)
    given = {"truncation": True, "max_length": 2000, "padding": True, "return_tensors": "pt"}
    return tokenizer(first, second, **given), torch.tensor([row["label"] for row in rows])


def _saved_head(adapter: dm.Adapter) -> Tensor:
    """What the adapter saved whole of its `score` layer."""
    for key, tensor in adapter.carried.items():
        if key.endswith("score.weight"):
            return tensor.read()
    raise AdapterError(adapter.name, None, "has saved no head (score)", "give --heads heads.pt")
