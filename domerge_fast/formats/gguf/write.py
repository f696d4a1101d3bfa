"""Writes a merge as a LoRA in GGUF, as llama.cpp takes it (`--lora`): one file.

The scale is in the factors, alpha is the rank, and all modules have one rank, so that every reader
scales by 1. The header is made by the package gguf, twice: at first with room for the recipe, which
is known only when all is merged, and then with it, in the same place.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapters.stems import split
from ...errors import DomergeError, OptionError
from ...results.card import CARD, Heading, recipe_text
from ...results.report import Report
from ...storage.gguf_file import ALIGNMENT, DTYPES
from ...storage.marker import MARK, RECIPE
from ...storage.stream import write, write_tensor
from ..format import ONE, Format, Holds
from ..merge_folder import MergeFolder
from ..target import Layout, Target
from .architectures import LAYERS, Model, Unknown, module_of, of_config, tensors
from .read import ALPHA, FORMAT, HEADS, KIND, OF_ADAPTER, SPELLING, find, load, model_of

__all__ = ["GGUF"]

FILE = "adapter.gguf"
_CONVERT = "write a PEFT folder, and give that to llama.cpp's convert_lora_to_gguf.py"
_KINDS = {dtype: number for number, dtype in DTYPES.items()}
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
"""llama.cpp's numbers for a file that is mostly of such tensors (general.file_type)."""


