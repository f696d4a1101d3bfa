"""A model folder of Hugging Face, as it lies on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters.safetensors_file import FileTensor, SafetensorsFile
from ..errors import AdapterError, OptionError
from .card import CARD

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"

_WEIGHTS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf"),
    *(".h5", ".msgpack", ".onnx", ".onnx_data", ".ot"),
)
_AGAIN = "download or save it again"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A base model. tensors: by parameter name; nothing is read yet. starts: by file with weights,
    where its first tensor starts, in bytes. others: names of the small files beside them: config,
    tokenizer, code, but no weights in other formats, nor an adapter or a card."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, FileTensor]
    starts: Mapping[Path, int]
    others: tuple[str, ...]

    def read(self, key: str) -> torch.Tensor:
        """A view of the mapped file; OptionError if that changed since it was opened."""
        try:
            return self.tensors[key].read()
        except AdapterError as error:
            raise refusal(self.folder, str(error.args[2]), "start again") from error

    @property
    def is_tied(self) -> bool:
        """Whether loading may make one weight of the input and the output embeddings; where the
        config does not say, some versions of transformers do."""
        text = self.config.get("text_config") or {}
        return bool(self.config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)))


def refusal(folder: Path, problem: str, remedy: str) -> OptionError:
    return OptionError("base", f"{str(folder)!r} {problem}", remedy)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads config, index and headers; OptionError for what is no whole model in safetensors."""
    if not folder.is_dir():
        remedy = "give a model folder; a model on the Hugging Face Hub has to be downloaded first"
        raise refusal(folder, "is no folder", remedy)
    config = _read_json(folder, CONFIG)
    tensors: dict[str, FileTensor] = {}
    starts: dict[Path, int] = {}
    index = _index(folder)
    for path in _files(folder, index):
        found = _tensors(folder, path)
        if twice := found.keys() & tensors.keys():
            raise refusal(folder, f"stores {min(twice)!r} in two files", _AGAIN)
        tensors |= found
        starts[path] = path.stat().st_size - sum(t.nbytes for t in found.values())
    if index is not None:
        where = {key: tensor.file.path.name for key, tensor in tensors.items()}
        for key, _ in sorted(index.items() - where.items()):
            raise refusal(folder, f"has {key!r} not where {INDEX} says", _AGAIN)
    others = [*_others(folder), *([INDEX] if index is not None else [])]
    return Checkpoint(folder, config, tensors, starts, tuple(others))


def _others(folder: Path) -> list[str]:
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise refusal(folder, problem, "check the folder") from error
    return [
        name
        for name in names
        if name != CARD and not name.startswith((".", "adapter_")) and not name.endswith(_WEIGHTS)
    ]


def _index(folder: Path) -> dict[str, str] | None:
    """The file of every tensor, where they are in shards; transformers prefers a single file."""
    if (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return None
    where = _read_json(folder, INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise refusal(folder, f"has no weight_map in {INDEX}", _AGAIN)
    return where


def _files(folder: Path, index: Mapping[str, str] | None) -> list[Path]:
    names = [SINGLE] if index is None else sorted(set(index.values()))
    for name in names:
        if Path(name).name != name:
            raise refusal(folder, f"names {name!r} in {INDEX}, which is outside", _AGAIN)
        if not (folder / name).is_file():
            raise refusal(folder, f"has no {name}", _remedy(folder, index))
    return [folder / name for name in names]


def _remedy(folder: Path, index: Mapping[str, str] | None) -> str:
    if index is not None:
        return _AGAIN
    if any(folder.glob("adapter_model.*")):
        return "give the base model, not an adapter"
    return "save it as safetensors: transformers' save_pretrained does"


def _tensors(folder: Path, path: Path) -> dict[str, FileTensor]:
    try:
        return SafetensorsFile(path, str(folder)).tensors()
    except AdapterError as error:
        raise refusal(folder, f"cannot be used: {error.args[2]}", _AGAIN) from error


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / name).read_bytes())
    except FileNotFoundError as error:
        raise refusal(folder, f"has no {name}", "give a folder saved by transformers") from error
    except (OSError, ValueError) as error:
        raise refusal(folder, f"has a {name} that cannot be read ({error})", _AGAIN) from error
    if not isinstance(value, dict):
        raise refusal(folder, f"has a {name} that is no JSON object", _AGAIN)
    return value
