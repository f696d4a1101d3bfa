"""What an adapter is and how it is stored; knows no kernel."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import AdapterError, printable
from ..storage.lazy import LazyTensor
from .adapter import Adapter, AdapterConfig, Kind, Module
from .bridge import one_spelling
from .compatible import check_compatible
from .peft import from_model, load_folder
from .tensors import from_tensors
from .whole import Kept, keep

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Kept",
    "Kind",
    "LazyTensor",
    "Module",
    "check_compatible",
    "from_model",
    "from_tensors",
    "keep",
    "load",
    "one_spelling",
]


def load(source: str | os.PathLike[str], name: str | None = None) -> Adapter:
    """The adapter in a PEFT folder: config and header are read and checked, factors stay on disk.

    ``name`` is what messages call it (the path as given if not stated, its bytes escaped where they
    are no UTF-8). Raises AdapterError, in one line, for whatever cannot be merged exactly.
    """
    name = name or printable(os.fspath(source))
    try:
        return load_folder(Path(source), name)
    except OSError as error:  # of the folder: its files say themselves what is wrong
        problem = f"cannot be read ({error.strerror})"
        raise AdapterError(name, None, problem, "check the folder") from error
