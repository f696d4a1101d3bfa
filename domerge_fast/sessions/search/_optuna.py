"""Optuna, where it is installed."""

from __future__ import annotations

from ...errors import DomergeError

__all__ = ["optuna"]

try:
    import optuna
    import optuna.storages.journal
except ImportError as error:
    problem = f"a search needs Optuna ({error}); pip install 'domerge-fast[search]'"
    raise DomergeError(problem) from error
