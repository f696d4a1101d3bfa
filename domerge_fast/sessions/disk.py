"""What sessions keep in a folder: a JSON file that says what it is of, and one of tensors, whose
sum the JSON has. A folder appears whole or not at all.

    session.json         {"format": 2, "kind": "prepared", "sum": "..", ..}
    session.safetensors  what it counts; none in a session that has nothing yet
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DomergeError, OptionError
from ..storage import json_file
from ..storage.digests import sha256
from ..storage.folder import recover
from ..storage.input_file import InputFile
from ..storage.marker import all_marked
from ..storage.replacing import Replacing
from ..storage.safetensors_file import SafetensorsFile

__all__ = ["FILES", "STATE", "TENSORS", "Kind", "read", "refusing", "replacing", "seal", "tensors"]

STATE, TENSORS = FILES = ("session.json", "session.safetensors")
FORMAT = 2
_HEAD = ("format", "kind", "sum")


@dataclass(frozen=True)
class Kind:
    """Of sessions. what: in words, after "holds no". start: what to do where there is none. again:
    what makes it anew. before: the JSON file of format 1."""

    name: str
    what: str
    start: str
    again: str
    before: str

    @property
    def remedy(self) -> str:
        """Where it is damaged."""
        return f"restore the folder, or {self.again}"


def refusing(folder: Path) -> Callable[[str, str], OptionError]:
    """An OptionError of the folder, for a problem and its remedy."""
    return functools.partial(_refusal, repr(str(folder)))


def _refusal(where: str, problem: str, remedy: str) -> OptionError:
    return OptionError("folder", f"{where} {problem}", remedy)


def seal(kind: Kind, fresh: Path, plain: Mapping[str, Any]) -> None:
    """Write the JSON file, when the tensors are in the new folder."""
    path = fresh / TENSORS
    total = sha256(InputFile(path, refusing(fresh))) if path.exists() else None
    head = {"format": FORMAT, "kind": kind.name, "sum": total}
    text = json.dumps({**head, **plain}, indent=1, ensure_ascii=False, allow_nan=False)
    (fresh / STATE).write_text(text + "\n", encoding="utf-8")


def read(kind: Kind, folder: Path) -> dict[str, Any]:
    """What was given to `seal`. OptionError unless there is a session of the kind."""
    if not os.path.exists(folder):
        recover(folder)
    plain = _read(kind, folder)
    return {name: value for name, value in plain.items() if name not in _HEAD}


def tensors(
    kind: Kind, folder: Path, refuse: Callable[[str, str], DomergeError]
) -> SafetensorsFile:
    """The file of tensors. Refused unless the JSON file has its sum."""
    file = SafetensorsFile(folder / TENSORS, refuse)
    file.tensors()
    if _read(kind, folder).get("sum") != sha256(file.input):
        raise refuse(f"{TENSORS} is not what {STATE} was written with", kind.remedy)
    return file


def replacing(overwrite: bool, force: bool) -> Replacing:
    return Replacing(overwrite, force, FILES, _is_ours)


def _is_ours(folder: Path) -> bool:
    """Whether there is a session, and tensors with our mark if it has any."""
    try:
        plain = _parsed(folder, "")
    except OptionError:
        return False
    return "kind" in plain and (plain.get("sum") is None or all_marked(folder))


def _read(kind: Kind, folder: Path) -> dict[str, Any]:
    refuse = refusing(folder)
    if not os.path.isfile(folder / STATE):
        if os.path.isfile(folder / kind.before):
            problem = f"is in format 1 ({kind.before}), this version reads {FORMAT}"
            raise refuse(problem, f"use the version that wrote it, or {kind.again}")
        raise refuse(f"holds no {kind.what} (it has no {STATE})", kind.start)
    plain = _parsed(folder, kind.remedy)
    written, name = plain.get("format"), plain.get("kind")
    if type(written) is not int or not isinstance(name, str):
        raise refuse(f"{STATE} is damaged (it says of no format and kind)", kind.remedy)
    if written != FORMAT:
        problem = f"is in format {written}, this version reads {FORMAT}"
        raise refuse(problem, "use the version that wrote it")
    if name != kind.name:
        raise refuse(f"holds no {kind.what}, but a session of kind {name!r}", kind.start)
    return plain


def _parsed(folder: Path, again: str) -> dict[str, Any]:
    file = InputFile(folder / STATE, refusing(folder))
    return json_file.read_object(file, json_file.INDEX_BYTES, again)
