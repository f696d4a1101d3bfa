"""What a runtime is: a program that loads adapters, as a row of what it demands of their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..registry import usable

__all__ = ["PATTERNS", "SCALES", "Runtime", "Stated", "Together"]


@dataclass(frozen=True)
class Stated:
    """What PEFT's config says of all modules, patterns aside."""

    r: int
    alpha: float
    rslora: bool


PATTERNS = "rank_pattern, alpha_pattern"
SCALES: dict[str, Callable[[Stated, int], float]] = {
    "lora_alpha / r": lambda said, rank: said.alpha / said.r,
    "lora_alpha / own rank": lambda said, rank: said.alpha / rank,
    "lora_alpha / own rank, rsLoRA": lambda said, rank: (
        said.alpha / (rank**0.5 if said.rslora else rank)
    ),
}
"""How a runtime scales a module of a PEFT folder, by its rule: of the config and the module's own
rank. PATTERNS is PEFT's own, which is always right."""


@dataclass(frozen=True)
class Together:
    """Of the modules of one owner, whose name is matched by `owners`: where it has one that is
    called as one of `one`, it needs all of `needed`. why: what happens otherwise. filled: whether
    factors of zero for what is missing are written by themselves."""

    one: tuple[str, ...]
    needed: tuple[str, ...]
    why: str
    filled: bool = False
    owners: str = ".*"


@dataclass(frozen=True)
class Runtime:
    """A row of `RUNTIMES`. title: with its version; source: where its demands were read.

    formats: those it takes, by name; what is written where the adapters have none of them is the
    first. ranks: what its largest rank may be set to, () where it is any; flag: how it is told.
    stated: what PEFT's config has to say. one_rank: whether all modules need the same. scale:
    how it scales modules of a PEFT folder, of SCALES, or PATTERNS. listed: whether
    target_modules has to be a list. whole: which tensors saved whole it takes, by the last
    names of their modules; None for any. kinds: of layers. experts: whether it takes parameters
    that hold a matrix for every expert. changes: whether it takes changes that are no product
    of factors (biases on B, rows of tokens). largest_head: rows of an `lm_head` at most.
    numbered: whether it takes modules of numbered layers only. replicated: whether
    layer_replication is read. together: what modules need others. skips: whether modules whose
    names it does not know are passed over without an error. others: the adapters that it takes
    besides LoRA, of LoHa, LoKr, DoRA, and diff, updates that are stored whole. told: whether a
    merge for no runtime says what this one would not take.
    """

    name: str
    title: str
    source: str
    formats: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    flag: str = ""
    stated: tuple[str, ...] = ()
    one_rank: bool = False
    scale: str = PATTERNS
    listed: bool = False
    whole: tuple[str, ...] | None = None
    kinds: tuple[str, ...] = ("linear", "embedding", "conv1d", "conv2d", "conv3d")
    experts: bool = True
    changes: bool = False
    largest_head: int | None = None
    numbered: bool = False
    replicated: bool = True
    together: tuple[Together, ...] = field(default=())
    skips: bool = False
    others: tuple[str, ...] = ()
    told: bool = False
    why_not: Callable[[], str | None] = usable

    @property
    def summary(self) -> str:
        return f"{self.title}, from {' or '.join(map(repr, self.formats))}"

    @property
    def differences(self) -> bool:
        """Whether it takes updates that are stored whole."""
        return "diff" in self.others

    @property
    def ragged(self) -> bool:
        """Whether modules may have ranks of their own."""
        return not self.one_rank and self.scale == PATTERNS
