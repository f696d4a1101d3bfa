"""What a base model's files call the parameters of the adapted model.

Classes of one model, and versions of transformers, put other names before the same layers, and the
files have those of the class that was saved: text, vision and head each by itself. So names are
looked up by what follows: a list of layers by the list's name and all that is wanted of it, with
shapes where they are known; other parameters by their last names.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from ...adapters.stems import NEUTRAL, core_of, is_below, outer_of, split
from ...storage.lazy import LazyTensor
from .checkpoint import Checkpoint, quantized, refusal

__all__ = ["OTHER_BASE", "Renaming", "nearest", "stored"]

Shapes = Collection[tuple[int, ...]]
Family = tuple[bool, str]  # whether it is a list of layers; its stem, or what is before last names

SAME = 3
OTHER_BASE = "give the base model the adapters were trained on, or write an adapter"


class Renaming:
    """From parameter names of the adapted model to those of the base.

    wanted: the adapted weights, with the shapes that would do (none: any). A name that leads
    nowhere comes back as it is most likely meant. OptionError, also on making it, where a name may
    mean two weights.
    """

    def __init__(self, wanted: Mapping[str, Shapes], base: Checkpoint) -> None:
        self._wanted, self._base = wanted, base
        self._stored: dict[str, list[Family]] = {}  # by last names
        for family in dict.fromkeys(map(_family, base.tensors)):
            self._stored.setdefault(_last(family), []).append(family)
        families: dict[Family, list[str]] = {}
        for path in wanted:
            families.setdefault(_family(path), []).append(path)
        self._moved = {family: self._best(family, paths) for family, paths in families.items()}
        moves = ((old, new) for (_, old), (_, new) in self._moved.items() if old != new)
        self._outer = dict(outer_of(old, new) for old, new in moves)
        self._known: dict[str, str] = {}

    def __call__(self, path: str) -> str:
        if path not in self._known:
            self._known[path] = self._find(path)
        return self._known[path]

    def _best(self, family: Family, paths: Collection[str]) -> Family:
        """The base's family that has most of the paths: of the same name if that has as many."""
        scores: dict[Family, tuple[int, int]] = {}
        for other in {family, *self._stored.get(_last(family), ())}:
            if nearness := _nearness(family, other):
                found = sum(self._fits(path, _moved(path, family, other)) for path in paths)
                scores[other] = found, nearness
        most = max(scores.values())
        # No less alike name is ruled out by its likeness: classes of a part of a model, as of the
        # text or of the images, may leave out what tells them apart.
        ways = sorted(
            other
            for other, (found, nearness) in scores.items()
            if found == most[0] and (nearness == most[1] or most[1] < SAME)
        )
        if most[0] and len(ways) > 1:
            names = " and ".join(repr(f"{stem}.".lstrip(".")) for _, stem in ways[:2])
            problem = f"has the adapters' modules under more than one name ({names})"
            raise refusal(self._base.folder, problem, OTHER_BASE)
        return ways[0] if most[0] else family

    def _fits(self, path: str, key: str) -> bool:
        tensors, shapes = self._base.tensors, self._wanted.get(path, ())
        return key in tensors and (not shapes or tuple(tensors[key].shape) in shapes)

    def _find(self, path: str) -> str:
        family = _family(path)
        likely = _moved(path, family, self._moved.get(family, family))
        if likely in self._base.tensors:
            return likely
        inside = [old for old in self._outer if is_below(path, old)]
        for old in sorted(inside, key=len, reverse=True):
            followed = f"{self._outer[old]}.{path[len(old) :].lstrip('.')}".lstrip(".")
            if followed in self._base.tensors:
                return followed
        alone = _moved(path, family, self._best(family, [path]))
        return alone if alone in self._base.tensors else likely


def nearest(key: str, base: Checkpoint) -> str:
    """What a message says of the base's weight with the most similar name, if there is any."""
    last = key.rpartition(".")[2]
    close = difflib.get_close_matches(key, [k for k in base.tensors if k.endswith(last)], 1)
    return f" (the nearest is {close[0]!r})" if close else ""


def stored(module: str, key: str, base: Checkpoint) -> LazyTensor:
    """The base's weight of a module. OptionError if it has none."""
    if key in base.tensors:
        return base.tensors[key]
    stem = key.removesuffix("weight")
    inside = sorted((k.endswith("_bias"), k) for k in base.tensors if k.startswith(stem))
    if inside:
        problem = f"stores module {module!r} as {inside[0][1]!r}, not as {key!r}"
        raise quantized(base, problem, " or changed")
    raise refusal(
        base.folder, f"has no {key!r} for module {module!r}{nearest(key, base)}", OTHER_BASE
    )


def _family(path: str) -> Family:
    stem, rest = split(path)
    return (True, stem) if rest else (False, ".".join(path.split(".")[:-2]))


def _last(family: Family) -> str:
    is_list, stem = family
    return f"{stem.rpartition('.')[2]}.0" if is_list else ""


def _nearness(one: Family, other: Family) -> int:
    """SAME for the same, 2 for the same but for words that classes put before names, 1 where one
    has a component more, first of all; 0 for anything else."""
    (is_list, stem), (_, other_stem) = one, other
    if stem == other_stem:
        return SAME
    if is_list:
        alike = core_of(stem) == core_of(other_stem)
    else:
        words, others = (
            [w for w in s.split(".") if w and w not in NEUTRAL] for s in (stem, other_stem)
        )
        alike = words == others
    if alike:
        return 2
    inner, other_inner = stem.partition(".")[2], other_stem.partition(".")[2]
    return int(stem == other_inner or other_stem == inner)


def _moved(path: str, family: Family, other: Family) -> str:
    rest = path[len(family[1]) :].lstrip(".")
    return f"{other[1]}.{rest}".lstrip(".")
