"""A model folder of Hugging Face, as it lies on disk."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ...errors import OptionError
from ...results.card import CARD
from ...storage import hub, json_file
from ...storage.input_file import InputFile
from ...storage.lazy import LazyTensor, dtype_name
from ...storage.safetensors_file import FileTensor, SafetensorsFile
from ...storage.tensor_file import TensorFile

__all__ = [
    "AGAIN",
    "CONFIG",
    "FLOATS",
    "INDEX",
    "IN_FLOAT",
    "ORIGINAL",
    "QUANTIZATION",
    "TIED",
    "Checkpoint",
    "Stored",
    "check_float",
    "how_quantized",
    "open_checkpoint",
    "parts",
    "quantized",
    "refusal",
    "told",
]

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
IN_FLOAT = "give the base in float32, float16 or bfloat16"
ORIGINAL = "give the model that it was made from, in float32, float16 or bfloat16"

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
TIED = "tie_word_embeddings"

QUANTIZATION = ("quantization_config", "compression_config")
"""Fields of a config; the second is an older name."""

_WEIGHTS = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf"),
    *(".h5", ".msgpack", ".onnx", ".onnx_data", ".ot"),
)
_FETCHED = (SINGLE, INDEX, "model-*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")
AGAIN = "download or save it again"


class Stored(LazyTensor, Protocol):
    """A tensor of a file, or what is made of some of them; `begin` is where it is in the file, or
    the place among the others that it takes."""

    @property
    def file(self) -> TensorFile: ...
    @property
    def begin(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A base model. tensors: by parameter name; nothing is read yet. files: those with weights.
    others: the small files beside them: config, index, tokenizer, code, but no weights in other
    formats, nor an adapter or a card. quantized: how its weights are, where the tensors are the
    numbers that they stand for; the config is then without it. is_pipeline: whether it is an image
    or video model, without a config (pipeline.py)."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    files: tuple[SafetensorsFile, ...]
    others: tuple[InputFile, ...]
    quantized: str | None = None
    is_pipeline: bool = False

    @property
    def known_by(self) -> list[InputFile]:
        """The files whose sums tell it from others: its weights, or its config where only that is
        read."""
        return [file.input for file in self.files] or [*self.others]

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


def quantized(base: Checkpoint, problem: str, otherwise: str) -> OptionError:
    """A weight is stored in a way that nothing can be added to: in what format, if config.json says
    so. otherwise: what else it may be."""
    how = how_quantized(base)
    if how is None:
        return refusal(base.folder, f"{problem}: it is quantized{otherwise}", IN_FLOAT)
    return refusal(base.folder, f"{problem}: it is quantized ({told(how)})", ORIGINAL)


def how_quantized(base: Checkpoint) -> Mapping[str, Any] | None:
    """What config.json says of the quantization, if it names a method."""
    stated = (part.get(name) for name in QUANTIZATION for part in parts(base.config))
    return next((x for x in stated if isinstance(x, dict) and x.get("quant_method")), None)


def told(how: Mapping[str, Any]) -> str:
    """A quantization in a message."""
    method, bits = str(how["quant_method"])[:40], _bits(how)
    return f"{method}, {bits} bits" if bits else method


def _bits(how: Mapping[str, Any]) -> object:
    """Of a quantized weight, by a `quantization_config`; None where it does not say."""
    for bits, key in ((4, "load_in_4bit"), (8, "load_in_8bit")):
        if how.get(key) is True:
            return bits
    return how.get("bits")


def check_float(module: str, key: str, base: Checkpoint) -> None:
    """OptionError for a weight of the base that nothing can be added to."""
    own = base.tensors.get(key)
    if own is not None and own.dtype not in FLOATS:
        problem = f"stores {key!r} of module {module!r} as {dtype_name(own.dtype)}"
        raise quantized(base, problem, "")


def open_checkpoint(source: str | os.PathLike[str], config_only: bool = False) -> Checkpoint:
    """Reads config, index and headers of a folder, or of an id on the Hub (hub.py), fetched
    whole; OptionError for what is no whole model in safetensors. config_only: nothing else has to
    be there, and of weights nothing is fetched or read."""
    wanted = (CONFIG,) if config_only else _FETCHED
    folder = hub.local(os.fspath(source), wanted, functools.partial(refusal, Path(source)))
    try:
        return _checkpoint(folder, config_only)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise refusal(folder, problem, "check the folder") from error


def _checkpoint(folder: Path, config_only: bool) -> Checkpoint:
    if not os.path.isdir(folder):
        remedy = "give a model folder, or an id on the Hugging Face Hub (owner/name)"
        raise refusal(folder, "is no folder", remedy)
    config_file = _input(folder, CONFIG)
    config = _config(folder, config_file)
    if config_only:
        return Checkpoint(folder, config, {}, (), (config_file,))
    tensors: dict[str, FileTensor] = {}
    files: list[SafetensorsFile] = []
    index_file, index = _index(folder)
    for path in _files(folder, index):
        file = SafetensorsFile(path, functools.partial(refusal, folder))
        found = file.tensors()
        if twice := found.keys() & tensors.keys():
            raise refusal(folder, f"stores {min(twice)!r} in two files", AGAIN)
        tensors |= found
        files.append(file)
    if index is not None:
        where = {key: tensor.file.path.name for key, tensor in tensors.items()}
        for key, _ in sorted(index.items() - where.items()):
            raise refusal(folder, f"has {key!r} not where {INDEX} says", AGAIN)
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
        raise refusal(folder, f"has no weight_map in {INDEX}", AGAIN)
    return file, where


def _files(folder: Path, index: Mapping[str, str] | None) -> list[Path]:
    names = [SINGLE] if index is None else sorted(set(index.values()))
    for name in names:
        if Path(name).name != name:
            raise refusal(folder, f"names {name!r} in {INDEX}, which is outside", AGAIN)
        if not os.path.isfile(folder / name):
            raise refusal(folder, f"has no {name}", _remedy(folder, index))
    return [folder / name for name in names]


def _remedy(folder: Path, index: Mapping[str, str] | None) -> str:
    if index is not None:
        return AGAIN
    if any(folder.glob("adapter_model.*")):
        return "give the base model, not an adapter"
    return "save it as safetensors: transformers' save_pretrained does"
