"""What is asked of a merge, in one object that is checked once: from keyword arguments, a command
line, YAML or JSON, or the model card of a merge.

In a text it is one mapping with the names of the API's arguments, a method's own options beside
them, and `adapters`: paths, or names with the SHA-256 of their files (storage/find.py).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .. import options
from ..adapters.whole import check_policy
from ..errors import OptionError
from ..methods import choose
from ..methods.base import Chosen
from ..methods.steps import POST, PRE
from ..registry import Registry
from .checks import check_cut, check_scale, check_share, numbers
from .input import Input, located
from .mergekit import mergekit
from .rule import Rule, all_options, listed, of_patterns
from .text import plain_of

__all__ = ["AUTO", "DETAILS", "DTYPES", "FULL", "NONE", "NORMS", "REPORTS", "SVC", "Recipe"]

DTYPES = ("float32", "bfloat16", "float16")
AUTO, SVC = "auto", "svc"
DETAILS, FULL, NORMS, NONE = REPORTS = ("details", "full", "norms", "none")
"""What a report says of the adapters: all, also by module; all; their norms alone; or nothing."""


@dataclass(frozen=True)
class Recipe:
    """What is asked; the fields are the arguments of `merge`. options: the method's own, all of
    them. adapters: empty where they are given beside it. scale, format, runtime, dtype and weights:
    None is what `merge` says it is. rules: of modules by name, in any order."""

    method: str = AUTO
    options: Mapping[str, Any] = field(default_factory=dict)
    adapters: tuple[Input, ...] = ()
    weights: tuple[float, ...] | None = None
    scale: float | str | None = None
    rank: int | None = None
    energy: float | None = None
    ragged: bool = False
    pre: tuple[str, ...] = ()
    post: tuple[str, ...] = ()
    form: str = "adapter"
    format: str | None = None
    runtime: str | None = None
    base: Input | None = None
    whole: str = AUTO
    backend: str = AUTO
    device: str = AUTO
    dtype: str | None = None
    base_model: str | None = None
    rules: tuple[Rule, ...] = ()
    report: str = FULL
    features: Input | None = None
    features_energy: float | None = None

    @classmethod
    def make(cls, **given: Any) -> Recipe:
        """From keyword arguments, a method's own options among them. weights_for: rules of nothing
        but weights, by pattern. OptionError."""
        by_pattern = of_patterns(given.pop("weights_for", None))
        own = {f.name for f in dataclasses.fields(cls)} - {"options"}
        asked = {name: value for name, value in given.items() if name in own}
        theirs = {name: value for name, value in given.items() if name not in own}
        chosen = choose(asked.setdefault("method", AUTO), theirs)
        made = cls(**asked | _checked(asked), options=all_options(chosen))
        return dataclasses.replace(made, rules=(*made.rules, *by_pattern)) if by_pattern else made

    @property
    def chosen(self) -> Chosen:
        """The method with its options."""
        return choose(self.method, self.options)

    @property
    def calibrated(self) -> bool:
        """Whether the merge itself is brought to the adapters (svc)."""
        return self.post[:1] == (SVC,)

    def of_modules(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What the rules ask of modules, by name; those without a rule are left out. OptionError
        for a pattern without a module, and for two that ask otherwise of one."""
        found: dict[str, dict[str, Any]] = {}
        for rule in self.rules:
            matching = [name for name in names if fnmatchcase(name, rule.modules)]
            if not matching:
                remedy = f"there is, for one, {names[0]!r}" if names else "leave the rule out"
                raise OptionError("rules", f"{rule.modules!r} matches no module", remedy)
            for name in matching:
                _add(found.setdefault(name, {}), rule, name)
        return found

    def plain(self) -> dict[str, Any]:
        """One mapping of numbers, strings, lists and mappings, without what was not asked."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given = own.pop("options")
        own["adapters"] = [x.plain() for x in self.adapters]
        for name in ("base", "features"):
            own[name] = own[name].plain() if own[name] else None
        own["rules"] = [x.plain() for x in self.rules]
        head = ("method", "adapters", "weights", "scale")
        ordered = {k: own.pop(k) for k in head} | dict(given) | own
        return {k: listed(v) for k, v in ordered.items() if v not in (None, (), [])}

    @classmethod
    def read(
        cls,
        path: str | os.PathLike[str],
        under: str | os.PathLike[str] | None = None,
        base: str | os.PathLike[str] | None = None,
    ) -> Recipe:
        """From a file: YAML, JSON, or a model card; or the folder with the card. OptionError.

        under: where adapters are looked for, by their files' sums or else by their names. None:
        these are paths, as the base's is, from the file's folder. base: the folder of the base,
        in place of the one that is named.
        """
        made = cls.of_plain(plain_of(path))
        if base is not None and made.base:
            here = dataclasses.replace(made.base, name=os.fspath(base)).absolute()
            made = dataclasses.replace(made, base=here)
        beside = Path(path) if os.path.isdir(path) else Path(path).parent
        folder = None if under is None else Path(under)
        adapters = tuple(located(x, beside, folder) for x in made.adapters)
        found = made.base and located(made.base, beside, folder if base is None else None)
        features = made.features and located(made.features, beside, folder)
        return dataclasses.replace(made, adapters=adapters, base=found, features=features)

    @classmethod
    def of_plain(cls, plain: Any) -> Recipe:
        """From what `plain` returns, or mergekit's shape of it. OptionError."""
        if not isinstance(plain, Mapping) or not all(isinstance(k, str) for k in plain):
            raise OptionError("recipe", "is no mapping of names to values", "give one")
        if "merge_method" in plain:
            plain = mergekit(plain)
        return cls.make(**plain)

    def absolute(self) -> Recipe:
        """With paths that mean the same from anywhere."""
        adapters = tuple(x.absolute() for x in self.adapters)
        base, features = (x and x.absolute() for x in (self.base, self.features))
        return dataclasses.replace(self, adapters=adapters, base=base, features=features)


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of what was given, each by itself."""
    rank, energy = check_cut(dict(given))
    ragged = options.check("ragged", given.get("ragged", False), bool) or energy is not None
    scale, dtype = given.get("scale"), given.get("dtype")
    found = {
        "adapters": _inputs(given.get("adapters", ())),
        "weights": None if given.get("weights") is None else tuple(numbers(given["weights"])),
        "scale": scale if scale in (None, AUTO) else check_scale(scale),
        "rank": rank,
        "energy": energy,
        "ragged": ragged,
        "pre": _steps("pre", given.get("pre", ()), PRE),
        "post": _post(given.get("post", ())),
        "form": options.text("form", given.get("form", "adapter")) or "adapter",
        "format": options.text("format", given.get("format")),
        "runtime": options.text("runtime", given.get("runtime")),
        **{
            k: None if given.get(k) is None else Input.of(k, given[k]) for k in ("base", "features")
        },
        "features_energy": check_share("features_energy", given.get("features_energy")),
        "whole": check_policy(given.get("whole", AUTO)),
        "dtype": dtype if dtype is None else options.choose("dtype", dtype, DTYPES),
        "base_model": options.text("base_model", given.get("base_model")),
        "rules": _rules(given.get("rules", ())),
        "report": options.choose("report", given.get("report", FULL), REPORTS),
    }
    return found


def _inputs(given: Any) -> tuple[Input, ...]:
    if isinstance(given, (str, os.PathLike)):
        raise OptionError("adapters", "is one adapter, not a list", "put it in a list: [adapter]")
    if not isinstance(given, Iterable):
        raise OptionError("adapters", f"{given!r} is no list", "give the paths of some")
    return tuple(Input.of("adapters", x) for x in given)


def _rules(given: Any) -> tuple[Rule, ...]:
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise OptionError("rules", "is no list", 'give one of {"modules": PATTERN, …}')
    return tuple(x if isinstance(x, Rule) else Rule.of(x) for x in given)


def _add(to: dict[str, Any], rule: Rule, name: str) -> None:
    for what, value in rule.asks.items():
        if to.setdefault(what, value) != value:
            problem = f"two rules set another {what} for {name!r}"
            raise OptionError("rules", problem, f"let {rule.modules!r} or the other not match it")


def _post(names: Any) -> tuple[str, ...]:
    found = _steps("post", names, POST, (SVC,))
    if SVC in found[1:]:
        raise OptionError("post", f"{SVC!r} works on the merge itself", "put it first, once")
    return found


def _steps(
    option: str, names: Any, table: Registry[Any], besides: Sequence[str] = ()
) -> tuple[str, ...]:
    if isinstance(names, str):
        raise OptionError(option, "is one name, not a list", f"say [{names!r}]")
    if not isinstance(names, Iterable):
        raise OptionError(option, f"{names!r} is no list of names", "give one, or leave it out")
    found = tuple(names)
    for name in found:
        if name not in besides:
            table.choose(option, name, besides=besides)
    return found
