"""Merges LoRA adapters by DO-Merging and related methods, exactly and fast, in factor space.

    import domerge_fast as dm

    merged = dm.merge(["a/", "b/"], output="out/")

Nothing heavy is imported before a name is used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .adapters import Adapter
    from .api import estimate, inspect, list_backends, list_formats, list_methods, merge, run
    from .errors import (
        AdapterError,
        DomergeError,
        FlatCut,
        OptionError,
        OutputError,
        OutputWarning,
    )
    from .formats import from_model, from_tensors, load
    from .merged import Merged
    from .recipe import Recipe
    from .results.report import Interference, Report
    from .sessions.sequential import Sequential

_HOME = {
    "Adapter": "adapters",
    "AdapterError": "errors",
    "DomergeError": "errors",
    "FlatCut": "errors",
    "Interference": "results.report",
    "Merged": "merged",
    "OptionError": "errors",
    "OutputError": "errors",
    "OutputWarning": "errors",
    "Recipe": "recipe",
    "Report": "results.report",
    "Sequential": "sessions.sequential",
    "estimate": "api",
    "from_model": "formats",
    "from_tensors": "formats",
    "inspect": "api",
    "list_backends": "api",
    "list_formats": "api",
    "list_methods": "api",
    "load": "formats",
    "merge": "api",
    "run": "api",
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
    "Recipe",
    "Report",
    "Sequential",
    "estimate",
    "from_model",
    "from_tensors",
    "inspect",
    "list_backends",
    "list_formats",
    "list_methods",
    "load",
    "merge",
    "run",
]


logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent, unless it is asked for


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
