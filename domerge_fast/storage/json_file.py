"""The one reader of JSON from outside: bounded, and strict where Python's is not.

UTF-8 without a byte order mark; no key twice; no NaN, no Infinity, no number that becomes one; no
half of a surrogate pair, which no file could hold again; nothing nested deeper than DEPTH.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from .input_file import InputFile

__all__ = ["CONFIG_BYTES", "INDEX_BYTES", "BadJson", "parse", "read_object"]

CONFIG_BYTES = 10_000_000
INDEX_BYTES = 100_000_000
"""Of an index, a header or a state, which names every tensor of a model."""

DEPTH = 100
"""Far above that of any real file, far below what Python's reader needs a large stack for."""

_AGAIN = "download or save it again"
_STRUCTURE = b'[]{}"'
_ELSE = bytes(set(range(256)) - set(_STRUCTURE))


class BadJson(ValueError):
    """``str(error)`` says in a few words what is wrong."""


def read_object(file: InputFile, most: int, remedy: str = _AGAIN) -> dict[str, Any]:
    """The JSON object in a file of at most so many bytes, or `file.refuse(...)`."""
    name = file.path.name
    try:
        value = parse(file.read(most))
    except BadJson as error:
        raise file.refuse(f"{name} is not valid JSON ({error})", remedy) from error
    if not isinstance(value, dict):
        raise file.refuse(f"{name} is not a JSON object", remedy)
    return value


def parse(data: bytes) -> Any:
    """The value, or BadJson."""
    _check_depth(data)
    try:
        text = data.decode("utf-8")
        if text.startswith("\ufeff"):
            raise BadJson("it begins with a byte order mark")
        # "-0" is no whole number; a hook costs time on every number of a header.
        parse_int = _whole if "-0" in text else None
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=parse_int,
        )
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadJson("a string holds half of a surrogate pair") from error
    except UnicodeDecodeError as error:
        raise BadJson("it is not UTF-8") from error
    except (RecursionError, MemoryError) as error:
        raise BadJson("it is too large") from error
    except BadJson:
        raise
    except ValueError as error:  # of the syntax, or of a number of too many digits
        raise BadJson(str(error)) from error
    return value


def _check_depth(data: bytes) -> None:
    """BadJson for what Python's reader would follow down until its stack is full."""
    if b"\\" in data:
        data = re.sub(rb"\\.", b"", data, flags=re.DOTALL)
    brackets = b"".join(data.translate(None, _ELSE).split(b'"')[::2])
    for _ in range(DEPTH):
        if not brackets:
            return
        before = len(brackets)
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(brackets) == before:
            break
    if len(brackets) > DEPTH:
        raise BadJson(f"it is nested deeper than {DEPTH}, or its brackets do not match")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise BadJson("a key occurs twice")
    return result


def _no_number(word: str) -> float:
    raise BadJson(f"{word} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise BadJson(f"{text[:20]} is too large for a number")
    return value


def _whole(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)
