"""What the folder of a sequential merge says beside the factors: fields with one schema."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import options
from ..adapters.whole import AUTO, check_policy
from ..errors import OptionError, is_text
from ..job import versions
from ..methods import opcm
from ..recipe import DTYPES
from . import disk

__all__ = ["SEQUENTIAL", "State", "Step"]

SEQUENTIAL = disk.Kind(
    "sequential",
    "sequential merge",
    "check the path, or start one there",
    "start again",
    "sequential.json",
)

_ALPHA = next(f.metadata for f in dataclasses.fields(opcm.OpcmOptions) if f.name == "alpha")


@dataclass(frozen=True)
class Step:
    """An adapter that was added: its weight w, ||w ΔW||_F over the whole model, and the share of
    the running sum's squared norm that was left by the cap on its rank. notes: what has to be said
    of the add, a sentence each."""

    adapter: str
    weight: float
    norm: float
    energy_kept: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class State:
    """What the folder says beside the factors.

    alpha: of `opcm`. rank: the cap on every module's rank, or None. base_model: as stated for all
    adapters, or None. whole: what is kept of tensors that adapters save whole. dtype: that of all
    factors added, float32 where they differ. norm: ||S||_F over the whole model. config: PEFT's,
    without ranks. versions: of who wrote it.
    """

    alpha: float
    rank: int | None
    base_model: str | None
    whole: str = AUTO
    dtype: str | None = None
    norm: float = 0.0
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)

    def write(self, fresh: Path) -> None:
        disk.seal(SEQUENTIAL, fresh, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> State:
        """OptionError unless a sequential merge is there."""
        plain = disk.read(SEQUENTIAL, folder)
        try:
            return _state(plain)
        except OptionError as error:
            problem = f"{disk.STATE} is damaged ({error.args[0]}: {error.args[1]})"
            raise disk.refusing(folder)(problem, SEQUENTIAL.remedy) from error


def _state(plain: Mapping[str, Any]) -> State:
    """The state in its file's fields, each checked as the option that it came from."""
    _check_names("it", plain, State)
    steps = plain["steps"]
    if not isinstance(steps, list):
        raise OptionError("steps", "is no list", "give one")
    found = State(
        alpha=options.check("alpha", plain["alpha"], float, **_ALPHA),
        rank=None if plain["rank"] is None else options.check("rank", plain["rank"], int, low=1),
        base_model=options.text("base_model", plain["base_model"]),
        whole=check_policy(plain["whole"]),
        dtype=None if plain["dtype"] is None else options.choose("dtype", plain["dtype"], DTYPES),
        norm=options.check("norm", plain["norm"], float, low=0.0),
        config=_mapping("config", plain["config"]),
        steps=tuple(_step(f"steps[{k}]", step) for k, step in enumerate(steps)),
        versions=_mapping("versions", plain["versions"]),
    )
    # Every step added a part of its update, so the sum is no longer than all of them.
    if found.norm > (1 + 1e-3) * sum(step.norm for step in found.steps):
        raise OptionError("norm", f"{found.norm!r} is more than the steps add up to", "correct it")
    if bool(found.steps) != bool(found.config) or bool(found.steps) != bool(found.dtype):
        raise OptionError("steps", "do not go with config and dtype", "correct them")
    return found


def _step(name: str, plain: Any) -> Step:
    _check_names(name, _mapping(name, plain), Step)
    adapter = options.text(f"{name}.adapter", plain["adapter"])
    weight = options.check(f"{name}.weight", plain["weight"], float)
    if not adapter or not weight:
        raise OptionError(name, "has no adapter, or the weight 0", "give both")
    norm = options.check(f"{name}.norm", plain["norm"], float, low=0.0)
    kept = options.check(f"{name}.energy_kept", plain["energy_kept"], float, low=0.0, high=1.001)
    return Step(adapter, weight, norm, kept, _notes(f"{name}.notes", plain["notes"]))


def _notes(name: str, plain: Any) -> tuple[str, ...]:
    if not isinstance(plain, list) or not all(map(is_text, plain)):
        raise OptionError(name, "is no list of texts", "give one")
    return tuple(plain)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise OptionError(name, f"{str(value)[:40]!r} is no object", "give one")
    return value


def _check_names(what: str, plain: Mapping[str, Any], cls: type) -> None:
    names = {field.name for field in dataclasses.fields(cls)}
    for name in sorted(names ^ plain.keys()):
        problem = f"{what} lacks it" if name in names else f"{what} has no such field"
        raise OptionError(name, problem, "restore it")
