"""Where a folder or a file is of which the SHA-256 is known."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import OptionError
from .digests import sha256
from .input_file import InputFile

__all__ = ["find", "has"]


def find(name: str, files: Mapping[str, str], under: Path) -> Path:
    """The folder with these sums by file name, or the file, where the name is that of one of them:
    what is called so under a folder, or any below it. OptionError if there is none."""
    if not under.is_dir():
        raise OptionError("adapters", f"{str(under)!r} is no folder", "check the path")
    for place in _candidates(name, files, under):
        if has(place, files):
            return place
    problem = f"nothing under {str(under)!r} has the files of {name!r}"
    raise OptionError("adapters", problem, "download it again, or give another folder")


def has(place: Path, files: Mapping[str, str]) -> bool:
    """Whether these files are in a folder with these sums, or are this file; the small ones are
    looked at first."""
    folder = place.parent if place.name in files and not place.is_dir() else place
    places = [folder / name for name in files]
    if not all(map(os.path.isfile, places)):
        return False
    return all(_sum(x) == files[x.name] for x in sorted(places, key=os.path.getsize))


def _candidates(name: str, files: Mapping[str, str], under: Path) -> Iterator[Path]:
    yield under / name
    file = next((x for x in files if Path(name).name.startswith(x)), "")
    for folder, inside, there in os.walk(under):
        inside.sort()
        if files.keys() <= set(there):
            yield Path(folder, file)


def _sum(path: Path) -> str:
    return sha256(InputFile(path, functools.partial(_refusal, path)))


def _refusal(path: Path, problem: str, remedy: str) -> OptionError:
    return OptionError("adapters", f"{str(path)!r}: {problem}", remedy)
