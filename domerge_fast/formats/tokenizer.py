"""The tokenizer files beside adapters: AutoPeftModel resizes a base model by them, and the rows of
an embedding that is saved whole mean nothing without them.

They are copied as one set, or not at all: files of two tokenizers are no tokenizer.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..adapters import Adapter, Kept
from ..adapters.names import is_of_tokens
from ..adapters.whole import parameter
from ..errors import AdapterError
from ..storage import json_file
from ..storage.input_file import InputFile

__all__ = ["FILES", "beside", "files"]

_FAST = "tokenizer.json"
VOCABULARY = (
    *(_FAST, "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"),
    *("spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm", "tekken.json"),
)
SETTINGS = (
    *("tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json"),
)
FILES = (*VOCABULARY, *SETTINGS)
_MOST_BYTES = 200_000_000
_WHEREABOUTS = (  # what the library writes of where a tokenizer came from
    *("name_or_path", "special_tokens_map_file", "tokenizer_file"),
    *("is_local", "transformers_version"),
)


def files(adapters: Sequence[Adapter], kept: Kept) -> tuple[tuple[InputFile, ...], tuple[str, ...]]:
    """Those to copy, and notes for the report.

    Adapters that have none do not count; with "from:NAME" they are that adapter's. AdapterError
    where the adapters' vocabularies differ and token embeddings are kept, whose rows would then
    belong to other tokens.
    """
    if kept.owner is not None:
        return tuple(beside(kept.owner).values()), ()
    found = [(a, own) for a in adapters if (own := beside(a))]
    if not found:
        return (), ()
    names = dict.fromkeys(name for _, own in found for name in own)
    differ = [name for name in names if not all(_alike(name, found[0][1], x) for _, x in found[1:])]
    if not differ:
        return tuple(next(own[name] for _, own in found if name in own) for name in names), ()
    vocabularies = [name for name in differ if name in VOCABULARY]
    whole = [parameter(key) for key in kept.tensors if is_of_tokens(parameter(key))]
    if vocabularies and whole:
        first, _ = found[0]
        other = next(a for a, own in found if not _alike(vocabularies[0], own, found[0][1]))
        problem = f"its {vocabularies[0]} is not that of adapter {first.name!r}, and {whole[0]!r}"
        problem += " is kept whole, with a row for every token"
        remedy = "say whole='from:NAME' to take one adapter's of both (--whole)"
        raise AdapterError(other.name, None, problem, remedy)
    note = f"no tokenizer is written, the adapters' {', '.join(differ)} differ"
    return (), (note,)


def beside(adapter: Adapter) -> dict[str, InputFile]:
    """The tokenizer files in an adapter's folder, by name."""
    folder = adapter.folder
    if folder is None:
        return {}
    refuse = functools.partial(AdapterError, adapter.name, None)
    try:
        present = set(os.listdir(folder))
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror})", "check the folder") from error
    paths = [folder / name for name in FILES if name in present]
    return {path.name: InputFile(path, refuse) for path in paths if os.path.isfile(path)}


Files = Mapping[str, InputFile]


def _alike(name: str, one: Files, other: Files) -> bool:
    """Whether a file is the same in two sets, or says nothing that the other set lacks."""
    if name in one and name in other:
        return _same(one[name], other[name])
    return name not in VOCABULARY or (_FAST in one and _FAST in other)


def _same(one: InputFile, other: InputFile) -> bool:
    first, second = one.read(_MOST_BYTES), other.read(_MOST_BYTES)
    if first == second or one.path.suffix != ".json":
        return first == second
    try:
        return _plain(json_file.parse(first)) == _plain(json_file.parse(second))
    except json_file.BadJson:
        return False


def _plain(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: x for key, x in value.items() if key not in _WHEREABOUTS}