class GgufLora(MergeFolder):
    """Writes a merged adapter module by module, under llama.cpp's names and with its order of rows.

    Of which model it is, the base's config says, or else the first of the adapters that were read
    from GGUF. OptionError where neither does, and for modules that have no place in its GGUF.
    """

    heading = Heading("Merged LoRA adapter (GGUF)")
    is_placed = True

    def __init__(self, path: Path, target: Target, overwrite: bool, force: bool = False) -> None:
        if target.config["layer_replication"]:
            problem = "the adapters replicate layers (layer_replication), which GGUF cannot"
            raise DomergeError(f"{problem}; write another format")
        self._model = _model(target)
        self._orders = {x.name: _order(x, self._model) for x in target.layouts.values()}
        self._names = {x.name: _tensor(x, self._model) for x in target.layouts.values()}
        self._spelling = _spelling(self._names)
        super().__init__(path, target, overwrite, force, (FILE, CARD), FILE)

    def _open(self, folder: Path, files: contextlib.ExitStack) -> None:
        self._shapes = dict(self._sides())
        header = self._header("")
        self._places = dict(self._begins(len(header)))
        path, mode = folder if self.is_file else folder / FILE, "r+" if self.is_attached else "w"
        self._file = files.enter_context(FileIO(path, mode))
        self._file.truncate(len(header) + sum(map(self._size, self._shapes.values())))

    def _sides(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """The shapes of all tensors in order, by their names."""
        rank = self._target.rank
        assert rank is not None
        for x in self._target.layouts.values():
            n = math.prod(x.inputs)
            shape = (n, rank) if x.kind == "embedding" else (rank, n)
            yield f"{self._names[x.name]}.lora_a", shape
            yield f"{self._names[x.name]}.lora_b", (x.m, rank)

    def _begins(self, at: int) -> Iterator[tuple[str, int]]:
        """Where each tensor begins in the file."""
        for name, shape in self._shapes.items():
            yield name, at
            at += self._size(shape)

    def _size(self, shape: tuple[int, int]) -> int:
        """Bytes that a tensor takes up in the file."""
        return _aligned(math.prod(shape) * self._target.dtype.itemsize)

    def _header(self, recipe: str) -> bytes:
        """What stands before the data: as long with any recipe."""
        import gguf

        writer = gguf.GGUFWriter(None, self._model.architecture.name)
        writer.add_string(KIND, gguf.GGUFType.ADAPTER)
        writer.add_string(OF_ADAPTER, "lora")
        scale = next(iter(self._target.scales.values()), 1.0)
        writer.add_float32(ALPHA, scale * (self._target.rank or 0))
        writer.add_file_type(_FILE_TYPES[self._target.dtype])
        for key, heads in zip(HEADS, self._model.heads or ()):
            writer.add_uint32(key.format(self._model.architecture.name), heads)
        for key, text in {**MARK, **self._spelling}.items():
            writer.add_string(key, text)
        if self._target.recipe_bytes:
            writer.add_string(RECIPE, recipe.ljust(self._target.recipe_bytes()))
        return _bytes(writer, self._shapes, self._target.dtype)

    def add(self, name: str, a: Tensor, b: Tensor) -> None:
        """A [k, n] and B [m, k] of a module, with ΔW = B A."""
        a, b = self._target.padded(a, b)
        order = self._orders[name]
        if order is not None:
            b = b[order]
        if self._target.layouts[name].kind == "embedding":
            a = a.T
        for side, tensor in (("lora_a", a), ("lora_b", b)):
            self._file.seek(self._places[f"{self._names[name]}.{side}"])
            write_tensor(self._file, tensor.to(self._target.dtype))

    def finish(self, report: Report) -> None:
        """The header, and the card."""
        # In ASCII, so that it has as many bytes as characters.
        recipe = "" if report.converted else json.dumps(json.loads(recipe_text(report.recipe)))
        header = self._header(recipe)
        if len(header) != min(self._places.values()):
            raise AssertionError("the recipe is longer than there is room for")
        self._file.seek(0)
        write(self._file, header)
        self._write_card(report)


def _model(target: Target) -> Model:
    """What the merge is of."""
    found = [model_of(style) for style in target.styles]
    if target.base is not None:
        try:
            found.insert(0, of_config(target.base.config))
        except Unknown as error:
            raise OptionError("base", f"{str(target.base.folder)!r} {error}", _CONVERT) from error
    if not found:
        remedy = "give its folder as base (--base); config.json is enough"
        raise OptionError("format", f"{FORMAT!r} needs the config of the base model", remedy)
    for other in found[1:]:
        if (other.architecture.name, other.heads) != (found[0].architecture.name, found[0].heads):
            problem = f"adapters in GGUF, or one and the base, are of {_said(found[0])} and of "
            remedy = "merge adapters of one base model"
            raise OptionError("adapters", problem + _said(other), remedy)
    return found[0]


def _said(model: Model) -> str:
    heads = " with {} and {} heads".format(*model.heads) if model.heads else ""
    return f"{model.architecture.name!r}{heads}"


def _spelling(modules: Iterable[str]) -> dict[str, str]:
    """What the file has to say of modules' names that are not those of transformers' classes.
    OptionError where one list of layers, or one module, has two names."""
    found: dict[str, str] = {}
    for name in modules:
        number, module = module_of(name) or ("", name)
        place, own = (LAYERS, split(name)[0]) if number else (module, name)
        first = found.setdefault(place, own)
        if first != own:
            problem = f"{FORMAT!r} has one place for {first!r} and {own!r}"
            raise OptionError("format", problem, "leave one out by rules (leave_out)")
    return {f"{SPELLING}{place}": own for place, own in found.items() if place != own}


def _tensor(layout: Layout, model: Model) -> str:
    """The weight's name in GGUF."""
    number, module = module_of(layout.name) or ("", "")
    name = tensors(model.architecture).get(module)
    if name is None:
        problem = f"{FORMAT!r} has no place for {layout.name!r} in a {model.architecture.name!r}"
        raise OptionError("format", problem, f"leave it out by rules, or {_CONVERT}")
    if not number and model.tied:
        problem = f"{FORMAT!r} holds no {layout.name!r} of a base with tied embeddings"
        remedy = "leave it out by rules, or say tie_word_embeddings in config.json if they are not"
        raise OptionError("format", problem, remedy)
    return f"blk.{number}.{name}.weight" if number else f"{name}.weight"


def _order(layout: Layout, model: Model) -> Tensor | None:
    """Which of the rows of B comes where."""
    _, module = module_of(layout.name) or ("", "")
    try:
        return model.order(module, layout.m)
    except Unknown as error:
        problem = f"module {layout.name!r}: {error}"
        raise OptionError("base", problem, "give the base model of the adapters") from error


def _bytes(writer: Any, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype) -> bytes:
    """The header of a GGUFWriter with tensors of these shapes, up to where their data begins."""
    import gguf
    import numpy as np
    from gguf.gguf_writer import WriterState

    kind = gguf.GGMLQuantizationType(_KINDS[dtype])
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, kind)
    buffer = io.BytesIO()
    writer.fout, writer.state = [buffer], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return buffer.getvalue().ljust(_aligned(buffer.tell()), b"\0")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _why_not() -> str | None:
    """GGUF's own package has its names."""
    if importlib.util.find_spec("gguf") is None:
        return "the package gguf is not installed; pip install gguf"
    return None


GGUF = Format(
    FORMAT,
    "one file of llama.cpp (--lora)",
    lambda path: find(path) is not None,
    load,
    GgufLora,
    holds=Holds(embeddings=True, scales=ONE),
    files=(FILE,),
    config_only=True,
    why_not=_why_not,
)
