"""One spelling for the modules of adapters that were saved from different classes of one model.

A causal model calls `model.layers.0.mlp.up_proj` what its backbone calls `layers.0.mlp.up_proj`;
a vision-language model has it as `model.language_model.layers…` or `language_model.model.layers…`,
by version. Names are the same here when they are the same without such words (stems.py), and what
lies in a list of layers is looked at as a whole (layers.py).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NoReturn

from ..errors import AdapterError, some
from .adapter import Adapter, called
from .base_model import check_base, states_base
from .compatible import check_names
from .layers import Rests, Trees, check_layers, check_parts, children_of, trees_of
from .names import EMBEDDINGS, HEADS
from .renaming import ONE_CLASS, with_names
from .stems import Core, core_of, is_below, joined, outer_of, split, within
from .style import MODEL
from .whole import NEW_HEADS, parameter

__all__ = ["one_spelling"]


def one_spelling(
    adapters: Sequence[Adapter],
    base_model: str | None = None,
    weights: Sequence[float] | None = None,
    calls: Sequence[str] | None = None,
) -> tuple[list[Adapter], list[str]]:
    """The adapters with each module under one name, and what was renamed, a sentence each.

    Names become those of the first adapter, or of one that has what it lacks, never of one whose
    weight is zero: nothing of it is in the result. AdapterError, naming both spellings, where two
    may be one part of the model or two (in one live model they are two), and where adapters that
    state no base model (nor ``base_model`` for them) have layers of different models. Names that
    are not the model's own stay (style.py); with others they are refused. calls: what
    sentences call the adapters, where that is not their place and name.
    """
    check_names(adapters)
    check_base(adapters, base_model)
    check_parts(adapters)
    alike = all(_has_names_of(adapters[0], adapter) for adapter in adapters[1:])
    if alike and not any(adapter.removed for adapter in adapters):
        return list(adapters), []
    calls = calls or [called(k, adapter) for k, adapter in enumerate(adapters)]
    notes = [
        f"{call}: names without {' and '.join(map(repr, a.removed))}"
        for call, a in zip(calls, adapters)
        if a.removed
    ]
    if alike:
        return list(adapters), notes
    if any(adapter.style and adapter.style.names != MODEL for adapter in adapters):
        return list(adapters), [*notes, *_apart(adapters, calls)]
    model = adapters[0].model
    of_one_model = model is not None and all(adapter.model == model for adapter in adapters)
    of_one_base = of_one_model or states_base(adapters, base_model)
    if of_one_model or (of_one_base and not _alike(adapters)):
        return list(adapters), [*notes, *_apart(adapters, calls)]
    trees = [trees_of(adapter) for adapter in adapters]
    counted = [i for i in range(len(adapters)) if weights is None or weights[i] != 0]
    bridge = _Bridge(adapters, trees, base_model, counted)
    renamed, told = bridge.renamed(calls)
    if not of_one_base:
        check_layers(renamed, [trees_of(adapter) for adapter in renamed])
    return renamed, [*notes, *told, *_apart(renamed, calls)]


def _alike(adapters: Sequence[Adapter]) -> bool:
    """Whether any two stems may be spellings of each other: most often none, without a look at all
    that is below them."""
    names = {n for a in adapters for n in (*a.modules, *map(parameter, a.carried), *a.changed)}
    stems: dict[str, set[str]] = {}
    cores: dict[Core, str] = {}
    for stem, rest in {(stem, bool(rest)) for stem, rest in map(split, names)}:
        if rest:
            stems.setdefault(stem.rpartition(".")[2], set()).add(stem)
        elif cores.setdefault(core_of(stem), stem) != stem:
            return True
    pairs = (pair for found in stems.values() for pair in itertools.combinations(found, 2))
    return any(core_of(one) == core_of(other) or within(one, other) for one, other in pairs)


class _Bridge:
    def __init__(
        self,
        adapters: Sequence[Adapter],
        trees: Sequence[Trees],
        base_model: str | None,
        counted: Sequence[int],
    ) -> None:
        self._adapters, self._trees, self._counted = adapters, trees, counted
        self._of_one_base = states_base(adapters, base_model)
        self._is_told = base_model is not None
        self._owners: dict[Core, dict[str, list[int]]] = {}
        for i, found in enumerate(trees):
            for core, stems in found.items():
                for stem in stems:
                    self._owners.setdefault(core, {}).setdefault(stem, []).append(i)
        self._differ = self._differing()

    def _differing(self) -> set[Core]:
        """What has more than one spelling and is one part of the model."""
        several = [core for core, stems in self._owners.items() if len(stems) > 1]
        differ = {core for core in several if self._is_listed(core) and self._is_one(core)}
        if differ or self._of_one_base:
            differ |= {c for c in several if not self._is_listed(c) and self._is_same_name(c)}
        listed = [core for core in self._owners if self._is_listed(core)]
        for one, other in itertools.permutations(listed, 2):
            if one[-1] == other[-1]:
                self._check_two_parts(one, other, one in differ)
        return differ

    def _is_listed(self, core: Core) -> bool:
        """Whether these are lists of layers."""
        return any(
            "" not in self._trees[i][core][stem]
            for stem, owners in self._owners[core].items()
            for i in owners
        )

    def _is_one(self, core: Core) -> bool:
        """Whether the stems are spellings of one part. AdapterError where that is not clear."""
        stems = self._owners[core]
        for i, found in enumerate(self._trees):
            both = found.get(core, {})
            if len(both) > 1:
                # This adapter's model has two such parts.
                for stem in stems.keys() - both.keys():
                    self._refuse(stems[stem][0], i, stem, " or ".join(map(repr, both)))
                return False
        for (one, mine), (other, theirs) in itertools.combinations(stems.items(), 2):
            first, second = self._rests(core, one), self._rests(core, other)
            shared = first.keys() & second.keys()
            fits = all(first[rest] == second[rest] for rest in shared)
            if not within(one, other):
                # A word for another: `bert.` for `roberta.` or, in one model, for `vit.`.
                if self._of_one_base and not (shared and fits):
                    return False
                self._refuse(theirs[0], mine[0], other, repr(one))
            if not fits:
                if self._is_told:
                    return False
                self._refuse(theirs[0], mine[0], other, repr(one), "has other shapes than")
            if not (self._of_one_base or shared or children_of(first) & children_of(second)):
                self._refuse(theirs[0], mine[0], other, repr(one))
        return True

    def _is_same_name(self, core: Core) -> bool:
        """As `_is_one` for names outside of lists, which may stand beside each other."""
        stems = self._owners[core]
        alone = all(len(found.get(core, {})) < 2 for found in self._trees)
        signatures = [self._rests(core, stem)[""] for stem in stems]
        related = all(within(one, other) for one, other in itertools.combinations(stems, 2))
        return alone and related and all(x == signatures[0] for x in signatures)

    def _rests(self, core: Core, stem: str) -> Rests:
        found: Rests = {}
        for i in self._owners[core][stem]:
            found |= self._trees[i][core][stem]
        return found

    def _check_two_parts(self, one: Core, other: Core, differs: bool) -> None:
        """AdapterError where a stem may be a spelling of another with a word that is not neutral,
        which may as well name a second part with the same layers."""
        known = any(one in found and other in found for found in self._trees)
        for stem, owners in self._owners[one].items():
            alone = next((i for i in owners if other not in self._trees[i]), None)
            for foreign, theirs in self._owners[other].items():
                if differs:
                    apart = all(stem in self._trees[i].get(one, ()) for i in theirs)
                else:
                    apart = known
                if alone is None or apart or not within(stem, foreign):
                    continue
                mine, rests = self._rests(one, stem), self._rests(other, foreign)
                shared = mine.keys() & rests.keys()
                if shared and all(mine[rest] == rests[rest] for rest in shared):
                    self._refuse(alone, theirs[0], stem, repr(foreign))

    def _refuse(self, i: int, k: int, stem: str, other: str, relation: str = "may be") -> NoReturn:
        problem = f"its {stem!r} {relation} {other} of adapter {self._adapters[k].name!r}"
        if relation == "may be":
            problem += ", or another part of the model with the same layers"
        raise AdapterError(self._adapters[i].name, None, problem, ONE_CLASS)

    def renamed(self, calls: Sequence[str]) -> tuple[list[Adapter], list[str]]:
        if not self._differ:
            return list(self._adapters), []
        styles: dict[tuple, list[int]] = {}
        for i in self._counted:
            if style := tuple(self._style(i)):
                styles.setdefault(style, []).append(i)
        if not styles:
            return list(self._adapters), []
        ways = [_Way(self, members[0]) for members in styles.values()]
        way = min(ways, key=lambda w: (len(w.stuck), w.heads, -w.kept, w.first))
        if way.stuck:
            i, name = way.stuck[0]
            stem, target = next(iter(way.changes[i].items()))
            problem = f"its {stem!r} is {target!r} in adapter {self._adapters[way.first].name!r}, "
            problem += f"which has nothing to tell what {name!r} is there"
            raise AdapterError(self._adapters[i].name, None, problem, ONE_CLASS)
        return way.adapters(), way.notes(calls)

    def _style(self, i: int) -> Iterator[tuple[Core, str]]:
        for core in sorted(self._differ):
            yield from ((core, stem) for stem in self._trees[i].get(core, ()))


class _Way:
    """All adapters in the spelling of one of them, the first.

    names: by adapter that is renamed, the new stem of each of its stems. changes: those of them
    that stand for the others: in what was matched. stuck: adapters with names that have no match
    and are not below a stem that has one. heads: how many such names lie outside of all classes,
    and how many names of adapters that had nothing to match are of another class.
    """

    def __init__(self, bridge: _Bridge, first: int) -> None:
        self._adapters, self._trees = bridge._adapters, bridge._trees
        self.first = first
        target: Trees = dict(self._trees[first])
        other: list[int] = []
        left_out = set(range(len(self._trees))).difference(bridge._counted)
        for i in (*bridge._counted, *sorted(left_out)):
            found = self._trees[i]
            shared = bridge._differ & found.keys() & target.keys()
            if all(found[core].keys() == target[core].keys() for core in shared):
                target = target if i in left_out else {**found, **target}
            else:
                other.append(i)
        self.kept = len(set(bridge._counted).difference(other))
        self.changes: dict[int, dict[str, str]] = {}
        self.names: dict[int, dict[str, str]] = {}
        self.stuck: list[tuple[int, str]] = []
        self.heads = 0
        for i in other:
            self.changes[i] = {
                stem: next(iter(target[core]))
                for core in bridge._differ & self._trees[i].keys() & target.keys()
                for stem in self._trees[i][core]
                if stem not in target[core]
            }
            self.names[i] = dict(self._new_stems(i, target, i not in left_out))
        outer = {outer_of(old, new) for x in self.changes.values() for old, new in x.items()}
        alone = (
            self._trees[i] for i in bridge._counted if not bridge._differ & self._trees[i].keys()
        )
        stems = {stem for found in alone for names in found.values() for stem in names}
        self.heads += sum(_is_of_other(stem, *way) for stem in stems for way in outer)

    def _new_stems(
        self, i: int, target: Mapping[Core, Collection[str]], counts: bool
    ) -> Iterator[tuple[str, str]]:
        outer = dict(outer_of(old, new) for old, new in self.changes[i].items())
        for core, stems in self._trees[i].items():
            for stem, rests in stems.items():
                below = [old for old in outer if is_below(stem, old)]
                if stem in self.changes[i]:
                    yield stem, self.changes[i][stem]
                elif core in target:
                    yield stem, stem
                elif below:
                    old = max(below, key=len)
                    yield stem, joined(outer[old], stem[len(old) :].lstrip("."))
                else:
                    is_head = stem.removesuffix(".weight").removesuffix(".bias").count(".") == 0
                    if "" in rests and is_head:
                        self.heads += counts
                    elif counts:
                        self.stuck.append((i, stem))
                    yield stem, stem

    def adapters(self) -> list[Adapter]:
        return [
            with_names(adapter, self.names[i]) if i in self.names else adapter
            for i, adapter in enumerate(self._adapters)
        ]

    def notes(self, calls: Sequence[str]) -> list[str]:
        found = []
        for i, changes in self.changes.items():
            renamed = some([f"{old!r} is {new!r}" for old, new in sorted(changes.items())])
            found.append(f"{calls[i]}: {renamed}, as in {calls[self.first]}")
        return found


def _has_names_of(one: Adapter, other: Adapter) -> bool:
    same = one.names == other.names or one.modules.keys() == other.modules.keys()
    return same and one.changed == other.changed and one.carried.keys() == other.carried.keys()


def _is_of_other(stem: str, old: str, new: str) -> bool:
    """Whether a name is of the class that has `old` where this spelling has `new`."""
    first = stem.split(".")[0]
    if old and not new and first in (*HEADS, *NEW_HEADS):
        return True
    if new and not old and first in EMBEDDINGS:
        return True
    return bool(old) and first == old.split(".")[0] != new.split(".")[0]


def _apart(adapters: Sequence[Adapter], calls: Sequence[str]) -> list[str]:
    """What is to be said of adapters that share no module with another."""
    owners = Counter(name for adapter in adapters for name in adapter.modules)
    return [
        f"{call}: has no module of another adapter, is kept beside them"
        for call, adapter in zip(calls, adapters)
        if all(owners[name] == 1 for name in adapter.modules)
    ]
