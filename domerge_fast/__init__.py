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
    from . import distributed, evaluators
    from .adapters import Adapter
    from .api import (
        Check,
        Conversion,
        check,
        convert,
        estimate,
        inspect,
        merge,
        run,
    )
    from .errors import (
        AdapterError,
        DomergeError,
        FlatCut,
        Infeasible,
        OptionError,
        OutputError,
        OutputWarning,
        Unmet,
    )
    from .formats import from_model, from_tensors, load
    from .learning.adamerge import adamerge
    from .learning.cocktail import cocktail
    from .learning.learned import Learned
    from .learning.tune import tune
    from .lists import list_backends, list_formats, list_methods, list_runtimes
    from .merged import Merged
    from .osrm.init import osrm_init, osrm_init_all
    from .osrm.project import osrm_features, osrm_project, osrm_save_features
    from .pages.page import write_html
    from .pages.plots import write_plots
    from .recipe import Recipe
    from .results.report import Interference, Report
    from .routing.router import Router
    from .sessions.prepare import prepare
    from .sessions.prepared import Prepared
    from .sessions.search.budget import Budget
    from .sessions.search.depth import stack_layers
    from .sessions.search.environment import MergeEnv
    from .sessions.search.leave_one_out import leave_one_out
    from .sessions.search.run import search
    from .sessions.search.space import Space
    from .sessions.sequential import Sequential
    from .sessions.streamed import Streamed
    from .unlearning import project_out

_HOME = {
    "Adapter": "adapters",
    "AdapterError": "errors",
    "Budget": "sessions.search.budget",
    "Check": "api",
    "Conversion": "api",
    "DomergeError": "errors",
    "FlatCut": "errors",
    "Infeasible": "errors",
    "Interference": "results.report",
    "Learned": "learning.learned",
    "MergeEnv": "sessions.search.environment",
    "Merged": "merged",
    "OptionError": "errors",
    "OutputError": "errors",
    "OutputWarning": "errors",
    "Prepared": "sessions.prepared",
    "Recipe": "recipe",
    "Report": "results.report",
    "Router": "routing.router",
    "Sequential": "sessions.sequential",
    "Streamed": "sessions.streamed",
    "Space": "sessions.search.space",
    "Unmet": "errors",
    "adamerge": "learning.adamerge",
    "check": "api",
    "cocktail": "learning.cocktail",
    "convert": "api",
    "distributed": "distributed",
    "estimate": "api",
    "evaluators": "evaluators",
    "from_model": "formats",
    "from_tensors": "formats",
    "inspect": "api",
    "leave_one_out": "sessions.search.leave_one_out",
    "list_backends": "lists",
    "list_formats": "lists",
    "list_methods": "lists",
    "list_runtimes": "lists",
    "load": "formats",
    "merge": "api",
    "osrm_features": "osrm.project",
    "osrm_init": "osrm.init",
    "osrm_init_all": "osrm.init",
    "osrm_project": "osrm.project",
    "osrm_save_features": "osrm.project",
    "prepare": "sessions.prepare",
    "project_out": "unlearning",
    "run": "api",
    "search": "sessions.search.run",
    "stack_layers": "sessions.search.depth",
    "tune": "learning.tune",
    "write_html": "pages.page",
    "write_plots": "pages.plots",
}

__all__ = [
    "Adapter",
    "AdapterError",
    "Budget",
    "Check",
    "Conversion",
    "DomergeError",
    "FlatCut",
    "Infeasible",
    "Interference",
    "Learned",
    "MergeEnv",
    "Merged",
    "OptionError",
    "OutputError",
    "OutputWarning",
    "Prepared",
    "Recipe",
    "Report",
    "Router",
    "Sequential",
    "Space",
    "Streamed",
    "Unmet",
    "adamerge",
    "check",
    "cocktail",
    "convert",
    "distributed",
    "estimate",
    "evaluators",
    "from_model",
    "from_tensors",
    "inspect",
    "leave_one_out",
    "list_backends",
    "list_formats",
    "list_methods",
    "list_runtimes",
    "load",
    "merge",
    "osrm_features",
    "osrm_init",
    "osrm_init_all",
    "osrm_project",
    "osrm_save_features",
    "prepare",
    "project_out",
    "run",
    "search",
    "stack_layers",
    "tune",
    "write_html",
    "write_plots",
]


logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent, unless it is asked for


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f".{_HOME[name]}", __name__)
    return home if _HOME[name] == name else getattr(home, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
