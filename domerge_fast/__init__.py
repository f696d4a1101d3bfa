"""Merges LoRA adapters by DO-Merging and related methods, exactly and fast, in factor space.

    import domerge_fast as dm

    merged = dm.merge(["a/", "b/"], output="out/")

Nothing heavy is imported before a name is used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import Adapter, from_model, from_tensors, load
    from .api import backends, inspect, merge, methods
    from .errors import AdapterError, DomergeError, FlatCut, OptionError, OutputError, OutputWarning
    from .merged import Merged
    from .report import Interference, Report
    from .sequential import Sequential

__version__ = "0.1.0"

_HOME = {
    "Adapter": "adapters",
    "AdapterError": "errors",
    "DomergeError": "errors",
    "FlatCut": "errors",
    "Interference": "report",
    "Merged": "merged",
    "OptionError": "errors",
    "OutputError": "errors",
    "OutputWarning": "errors",
    "Report": "report",
    "Sequential": "sequential",
    "backends": "api",
    "from_model": "adapters",
    "from_tensors": "adapters",
    "inspect": "api",
    "load": "adapters",
    "merge": "api",
    "methods": "api",
}

__all__ = [
    "Adapter",
    "AdapterError",
    "DomergeError",
    "FlatCut",
    "Interference",
    "Merged",
    "OptionError",
    "OutputError",
    "OutputWarning",
    "Report",
    "Sequential",
    "backends",
    "from_model",
    "from_tensors",
    "inspect",
    "load",
    "merge",
    "methods",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Package(ModuleType):
    """`methods` and `backends` name a function of the API and a folder each: importing the
    folder must not hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
