"""What is asked of a merge, in one object that is checked once: from keyword arguments, a command
line, YAML or JSON, or the model card of a merge.

In a text it is one mapping with the names of the API's arguments, a method's own options beside
them, and `adapters`: paths, or names with the SHA-256 of their files (storage/find.py).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import options
from .adapters.whole import check_policy
from .errors import OptionError
from .mergekit_recipe import mergekit
from .methods import choose
from .methods.base import Chosen
from .methods.steps import POST, PRE
from .registry import Registry
from .storage import hub, json_file, yaml_file
from .storage.find import find, has
from .storage.gguf_file import GgufFile
from .storage.input_file import InputFile, Refuse
from .storage.marker import RECIPE
from .storage.safetensors_file import SafetensorsFile

__all__ = [
    "AUTO",
    "CARD",
    "DETAILS",
    "DTYPES",
    "FULL",
    "NONE",
    "NORMS",
    "REPORTS",
    "SVC",
    "Input",
    "Recipe",
    "Rule",
    "all_options",
    "check_scale",
    "check_weights",
    "plain_of",
]

DTYPES = ("float32", "bfloat16", "float16")
AUTO, SVC = "auto", "svc"
DETAILS, FULL, NORMS, NONE = REPORTS = ("details", "full", "norms", "none")
"""What a report says of the adapters: all, also by module; all; their norms alone; or nothing."""
CARD = "README.md"
MOST_BYTES = 1_000_000
"""Of a recipe, and of a card with one."""


@dataclass(frozen=True)
class Input:
    """An adapter, or the base model: its path, or its name where a path would tell too much, and
    the SHA-256 of its files by their names ({} where it has none, or they are not known)."""

    name: str
    files: Mapping[str, str] = field(default_factory=dict)

    def plain(self) -> Any:
        return {"name": self.name, "files": dict(self.files)} if self.files else self.name

    def absolute(self) -> Input:
        if hub.is_id(self.name):
            return self
        return dataclasses.replace(self, name=os.path.abspath(self.name))

    @classmethod
    def of(cls, option: str, plain: Any) -> Input:
        """From a path, or a mapping of `name` and `files`. OptionError."""
        if isinstance(plain, cls):
            return plain
        if isinstance(plain, (str, os.PathLike)):
            plain = {"name": os.fspath(plain)}
        if not isinstance(plain, Mapping) or not plain.keys() <= {"name", "files"}:
            raise OptionError(option, f"{str(plain)[:40]!r} is no path", "give one")
        name, files = plain.get("name"), plain.get("files", {})
        if not isinstance(name, str) or not name or "\0" in name:
            raise OptionError(option, f"{str(name)[:40]!r} is no folder", "give its path")
        if not isinstance(files, Mapping) or not all(map(_is_sum, files.items())):
            problem = f"the files of {name!r} are no names with their SHA-256"
            raise OptionError(option, problem, "leave 'files' out, or restore it")
        return cls(name, dict(files))


def _is_sum(item: tuple[Any, Any]) -> bool:
    name, digest = item
    is_name = isinstance(name, str) and os.path.basename(name) == name != ""
    return is_name and bool(re.fullmatch("[0-9a-f]{64}", str(digest)))


@dataclass(frozen=True)
class Rule:
    """What is asked of modules whose names match a pattern ("*" any characters, "?" one, "[ab]" one
    of these); None: what is asked of all."""

    modules: str
    leave_out: bool = False
    weights: tuple[float, ...] | None = None
    rank: int | None = None
    energy: float | None = None
    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def asks(self) -> dict[str, Any]:
        """What it sets, by name; a method goes with its options."""
        method = (self.method, dict(self.options)) if self.method else None
        found = {
            "leave_out": self.leave_out or None,
            "weights": self.weights,
            "rank": self.rank,
            "energy": self.energy,
            "method": method,
        }
        return {name: value for name, value in found.items() if value is not None}

    def plain(self) -> dict[str, Any]:
        asks = self.asks | ({"method": self.method, **self.options} if self.method else {})
        return {"modules": self.modules} | {k: _listed(v) for k, v in asks.items()}

    @classmethod
    def of(cls, plain: Any) -> Rule:
        """From a mapping with `modules` and what is asked. OptionError."""
        if not isinstance(plain, Mapping) or not isinstance(plain.get("modules"), str):
            problem = f"{str(plain)[:60]!r} names no modules"
            raise OptionError("rules", problem, "give 'modules', a pattern of their names")
        given = dict(plain)
        modules = given.pop("modules")
        leave_out = options.check("leave_out", given.pop("leave_out", False), bool)
        weights, (rank, energy) = given.pop("weights", None), _cut(given)
        if weights is not None:
            weights = tuple(_numbers(weights))
            if not any(weights):
                problem = f"all weights of {modules!r} are zero"
                raise OptionError("rules", problem, "say leave_out")
        method = given.pop("method", None)
        if method is None and given:
            problem = f"{next(iter(given))!r} of {modules!r} is no part of a rule"
            known = "leave_out, weights, rank, energy, or a method with its options"
            raise OptionError("rules", problem, f"give {known}")
        if method is not None:
            given = all_options(choose(method, given))
        made = cls(modules, leave_out, weights, rank, energy, method, given)
        if not made.asks:
            raise OptionError("rules", f"nothing is asked of {modules!r}", "say what")
        return made


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
        by_pattern = _weights_for(given.pop("weights_for", None))
        own = {f.name for f in dataclasses.fields(cls)} - {"options"}
        asked = {name: value for name, value in given.items() if name in own}
        theirs = {name: value for name, value in given.items() if name not in own}
        chosen = choose(asked.setdefault("method", AUTO), theirs)
        made = cls(**asked | _checked(asked), options=all_options(chosen))
        return dataclasses.replace(made, rules=(*made.rules, *by_pattern))

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
        return {k: _listed(v) for k, v in ordered.items() if v not in (None, (), [])}

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
        adapters = tuple(_located(x, beside, folder) for x in made.adapters)
        found = made.base and _located(made.base, beside, folder if base is None else None)
        features = made.features and _located(made.features, beside, folder)
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


def plain_of(path: str | os.PathLike[str]) -> Any:
    """What a file holds, a merge of one file among them, or the card in a folder. OptionError."""
    place, name = Path(path), os.fspath(path)
    place = place / CARD if place.is_dir() else place
    if place.suffix in (".safetensors", ".gguf"):
        return parse(_of_merge(place, name), name)
    return parse(InputFile(place, functools.partial(_refusal, name)).read(MOST_BYTES), name)


def _of_merge(path: Path, name: str) -> bytes:
    """The recipe in a merge that is one file."""
    recipe = _metadata(path, functools.partial(_refusal, name)).get(RECIPE)
    if not isinstance(recipe, str):
        raise _refusal(name, "has no recipe in its metadata", "give a merge of domerge_fast")
    return recipe.encode()


def _metadata(path: Path, refuse: Refuse) -> Mapping[str, object]:
    if path.suffix == ".gguf":
        gguf = GgufFile(path, refuse)
        gguf.read_header()
        return gguf.metadata
    file = SafetensorsFile(path, refuse)
    file.tensors()
    return file.metadata


def _located(x: Input, beside: Path, under: Path | None) -> Input:
    place = (under or beside) / x.name
    if under is None and hub.is_id(x.name) and not os.path.lexists(place):
        refuse = functools.partial(_elsewhere, x.name)
        if not x.files or has(hub.local(x.name, [*x.files], refuse), x.files):
            return x
    if x.files and under is None and not has(place, x.files):
        raise _elsewhere(x.name, "is not here as the recipe's files were")
    if x.files and under is not None:
        place = find(x.name, x.files, under)
    return dataclasses.replace(x, name=os.fspath(place))


def _elsewhere(name: str, problem: str, remedy: str = "") -> OptionError:
    remedy = "say below which folder they are (--adapters DIR)"
    return OptionError("adapters", f"{name!r} {problem}", remedy)


def all_options(chosen: Chosen) -> dict[str, Any]:
    """A method's options, those of the one inside it among them."""
    found: dict[str, Any] = {}
    one: Chosen | None = chosen
    while one:
        found = dataclasses.asdict(one.options) | found
        one = one.inner
    return found


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of what was given, each by itself."""
    rank, energy = _cut(dict(given))
    ragged = options.check("ragged", given.get("ragged", False), bool) or energy is not None
    scale, dtype = given.get("scale"), given.get("dtype")
    found = {
        "adapters": _inputs(given.get("adapters", ())),
        "weights": None if given.get("weights") is None else tuple(_numbers(given["weights"])),
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
        "features_energy": _share("features_energy", given.get("features_energy")),
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


def _weights_for(given: Any) -> tuple[Rule, ...]:
    if given is None:
        return ()
    if not isinstance(given, Mapping):
        problem = "is no mapping of patterns to weights"
        raise OptionError("weights_for", problem, 'give one: {"double_blocks.*": [0.5, 1]}')
    return tuple(Rule.of({"modules": name, "weights": w}) for name, w in given.items())


def _share(name: str, given: float | None) -> float | None:
    """Between 0 and 1, both left out; OptionError."""
    if given is not None and not 0 < options.check(name, given, float) < 1:
        raise OptionError(name, f"{given!r} is no share", "give one between 0 and 1")
    return given


def _cut(given: dict[str, Any]) -> tuple[int | None, float | None]:
    """Takes rank and energy out of what was given."""
    rank, energy = given.pop("rank", None), given.pop("energy", None)
    if rank is not None:
        rank = options.check("rank", rank, int, low=1)
    if energy is not None:
        energy = options.check("energy", energy, float)
        if not 0 < energy <= 1:
            raise OptionError("energy", f"{energy!r} is not a share", "give one in (0, 1]")
    return rank, energy


def _add(to: dict[str, Any], rule: Rule, name: str) -> None:
    for what, value in rule.asks.items():
        if to.setdefault(what, value) != value:
            problem = f"two rules set another {what} for {name!r}"
            raise OptionError("rules", problem, f"let {rule.modules!r} or the other not match it")


def check_scale(given: float | str) -> float:
    scale: float = options.check("scale", given, float)
    if scale == 0:
        raise OptionError("scale", "0 leaves nothing of the merge", "give another factor")
    return scale


def check_weights(
    weights: Sequence[float] | None, count: int, each: str = "weights"
) -> list[float]:
    """One for each of `count` adapters; None is 1 for each. each: the option that one is of."""
    if weights is None:
        return [1.0] * count
    found = _numbers(weights, each)
    if len(found) != count:
        problem = f"{len(found)} weights for {count} adapters"
        raise OptionError("weights", problem, "give one number for each adapter, in order")
    return found


def _numbers(given: Any, each: str = "weights") -> list[float]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        problem = f"{str(given)[:40]!r} is no list of numbers"
        raise OptionError("weights", problem, "give one number for each adapter, in order")
    return [options.check(each, w, float) for w in given]


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


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _refusal(path: str, problem: str, remedy: str) -> OptionError:
    return OptionError("recipe", f"{path!r}: {problem}", remedy)


def parse(data: bytes, name: str) -> Any:
    """What a text holds: JSON, YAML, or Markdown with a recipe in it. OptionError."""
    try:
        if found := re.search(rb"^## Recipe\n\n(```+)json\n(.*?)\n\1$", data, re.M | re.S):
            return json_file.parse(found[2])
        return json_file.parse(data) if data.lstrip()[:1] == b"{" else yaml_file.parse(data)
    except (json_file.BadJson, yaml_file.BadYaml) as error:
        raise _refusal(name, f"cannot be read ({error})", "correct it") from error
