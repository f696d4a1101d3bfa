"""What a format is: how an adapter is stored, or a merge written."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ..adapters import Adapter
from ..adapters.style import MODEL
from ..registry import usable
from .merge_folder import MergeFolder
from .target import Target

__all__ = ["EACH", "FORMS", "NONE", "ONE", "Format", "Holds", "Read", "has_file"]

FORMS = ("adapter", "deltas", "model")
"""What a merge is written as: A and B of every module, ΔW of every module, or the whole model."""

NONE, ONE, EACH = "none", "one", "each"

Read = Callable[[Path, str], Adapter]
"""(path, what messages call it) -> the adapter there; made by `from_tensors` or `assemble`, which
do the checks. AdapterError for whatever cannot be merged exactly."""


@dataclass(frozen=True)
class Holds:
    """What a format can hold of a merge besides A and B, all of one rank, of linear layers.

    ranks: modules of different ranks. alphas: every module is scaled by itself, so that no reader
    needs one rank for all, and none is padded. whole: tensors saved whole. experts: parameters
    with a matrix for every expert. differences: updates of modules that are stored as matrices
    (`Layout.dense`). changes: those of any parameter that are no product of factors
    (`Target.changes`); of those biases: of modules with factors, rows: of embeddings. scales:
    whether what is in front of B A (`Target.scales`) is kept beside the factors: NONE, ONE for
    all modules, or of EACH.
    """

    ranks: bool = False
    alphas: bool = False
    whole: bool = False
    convolutions: bool = False
    embeddings: bool = False
    experts: bool = False
    differences: bool = False
    changes: bool = False
    biases: bool = False
    rows: bool = False
    scales: str = NONE


def _nothing(target: Target, ranks: Collection[int]) -> tuple[str, ...]:
    return ()


def _nowhere(path: Path) -> bool:
    return False


@dataclass(frozen=True)
class Format:
    """A row of `FORMATS`: how something is stored, by name. form: what a merge is that is written
    so, one of FORMS.

    recognises(path): whether what lies there is of this format; quick, raises nothing. last: if
    it takes files that others may know better, and is asked after them. read: None where it is only
    written; files: patterns of the names of what it reads of a folder, which are fetched from the
    Hub. write(path, target, overwrite, force) -> the folder or file that a merge is written to,
    module by module; None where it is only read. holds: what a merge may have to be written so;
    others are refused before. names: whose names of modules it is written with (`Style.names`).
    dense: whether it is given ΔW, not A and B. needs_base: whether it is made of the base model
    (`Target.base`). config_only: whether that is read for its config alone. notes(target, ranks):
    what whoever uses the output has to know, of modules of these ranks.
    """

    name: str
    summary: str
    recognises: Callable[[Path], bool] = _nowhere
    read: Read | None = None
    write: Callable[[Path, Target, bool, bool], MergeFolder] | None = None
    form: str = "adapter"
    holds: Holds = Holds()
    names: str = MODEL
    dense: bool = False
    needs_base: bool = False
    config_only: bool = False
    notes: Callable[[Target, Collection[int]], tuple[str, ...]] = _nothing
    files: tuple[str, ...] = ()
    last: bool = False
    why_not: Callable[[], str | None] = usable


def has_file(path: Path, file: str) -> bool:
    """Whether a folder, or a folder in it, has this file."""
    if not os.path.isdir(path):
        return False
    return os.path.isfile(path / file) or any(map(os.path.isfile, path.glob(f"*/{file}")))
