"""Tensors that torch.save wrote: a pickle, read by torch's unpickler that calls no foreign code.

The file is read whole, once, into memory of its own: a mapped file that shrinks kills the process,
and one that is rewritten shows up half old and half new.
"""

from __future__ import annotations

import errno
import os
import pickle
import struct
from typing import Any

import torch

from .input_file import InputFile
from .lazy import LazyTensor, MemoryTensor
from .safetensors_file import DTYPES

__all__ = ["load"]

SAFE = (2, 10)
"""torch before this: a crafted file gets past weights_only (CVE-2025-32434, CVE-2026-24747)."""

_LFS = b"version https://git-lfs"
_DAMAGED = (  # what torch's unpickler and zip reader raise for files that are none of theirs
    *(pickle.UnpicklingError, struct.error, RuntimeError, EOFError, LookupError, TypeError),
    *(ValueError, AttributeError, AssertionError, OverflowError, RecursionError),
)
_CONVERT = "load it with what saved it and save its tensors as safetensors"


def load(file: InputFile) -> dict[str, LazyTensor]:
    """The tensors by key; refused unless the file is a plain dict of plain dense tensors."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE:
        least = ".".join(map(str, SAFE))
        problem = f"is a pickle, which torch {torch.__version__} does not read safely"
        raise file.refuse(f"{file.path.name} {problem}", f"install torch {least} or newer")
    found = _unpickled(file)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        kind = type(found).__name__
        problem = f"{file.path.name} holds a {kind}, which is no dict of tensors by name"
        raise file.refuse(problem, _CONVERT)
    return {key: MemoryTensor(_plain(file, key, value)) for key, value in found.items()}


def _unpickled(file: InputFile) -> Any:
    with file.opened() as descriptor, os.fdopen(os.dup(descriptor), "rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            problem = f"{file.path.name} is a git-lfs pointer, not the weights"
            raise file.refuse(problem, "run 'git lfs pull'")
        stream.seek(0)
        try:
            return torch.load(stream, map_location="cpu", weights_only=True)
        except (*_DAMAGED, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a seek
                raise
            problem = f"{file.path.name} is damaged, or a pickle of more than tensors"
            raise file.refuse(problem, _CONVERT) from error


def _plain(file: InputFile, key: str, value: Any) -> torch.Tensor:
    """The tensor, row-major; refused unless it is dense, in memory and has its values."""
    kind = None
    if not isinstance(value, torch.Tensor):
        kind = f"a {type(value).__name__}"
    elif type(value) not in (torch.Tensor, torch.nn.Parameter):
        kind = f"a tensor of class {type(value).__name__}"
    elif value.layout != torch.strided or value.is_quantized or value.dtype not in DTYPES.values():
        kind = f"a tensor of {value.layout}, {value.dtype}"
    elif value.device.type != "cpu":
        kind = f"a tensor without values ({value.device})"
    elif value.nbytes > value.untyped_storage().nbytes():
        kind = "a tensor that repeats its values"
    if kind is not None:
        raise file.refuse(f"{file.path.name} has {key!r}, {kind}", _CONVERT)
    return value.detach().resolve_neg().contiguous()
