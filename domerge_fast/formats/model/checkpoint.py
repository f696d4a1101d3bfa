"""A model folder of Hugging Face, as it lies on disk."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import OptionError
from ...results.card import CARD
from ...storage import json_file
from ...storage.input_file import InputFile
from ...storage.safetensors_file import FileTensor, SafetensorsFile

__all__ = ["CONFIG", "INDEX", "TIED", "Checkpoint", "open_checkpoint", "parts", "refusal"]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
TIED = "tie_word_embeddings"

_WEIGHTS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf"),
    *(".h5", ".msgpack", ".onnx", ".onnx_data", ".ot"),
)
_AGAIN = "download or save it again"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A base model. tensors: by parameter name; nothing is read yet. files: those with weights.
    others: the small files beside them: config, index, tokenizer, code, but no weights in other
    formats, nor an adapter or a card."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, FileTensor]
    files: tuple[SafetensorsFile, ...]
    others: tuple[InputFile, ...]

    @property
    def inputs(self) -> list[InputFile]:
        return [*(file.input for file in self.files), *self.others]

    def check(self) -> None:
        """OptionError if a file that was read is not any more what it was."""
        for file in self.inputs:
            file.check()

    @property
    def is_tied(self) -> bool:
        """Whether loading may make one weight of the input and the output embeddings; where the
        config does not say, some versions of transformers do."""
        stated = [part[TIED] for part in parts(self.config) if TIED in part]
        return bool(stated[0]) if stated else True


def parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config, and that of the language model in a larger one."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]


def refusal(folder: Path, problem: str, remedy: str) -> OptionError:
    return OptionError("base", f"{str(folder)!r} {problem}", remedy)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads config, index and headers; OptionError for what is no whole model in safetensors."""
    try:
        return _checkpoint(folder)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise refusal(folder, problem, "check the folder") from error


def _checkpoint(folder: Path) -> Checkpoint:
    if not os.path.isdir(folder):
        remedy = "give a model folder; a model on the Hugging Face Hub has to be downloaded first"
        raise refusal(folder, "is no folder", remedy)
    config_file = _input(folder, CONFIG)
    config = _config(folder, config_file)
    tensors: dict[str, FileTensor] = {}
    files: list[SafetensorsFile] = []
    index_file, index = _index(folder)
    for path in _files(folder, index):
        file = SafetensorsFile(path, functools.partial(refusal, folder))
        found = file.tensors()
        if twice := found.keys() & tensors.keys():
            raise refusal(folder, f"stores {min(twice)!r} in two files", _AGAIN)
        tensors |= found
        files.append(file)
    if index is not None:
        where = {key: tensor.file.path.name for key, tensor in tensors.items()}
        for key, _ in sorted(index.items() - where.items()):
            raise refusal(folder, f"has {key!r} not where {INDEX} says", _AGAIN)
    read = [config_file, *([index_file] if index_file else [])]
    others = [_input(folder, n) for n in _others(folder) if n != CONFIG]
    return Checkpoint(folder, config, tensors, tuple(files), (*read, *others))


def _input(folder: Path, name: str) -> InputFile:
    return InputFile(folder / name, functools.partial(refusal, folder))


def _config(folder: Path, file: InputFile) -> dict[str, Any]:
    """The fields of config.json that are used are what they should be."""
    if not os.path.isfile(file.path):
        raise refusal(folder, f"has no {CONFIG}", "give a folder saved by transformers")
    config = json_file.read_object(file, json_file.CONFIG_BYTES)
    for part in parts(config):
        tied = part.get(TIED)
        if tied is not None and not isinstance(tied, bool):
            problem = f"has {TIED}={str(tied)[:40]!r} in {CONFIG}, not true or false"
            raise refusal(folder, problem, f"correct {CONFIG}")
    return config


def _others(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return [
        name
        for name in names
        if name != CARD and not name.startswith((".", "adapter_")) and not name.endswith(_WEIGHTS)
    ]


def _index(folder: Path) -> tuple[InputFile | None, dict[str, str] | None]:
    """The file of every tensor, where they are in shards; transformers prefers a single file."""
    if os.path.isfile(folder / SINGLE) or not os.path.isfile(folder / INDEX):
        return None, None
    file = _input(folder, INDEX)
    where = json_file.read_object(file, json_file.INDEX_BYTES).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise refusal(folder, f"has no weight_map in {INDEX}", _AGAIN)
    return file, where


def _files(folder: Path, index: Mapping[str, str] | None) -> list[Path]:
    names = [SINGLE] if index is None else sorted(set(index.values()))
    for name in names:
        if Path(name).name != name:
            raise refusal(folder, f"names {name!r} in {INDEX}, which is outside", _AGAIN)
        if not os.path.isfile(folder / name):
            raise refusal(folder, f"has no {name}", _remedy(folder, index))
    return [folder / name for name in names]


def _remedy(folder: Path, index: Mapping[str, str] | None) -> str:
    if index is not None:
        return _AGAIN
    if any(folder.glob("adapter_model.*")):
        return "give the base model, not an adapter"
    return "save it as safetensors: transformers' save_pretrained does"
