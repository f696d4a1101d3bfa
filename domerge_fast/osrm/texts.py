"""A causal model of transformers, and files of texts as batches for it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import options
from ..errors import DomergeError, OptionError

__all__ = ["batches_of", "load_model", "load_tokenizer"]

BATCH = 8
MOST_BYTES = 1 << 30
"""Of a file of texts."""


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a model, from its folder or by its id. Raises as `load_model`."""
    return _loaded("AutoTokenizer", model, "the tokenizer of a model")


def load_model(model: str) -> nn.Module:
    """The model, from a folder or by an id, in the dtype it is stored in. DomergeError without
    transformers (the extra "osrm"), OptionError for what transformers does not load."""
    made = _loaded("AutoModelForCausalLM", model, "a causal model", dtype="auto")
    assert isinstance(made, nn.Module)
    return made


def _loaded(kind: str, model: str, what: str, **given: Any) -> Any:
    try:
        import transformers
    except ImportError as error:
        needs = "loading a model needs transformers"
        raise DomergeError(f"{needs} ({error}); pip install 'domerge-fast[osrm]'") from error
    try:
        return getattr(transformers, kind).from_pretrained(model, **given)
    except (OSError, ValueError, KeyError, ImportError) as error:
        problem = f"transformers cannot load {what} from {model!r} ({_first(error)})"
        raise OptionError("model", problem, "give the folder of a causal model") from error


def _first(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:120]


def batches_of(
    tokenizer: Any, files: Mapping[str, str | os.PathLike[str]], samples: int, length: int
) -> dict[str, list[dict[str, Tensor]]]:
    """By task, batches of the first texts of its file, one a line, cut to so many tokens. Padding
    is masked."""
    options.check("samples", samples, int, low=1)
    options.check("length", length, int, low=1)
    found = {}
    for task, file in files.items():
        given = tokenizer(_lines(file, samples), truncation=True, max_length=length)["input_ids"]
        tokens = sorted((x for x in given if x), key=len)
        if not tokens:
            raise OptionError("texts", f"{os.fspath(file)!r} has no text", "give one a line")
        groups = (tokens[k : k + BATCH] for k in range(0, len(tokens), BATCH))
        found[task] = [_padded(group) for group in groups]
    return found


def _lines(file: str | os.PathLike[str], most: int) -> list[str]:
    """The first lines of a file in UTF-8 that are not blank."""
    path = Path(file)
    try:
        if path.stat().st_size > MOST_BYTES:
            problem = f"{os.fspath(path)!r} has more than {MOST_BYTES >> 30} GiB"
            raise OptionError("texts", problem, "give a part of it")
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        problem = f"{os.fspath(path)!r} is not UTF-8"
        raise OptionError("texts", problem, "save it as text") from error
    except OSError as error:
        problem = f"{os.fspath(path)!r} cannot be read ({error.strerror})"
        raise OptionError("texts", problem, "give a file with a text a line") from error
    return [line for line in lines if line.strip()][:most] or [""]


def _padded(tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    width = max(map(len, tokens))
    ids = torch.zeros(len(tokens), width, dtype=torch.long)
    mask = torch.zeros(len(tokens), width, dtype=torch.long)
    for k, own in enumerate(tokens):
        ids[k, : len(own)] = torch.tensor(own)
        mask[k, : len(own)] = 1
    return {"input_ids": ids, "attention_mask": mask}
