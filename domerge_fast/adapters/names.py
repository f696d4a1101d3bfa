"""What a module is called, whatever wrapped the model that its adapter was saved from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

__all__ = [
    "AROUND",
    "EMBEDDINGS",
    "EXPERT",
    "HEADS",
    "PREFIX",
    "Spelling",
    "in_peft",
    "is_of_tokens",
    "is_saved",
]

PREFIX = "base_model.model."
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
AROUND = ("module", *_WRAPPERS)
_ANY = rf"(?:(?:{'|'.join(AROUND)})\.)*"
_LEAD = re.compile(rf"{_ANY}base_model\.{_ANY}model\.")


class Spelling:
    """From the keys and module paths of one adapter to the names that its model has for them.

    `torch.compile`, FSDP and activation checkpointing put a component of their own before what
    they wrap, which no model has otherwise: it is taken out anywhere. `module`, which
    DistributedDataParallel and its like put there, may be a model's own name: it is taken out
    around PEFT's prefix, and after it where all keys have it. PEFT's prefix itself goes, also
    where a PeftModel lies in another.
    """

    def __init__(self, keys: Collection[str]) -> None:
        text = "\n".join(keys)
        odd = ("module.", PREFIX + PREFIX, *_WRAPPERS)
        self._plain = not any(part in text for part in odd)
        self._in_module = False
        if not self._plain:
            parts = [_inner(key) for key in keys]
            self._in_module = all(lead and rest.startswith("module.") for lead, rest in parts)

    def __call__(self, key: str) -> str:
        if self._plain:
            return key.removeprefix(PREFIX)
        lead, rest = _inner(key)
        while lead and self._in_module and rest.startswith("module."):
            rest = rest.removeprefix("module.")
        return rest

    def removed(self, keys: Collection[str]) -> list[str]:
        """The components that were taken out of keys, besides PEFT's prefix."""
        if self._plain:
            return []
        left: set[str] = set()
        for key in keys:
            left |= set(Counter(key.split(".")) - Counter(f"{PREFIX}{self(key)}".split(".")))
        return sorted(left)


def in_peft(path: str) -> str:
    """A key or module path as the PeftModel that owns the adapter calls it; the patterns in its
    config are for these names."""
    lead = _LEAD.match(path)
    return path[lead.end() :] if lead else path


def _inner(key: str) -> tuple[bool, str]:
    """Whether PEFT's prefix was there, and what comes after it, without wrappers."""
    found = False
    while lead := _LEAD.match(key):
        found, key = True, key[lead.end() :]
    return found, ".".join(part for part in key.split(".") if part not in _WRAPPERS)


EXPERT = re.compile(r"(.+\.experts)\.\d+\.([^.]+)")
"""The name of a part of an expert that is a module: the owner, and what it is called there."""


EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared")


HEADS = ("lm_head", "embed_out")


_OF_TOKENS = re.compile(rf"(?:.+\.)?(?:{'|'.join((*EMBEDDINGS, *HEADS))})\.(?:weight|bias)")


def is_of_tokens(path: str) -> bool:
    """Whether a parameter has a row for every token, by the names of transformers models."""
    return _OF_TOKENS.fullmatch(path) is not None


def is_saved(path: str, modules_to_save: Sequence[str]) -> bool:
    """Whether PEFT takes a parameter for one of these modules: by the end of its parents' names."""
    parts = path.split(".")
    parents = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(parent.endswith(saved) for parent in parents for saved in modules_to_save)
