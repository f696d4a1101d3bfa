"""Names of modules in lists of layers: the path before the first number is the *stem*, what comes
from there on the *rest*. Classes of one model differ in the stem alone, there in neutral words."""

from __future__ import annotations

import functools
import re
from collections import Counter

__all__ = ["NEUTRAL", "Core", "core_of", "is_below", "joined", "outer_of", "split", "within"]

NEUTRAL = frozenset(
    (
        *("albert", "backbone", "base_model", "beit", "bert", "clip", "deberta", "deit", "dinov2"),
        *("distilbert", "electra", "esm", "gpt_neox", "hubert", "language_model", "llm", "lm"),
        *("longformer", "model", "module", "mpnet", "pretrained_model", "resnet", "roberta"),
        *("swin", "text_model", "transformer", "unet", "vit", "wav2vec2"),
    )
)
"""Words that a class puts before the names of the one inside it, and that name no part of it."""

Core = tuple[str, ...]
"""A stem, or a name without a number in it, without neutral words."""

_NUMBER = re.compile(r"(?:^|\.)\d+(?![^.])")


def split(name: str) -> tuple[str, str]:
    """Stem and rest of a name."""
    number = _NUMBER.search(name)
    return (name[: number.start()], name[number.start() :].lstrip(".")) if number else (name, "")


def joined(stem: str, rest: str) -> str:
    return ".".join(part for part in (stem, rest) if part)


def within(one: str, other: str) -> bool:
    """Whether one stem has all words of the other, in any order."""
    words, others = Counter(one.split(".")), Counter(other.split("."))
    return words <= others or others <= words


@functools.lru_cache(1 << 14)
def core_of(stem: str) -> Core:
    """A stem or name without neutral words, but for its last component."""
    *outer, last = stem.split(".")
    return (*(part for part in outer if part not in NEUTRAL), last)


def outer_of(old: str, new: str) -> tuple[str, str]:
    """What two stems are without the end that they share."""
    olds, news = old.split("."), new.split(".")
    while olds and news and olds[-1] == news[-1]:
        olds.pop(), news.pop()
    return ".".join(olds), ".".join(news)


def is_below(stem: str, outer: str) -> bool:
    """Whether a stem begins with the components of another."""
    return not outer or stem.startswith(f"{outer}.")
