"""A base of an image or video model: one checkpoint file, or a folder that diffusers saves, with a
folder for each part of the pipeline. Weights keep their names, after that of their part."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from ...storage import json_file
from ...storage.input_file import InputFile
from ...storage.safetensors_file import FileTensor, SafetensorsFile
from .checkpoint import AGAIN, Checkpoint, open_checkpoint, refusal

__all__ = ["open_base"]

_SUFFIXES = (".safetensors", ".sft")
_PIPELINE = "model_index.json"
_PARTS = ("unet", "transformer", "transformer_2", "prior")
_TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
_INDEX = ".safetensors.index.json"
_TEXT_IN_ONE = {
    "cond_stage_model.transformer.": "text_encoder.",
    "conditioner.embedders.0.transformer.": "text_encoder.",
}
"""What Stability AI's checkpoints have before the names of a text encoder of transformers."""


def open_base(source: str | os.PathLike[str], config_only: bool = False) -> Checkpoint:
    """`open_checkpoint`, or one of these. OptionError for what is neither."""
    path = Path(source)
    if config_only or not (_is_file(path) or os.path.isfile(path / _PIPELINE)):
        return open_checkpoint(source, config_only)
    try:
        return _one_file(path) if _is_file(path) else _pipeline(path)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise refusal(path, problem, "check the path") from error


def _is_file(path: Path) -> bool:
    return path.suffix in _SUFFIXES and os.path.isfile(path)


def _one_file(path: Path) -> Checkpoint:
    file = SafetensorsFile(path, functools.partial(refusal, path))
    tensors = {_of_part(key): tensor for key, tensor in file.tensors().items()}
    return Checkpoint(path, {}, tensors, (file,), (), is_pipeline=True)


def _of_part(key: str) -> str:
    for prefix, part in _TEXT_IN_ONE.items():
        if key.startswith(prefix):
            return part + key[len(prefix) :]
    return key


def _pipeline(folder: Path) -> Checkpoint:
    tensors: dict[str, FileTensor] = {}
    files: list[SafetensorsFile] = []
    for part in (*_PARTS, *_TEXT):
        for path in _files(folder / part):
            file = SafetensorsFile(path, functools.partial(refusal, folder))
            found = {f"{part}.{key}": x for key, x in file.tensors().items()}
            if twice := found.keys() & tensors.keys():
                raise refusal(folder, f"stores {min(twice)!r} in two files", AGAIN)
            tensors |= found
            files.append(file)
    if not files:
        problem = "is a pipeline of diffusers without weights in safetensors"
        raise refusal(folder, problem, "save it with save_pretrained")
    return Checkpoint(folder, {}, tensors, tuple(files), (), is_pipeline=True)


def _files(folder: Path) -> Iterator[Path]:
    """The files of a part: those of one index, or the only one; of several, the one without a
    variant (`.fp16.`). OptionError where that is not clear."""
    if not os.path.isdir(folder):
        return
    indices = [x for x in sorted(folder.glob(f"*{_INDEX}")) if _is_plain(x, _INDEX)]
    if len(indices) == 1:
        file = InputFile(indices[0], functools.partial(refusal, folder))
        where = json_file.read_object(file, json_file.INDEX_BYTES).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise refusal(folder, f"has no weight_map in {indices[0].name}", AGAIN)
        for name in sorted(set(where.values())):
            if Path(name).name != name or not os.path.isfile(folder / name):
                raise refusal(folder, f"has no {name}", AGAIN)
            yield folder / name
        return
    found = sorted(folder.glob("*.safetensors"))
    plain = [x for x in found if _is_plain(x, ".safetensors")] if len(found) > 1 else found
    if found and len(plain) != 1:
        names = ", ".join(x.name for x in found[:3])
        raise refusal(folder, f"has several files of weights ({names})", "leave one of them there")
    yield from plain


def _is_plain(path: Path, ending: str) -> bool:
    return "." not in path.name.removesuffix(ending)
