"""The sets of adapters: what is trained, how often, and which merges are scored on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bases
import byte_llama
import decoder
import digits
import encoders
from bench import Adapter, Bench
from merges import CUT, MORE, Candidate

DATA = Path(__file__).resolve().parent.parent / "data" / "quality"
"""Where models, texts and trained adapters are kept, with what was measured of them."""
PRETRAINED, DECODER, OVERTRAINED = "pretrained", "pretrained decoder", "over-trained"


@dataclass(frozen=True)
class Set:
    """Adapters of one kind, trained once for each seed.

    regime: sets of one regime are averaged in tables.
    seeds: the first is trained by `make quality` too, if quick; all by `make quality-full`.
    bench, adapters: of a seed; what is missing is trained.
    first: merges of the first training besides CORE.
    few: numbers of its adapters, the first ones, that CORE is scored on too.
    """

    regime: str
    seeds: Sequence[int]
    bench: Callable[[int], Bench]
    adapters: Callable[[int], list[Adapter]]
    first: Sequence[Candidate] = ()
    few: Sequence[int] = ()
    quick: bool = True


def _encoders(base: str, kind: str, seed: int) -> list[Adapter]:
    folder = DATA / f"{base}-{kind}-{seed}" / "adapters"
    return encoders.adapters(encoders.KINDS[kind], base, seed, DATA, folder)


def _of(base: str, kind: str, seeds: Sequence[int], **settings: Any) -> Set:
    bench, adapters = partial(encoders.bench, base, data=DATA), partial(_encoders, base, kind)
    return Set(PRETRAINED, seeds, bench, adapters, **settings)


def _joined(seed: int) -> list[Adapter]:
    """Two adapters a task, of eight tasks."""
    return [*_encoders(bases.SMALL, "even", seed)[:8], *_encoders(bases.SMALL, "ranks", seed)[:8]]


SETS = {
    "L3 even": _of(bases.SMALL, "even", (0, 1, 2), first=MORE + CUT, few=(3, 4, 8)),
    "L3 uneven": _of(bases.SMALL, "uneven", (0, 7, 1), first=MORE),
    "L3 shared A": _of(bases.SMALL, "shared_a", (0, 8, 1), first=MORE),
    "L3 ranks": _of(bases.SMALL, "ranks", (0,)),
    "L3 even and ranks": Set(
        PRETRAINED, (0,), partial(encoders.bench, bases.SMALL, data=DATA), _joined
    ),
    "L6 even": _of(bases.FULL, "even", (0, 9)),
    "L6 uneven": _of(bases.FULL, "uneven", (0,), quick=False),
    "L6 shared A": _of(bases.FULL, "shared_a", (0,), quick=False),
    "SmolLM2": Set(
        DECODER,
        (0,),
        partial(decoder.bench, data=DATA),
        lambda seed: decoder.adapters(seed, DATA, DATA / f"SmolLM2-{seed}"),
    ),
    "byte Llama": Set(
        OVERTRAINED,
        (0, 1, 2),
        lambda seed: byte_llama.bench(DATA),
        lambda seed: byte_llama.adapters(DATA, seed),
    ),
    "digits": Set(
        OVERTRAINED,
        (0, 1, 2),
        lambda seed: digits.bench(DATA),
        lambda seed: digits.adapters(DATA, seed),
    ),
}


SEEN = {
    *((name, "0") for name in ("L3 even", "L3 uneven", "L3 shared A", "L6 even", "SmolLM2")),
    ("byte Llama", "0"),
    ("L3 uneven", "7"),
}
"""The trainings, as set and seed, that the constants of the default λ and the choice of the default
method were fixed on. All others confirm."""
