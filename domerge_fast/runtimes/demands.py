"""What runtimes demand, an entry a demand: what a row says in words, and what files miss of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..adapters.parts import Parts
from ..errors import some
from .facts import Facts
from .runtime import PATTERNS, SCALES, Runtime, Together

__all__ = ["DEMANDS", "Miss", "misses", "missing"]

Owners = Mapping[str, Mapping[str, int]]
"""`Parts.owners`."""

COPY = ".base_layer"

"""In the name of what the base model has too, which PEFT saves along: all runtimes pass over it."""


@dataclass(frozen=True)
class Miss:
    """what: what the files have. why: what the runtime does with it. remedy: what to do."""

    what: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Demand:
    """name: of the row in tables; words: what a runtime demands; misses: what files lack. told:
    whether a merge that is made for no runtime says it."""

    name: str
    words: Callable[[Runtime], str]
    misses: Callable[[Runtime, Facts], Iterator[Miss]]
    told: bool = False


def misses(runtime: Runtime, facts: Facts) -> list[Miss]:
    """All that a runtime demands and files do not have."""
    return [miss for demand in DEMANDS for miss in demand.misses(runtime, facts)]


def _format(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    if facts.format not in runtime.formats:
        why = f"{runtime.title} takes {' or '.join(map(repr, runtime.formats))}"
        yield Miss(f"format {facts.format!r}", why, f"--format {runtime.formats[0]}")


def _stated(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    lacking = [x for x in runtime.stated if facts.fields is not None and x not in facts.fields]
    if lacking:
        what = f"adapter_config.json without {' and '.join(lacking)}"
        yield Miss(what, f"{runtime.title} asks for it", _again(facts))


def _again(facts: Facts, otherwise: str = "") -> str:
    """What makes files that are there fit: the scale goes into the factors, the rest is written as
    it has to be."""
    return "merge it alone for it (--for)" if facts.scales else otherwise


def _ranks(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    most = max(runtime.ranks, default=math.inf)
    if facts.ranks[1] > most:
        why = f"{runtime.title} serves {most} at most"
        yield Miss(f"rank {facts.ranks[1]}", why, f"--rank {most} cuts it")


def _one_rank(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    """Of files that are to be written and have own ranks, alpha is the largest of them."""
    least, most = facts.ranks
    is_read = runtime.scale == PATTERNS or facts.format != "peft" or bool(facts.scales)
    if least == most or (is_read and not runtime.one_rank):
        return
    why = f"{runtime.title} takes one for all modules"
    if not runtime.one_rank:
        why = f"{runtime.title} scales by {runtime.scale}"
    yield Miss(f"ranks from {least} to {most}", why, _again(facts, "leave --ragged out"))


def _scale(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    if facts.stated is None or runtime.scale == PATTERNS:
        return
    rule = SCALES[runtime.scale]
    got = {name: rule(facts.stated, rank) for name, (rank, _) in facts.scales.items()}
    wrong = [n for n, (_, true) in facts.scales.items() if not math.isclose(got[n], true)]
    if wrong:
        first, (_, true) = wrong[0], facts.scales[wrong[0]]
        what = f"{some(wrong, 1)} (scaled by {true:.4g})"
        why = f"{runtime.title} scales by {runtime.scale}, {got[first]:.4g}"
        yield Miss(what, why, _again(facts))


def _targets(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    if runtime.listed and isinstance(facts.targets, str) and facts.format == "peft":
        why = f"{runtime.title} takes a list"
        remedy = _again(facts, "--for writes one")
        yield Miss("target_modules is a regular expression", why, remedy)


def _whole(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    if runtime.whole is None:
        return
    owners = {name: name.rpartition(".")[0] for name in facts.carried}
    taken = runtime.whole
    strange = [
        name
        for name, owner in owners.items()
        if not owner.endswith(COPY) and owner.rpartition(".")[2] not in taken
    ]
    if strange:
        but = f" but for {' and '.join(taken)}" if taken else ""
        what = f"{some(strange, 1)} (saved whole)"
        why = f"{runtime.title} takes none{but}"
        yield Miss(what, why, "--whole drop leaves them out")


def _kinds(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    for kind in dict.fromkeys(layout.kind for layout in facts.modules.values()):
        if kind not in runtime.kinds:
            names = [name for name, layout in facts.modules.items() if layout.kind == kind]
            yield _left_out(names, kind, runtime)


def _others(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    for other in facts.others:
        if other not in runtime.others:
            remedy = "merge it alone for it (--for)"
            if other == "DoRA":
                remedy = "merge it alone for it, with its base (--for, --base, --rank)"
            why = f"{runtime.title} does not apply it as it was trained"
            yield Miss(f"modules of {_OTHERS.get(other, other)}", why, remedy)


_OTHERS = {"diff": "whole updates (.diff)"}


def _words_of_others(runtime: Runtime) -> str:
    return ", ".join(_OTHERS.get(x, x) for x in runtime.others) or "none"


def _experts(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    names = [name for name, layout in facts.modules.items() if layout.slice]
    if names and not runtime.experts:
        yield _left_out(names, "target_parameters", runtime)


def _changes(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    if facts.changed and not runtime.changes:
        what = f"{some(facts.changed, 1)} (changed by no product of factors)"
        why = f"{runtime.title} takes no biases on B, no norms and no rows of tokens"
        yield Miss(what, why, "write a whole model (--form model)")


def _left_out(names: Sequence[str], what: str, runtime: Runtime) -> Miss:
    why = f"{runtime.title} takes no such modules"
    return Miss(f"{some(names, 1)} ({what})", why, "leave them out by a rule (leave_out)")


def _head(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    most = math.inf if runtime.largest_head is None else runtime.largest_head
    for name, layout in facts.modules.items():
        if name.rpartition(".")[2] == "lm_head" and layout.m > most:
            why = f"{runtime.title} takes {most} at most"
            yield Miss(f"{name} ({layout.m} rows)", why, "leave it out by a rule (leave_out)")


def _numbered(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    if not runtime.numbered:
        return
    outside = [n for n in facts.modules if not any(map(str.isdecimal, n.split(".")))]
    if outside:
        why = f"{runtime.title} passes over what is in no numbered layer"
        yield Miss(f"{some(outside, 1)} (in none)", why, "leave it out by a rule (leave_out)")


def _replicated(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    if facts.replicates and not runtime.replicated:
        why = f"{runtime.title} does not replicate layers"
        yield Miss("layer_replication", why, "serve it with PEFT")


def _together(runtime: Runtime, facts: Facts) -> Iterator[Miss]:
    for rule in runtime.together:
        if lacking := missing(rule, facts.parts):
            remedy = "adapt them all"
            if rule.filled:
                remedy = "--for writes zeros, if their shape is known: --base FOLDER says it"
            yield Miss(f"{some(lacking, 1)} (not adapted)", f"{runtime.title} {rule.why}", remedy)


def missing(rule: Together, parts: Parts) -> list[str]:
    """The modules that others need beside them and that are not there."""
    return parts.once(rule, lambda: _missing(rule, parts.owners))


def _missing(rule: Together, parts: Owners) -> list[str]:
    owners = [parts.get(last, {}).keys() for last in {*rule.needed, *rule.one}]
    if all(own == owners[0] for own in owners):
        return []
    complete = set.intersection(*(set(parts.get(last, ())) for last in rule.needed))
    needing = set().union(*(parts.get(last, ()) for last in rule.one)) - complete
    lacking = filter(re.compile(rule.owners).fullmatch, needing)
    return [
        f"{owner}.{last}".lstrip(".")
        for owner in sorted(lacking, key=lambda x: _first(x, parts))
        for last in rule.needed
        if owner not in parts.get(last, ())
    ]


def _first(owner: str, parts: Owners) -> int:
    return min(own[owner] for own in parts.values() if owner in own)


def _words_of_ranks(runtime: Runtime) -> str:
    return ", ".join(map(str, runtime.ranks)) if runtime.ranks else "any"


def _words_of_whole(runtime: Runtime) -> str:
    return "any" if runtime.whole is None else ", ".join(runtime.whole) or "none"


def _words_of_together(runtime: Runtime) -> str:
    return "; ".join(" with ".join(rule.needed) for rule in runtime.together) or "any alone"


def _word(has: bool) -> str:
    return "yes" if has else "no"


def _words_of_head(runtime: Runtime) -> str:
    return "any" if runtime.largest_head is None else str(runtime.largest_head)


DEMANDS = (
    Demand("format", lambda x: ", ".join(x.formats), _format),
    Demand("config has", lambda x: ", ".join(x.stated) or "any", _stated),
    Demand("largest rank", _words_of_ranks, _ranks, told=True),
    Demand("one rank for all", lambda x: _word(x.one_rank), _one_rank, told=True),
    Demand("scales PEFT folders by", lambda x: x.scale, _scale, told=True),
    Demand("target_modules", lambda x: "a list" if x.listed else "any", _targets, told=True),
    Demand("tensors saved whole", _words_of_whole, _whole, told=True),
    Demand("kinds of layers", lambda x: ", ".join(x.kinds), _kinds),
    Demand("other adapters than LoRA", _words_of_others, _others),
    Demand("experts as parameters", lambda x: _word(x.experts), _experts),
    Demand("biases, norms, rows of tokens", lambda x: _word(x.changes), _changes, told=True),
    Demand("rows of lm_head", _words_of_head, _head),
    Demand("modules outside of layers", lambda x: _word(not x.numbered), _numbered),
    Demand("layer_replication", lambda x: _word(x.replicated), _replicated),
    Demand("modules together", _words_of_together, _together, told=True),
)
