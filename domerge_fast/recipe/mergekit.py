"""Recipes of mergekit's shape, as far as they mean the same here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import aliases, options
from ..errors import OptionError

__all__ = ["mergekit"]

_MERGEKIT = {
    "linear": ("linear", True, {}),
    "task_arithmetic": ("linear", False, {}),
    "ties": ("ties", True, {"conventions": "mergekit"}),
    "dare_linear": ("dare", False, {"conventions": "mergekit"}),
    "dare_ties": ("dare_ties", False, {"conventions": "mergekit"}),
}
"""Methods that mean the same there: the name here, whether weights are normalized where nothing is
said, and the options here."""


def mergekit(given: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of mergekit's shape as ours. OptionError, in one line, where it means something that
    a merge of adapters does not."""
    plain = dict(given)
    name, models = plain.pop("merge_method"), plain.pop("models", None)
    if name not in _MERGEKIT:
        known = ", ".join(_MERGEKIT)
        hint = options.meant(str(name), [], aliases.METHODS)
        remedy = f"write it with 'method' ({hint})" if hint else "write it with 'method'"
        raise OptionError("merge_method", f"{name!r} is read of {known} only", remedy)
    method, normalizes, extra = _MERGEKIT[name]
    base, dtype = plain.pop("base_model", None), plain.pop("dtype", None)
    parameters = _mapping("parameters", plain.pop("parameters", {}))
    for key in plain:
        problem = "of mergekit's recipes has no meaning for adapters"
        raise OptionError(key, problem, "leave it out")
    listed = [_model(x, parameters) for x in models] if isinstance(models, list) else []
    chosen = [(path, own) for path, own in listed if path != base or own != parameters]
    if not chosen:
        raise OptionError("models", "there are none", "give a list of {model, parameters}")
    weights = [_number(own, "weight") for _, own in chosen]
    if _shared(chosen, "normalize", normalizes) is not normalizes:
        raise OptionError("normalize", f"{name!r} is here as by default", "leave it out")
    if name == "linear":
        total = sum(weights)
        weights = [w / total for w in weights] if total else weights
    density = _shared(chosen, "density", None)
    if density is not None:
        extra = extra | {"density": density}
    scale = _shared(chosen, "lambda", 1.0)
    adapters = [path.rpartition("+")[2] for path, _ in chosen]
    found = {"method": method, "adapters": adapters, "weights": weights, "scale": scale, **extra}
    return found | {k: v for k, v in (("base_model", base), ("dtype", dtype)) if v is not None}


_KNOWN = ("weight", "density", "normalize", "lambda", "int8_mask")


def _model(plain: Any, shared: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The path of a model, and its parameters."""
    entry = dict(_mapping("models", plain))
    path, own = entry.pop("model", None), _mapping("parameters", entry.pop("parameters", {}))
    if not isinstance(path, str) or entry:
        raise OptionError("models", f"{str(plain)[:60]!r} is no model with parameters", "give one")
    found = {**shared, **own}
    for key, value in found.items():
        if key not in _KNOWN:
            raise OptionError("parameters", f"{key!r} is not read", f"use {', '.join(_KNOWN)}")
        if isinstance(value, (list, dict)):
            problem = f"{key!r} differs by layer or by name"
            raise OptionError("parameters", problem, "write it with 'rules'")
    return path, found


def _mapping(name: str, plain: Any) -> Mapping[str, Any]:
    if not isinstance(plain, Mapping):
        raise OptionError(name, f"{str(plain)[:40]!r} is no mapping", "give one")
    return plain


def _number(own: Mapping[str, Any], name: str) -> float:
    if name not in own:
        raise OptionError("parameters", f"a model has no {name!r}", "give one")
    value: float = options.check(name, own[name], float)
    return value


def _shared(chosen: Sequence[tuple[str, Mapping[str, Any]]], name: str, usual: Any) -> Any:
    """A parameter that is one for all models here."""
    values = [own.get(name, usual) for _, own in chosen]
    if any(value != values[0] for value in values):
        raise OptionError("parameters", f"{name!r} differs between models", "give one for all")
    return values[0]
