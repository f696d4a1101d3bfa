"""What a base model's files call the parameters of the adapted model.

Classes of one model, and versions of transformers, put other names before the same layers, and the
files have those of the class that was saved: text, vision and head each by itself. So names are
looked up by what follows: a list of layers by the list's name and all that is wanted of it, with
shapes where they are known; other parameters by their last names.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping

from ..adapters.stems import NEUTRAL, core_of, outer_of, split
from .checkpoint import Checkpoint, refusal

Shapes = Collection[tuple[int, ...]]
Family = tuple[bool, str]  # whether it is a list of layers; its stem, or what is before last names

OTHER_BASE = "give the base model the adapters were trained on, or write an adapter"


def renaming(wanted: Mapping[str, Shapes], base: Checkpoint) -> Callable[[str], str]:
    """From parameter names of the adapted model to those of the base.

    wanted: the adapted weights, with the shapes that would do (none: any). A name that leads
    nowhere comes back as it is most likely meant. OptionError where a name may mean two weights.
    """
    stored: dict[Family, list[str]] = {}
    for key in base.tensors:
        stored.setdefault(_family(key), []).append(key)
    stems: dict[str, list[Family]] = {}
    for family in stored:
        stems.setdefault(_last(family), []).append(family)

    def best(family: Family, paths: Collection[str]) -> Family:
        """The base's family that has most of the paths: of the same name if that has as many."""
        scores: dict[Family, tuple[int, int]] = {}
        for other in {family, *stems.get(_last(family), ())}:
            if nearness := _nearness(family, other):
                found = sum(_fits(_moved(p, family, other), wanted.get(p, ()), base) for p in paths)
                scores[other] = found, nearness
        most = max(scores.values())
        ways = sorted(other for other, score in scores.items() if score == most)
        if most[0] and len(ways) > 1:
            names = " and ".join(repr(f"{stem}.".lstrip(".")) for _, stem in ways[:2])
            problem = f"has the adapters' modules under more than one name ({names})"
            raise refusal(base.folder, problem, OTHER_BASE)
        return ways[0] if most[0] else family

    families: dict[Family, list[str]] = {}
    for path in wanted:
        families.setdefault(_family(path), []).append(path)
    moved = {family: best(family, paths) for family, paths in families.items()}
    outer = dict(outer_of(old, new) for (_, old), (_, new) in moved.items() if old != new)
    known: dict[str, str] = {}

    def rename(path: str) -> str:
        if path not in known:
            known[path] = find(path)
        return known[path]

    def find(path: str) -> str:
        family = _family(path)
        likely = _moved(path, family, moved.get(family, family))
        if likely in base.tensors:
            return likely
        inside = [old for old in outer if not old or path.startswith(f"{old}.")]
        for old in sorted(inside, key=len, reverse=True):
            followed = f"{outer[old]}.{path[len(old) :].lstrip('.')}".lstrip(".")
            if followed in base.tensors:
                return followed
        alone = _moved(path, family, best(family, [path]))
        return alone if alone in base.tensors else likely

    return rename


def nearest(key: str, base: Checkpoint) -> str:
    """What a message says of the base's weight with the most similar name, if there is any."""
    last = key.rpartition(".")[2]
    close = difflib.get_close_matches(key, [k for k in base.tensors if k.endswith(last)], 1)
    return f" (the nearest is {close[0]!r})" if close else ""


def _family(path: str) -> Family:
    stem, rest = split(path)
    return (True, stem) if rest else (False, ".".join(path.split(".")[:-2]))


def _last(family: Family) -> str:
    is_list, stem = family
    return f"{stem.rpartition('.')[2]}.0" if is_list else ""


def _nearness(one: Family, other: Family) -> int:
    """3 for the same, 2 for the same but for words that classes put before names, 1 where one has
    a component more, first of all; 0 for anything else."""
    (is_list, stem), (_, other_stem) = one, other
    if stem == other_stem:
        return 3
    if is_list:
        alike = core_of(stem) == core_of(other_stem)
    else:
        words, others = ([w for w in s.split(".") if w not in NEUTRAL] for s in (stem, other_stem))
        alike = [w for w in words if w] == [w for w in others if w]
    if alike:
        return 2
    inner, other_inner = stem.partition(".")[2], other_stem.partition(".")[2]
    return int(stem == other_inner or other_stem == inner)


def _moved(path: str, family: Family, other: Family) -> str:
    rest = path[len(family[1]) :].lstrip(".")
    return f"{other[1]}.{rest}".lstrip(".")


def _fits(key: str, shapes: Shapes, base: Checkpoint) -> bool:
    return key in base.tensors and (not shapes or tuple(base.tensors[key].shape) in shapes)
