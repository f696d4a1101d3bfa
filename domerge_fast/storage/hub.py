"""Folders and files on the Hugging Face Hub, by ids: `owner/name`, below it `owner/name/folder`,
and `@revision` (a branch, tag or commit) behind either. What is fetched lies in the Hub's own
cache, and is read from there where the Hub is out of reach, or HF_HUB_OFFLINE says not to ask it.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import DomergeError
from .input_file import Refuse

__all__ = ["is_id", "local"]

_NAME = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_ID = re.compile(rf"({_NAME}/{_NAME})(?:/({_NAME}(?:/{_NAME})*))?(?:@(\S+))?", re.ASCII)
_LOG_IN = "check the name, accept its terms on its page if it has some, log in (hf auth login)"


def is_id(source: str) -> bool:
    """Whether it is no path here, and may be an id."""
    return _ID.fullmatch(source) is not None and not os.path.lexists(source)


def local(source: str, wanted: Sequence[str], refuse: Refuse) -> Path:
    """Where an id's folder (or file) is on this machine, with the files in it that match one of
    `wanted`; of what is no id the path, as it is.

    Refused, in one line, where it can be fetched neither from the Hub nor from the cache.
    huggingface_hub (the extra `hub`) is imported for nothing but ids.
    """
    if not is_id(source):
        return Path(source)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HTTPError
    except ImportError as error:
        problem = "is no path here; ids on the Hugging Face Hub need the package huggingface_hub"
        raise refuse(problem, "check the path, or pip install huggingface_hub") from error
    matched = _ID.fullmatch(source)
    assert matched
    repository, inside, revision = matched.groups()
    below = f"{glob.escape(inside)}/" if inside else ""
    files = [*([inside] if inside else []), *(below + name for name in wanted)]
    try:
        found = snapshot_download(
            repository, revision=revision, allow_patterns=files, ignore_patterns=[f"{below}*/*"]
        )
    except (OSError, ValueError, HTTPError) as error:
        raise _refusal(error, refuse) from error
    return Path(found) / (inside or "")


def _refusal(error: Exception, refuse: Refuse) -> DomergeError:
    from huggingface_hub import errors

    if isinstance(error, errors.RevisionNotFoundError):
        return refuse("has no such revision on the Hugging Face Hub", "check what is after '@'")
    if isinstance(error, errors.GatedRepoError):
        return refuse("is gated on the Hugging Face Hub", _LOG_IN)
    if isinstance(error, errors.RepositoryNotFoundError):
        problem = "is no path here and no repository on the Hugging Face Hub, or a private one"
        return refuse(problem, _LOG_IN)
    if isinstance(error, errors.LocalEntryNotFoundError):
        problem = "is no path here, nor whole in the cache of the Hugging Face Hub, which cannot "
        return refuse(f"{problem}be reached", "check the path, the network, HF_HUB_OFFLINE")
    problem = f"cannot be fetched from the Hugging Face Hub ({type(error).__name__}: {error})"
    return refuse(problem, "check the path, the network and the room on the disk")
