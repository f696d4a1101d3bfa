"""Densities as coefficients: which share of the entries of updates a method keeps, by module."""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import options
from ..adapters.plan import Stack
from ..errors import OptionError
from ..methods import choose
from ..methods.base import Chosen, Settings
from ..methods.groups import Here
from ..recipe import AUTO, Recipe, Rule
from .coefficients import Addresses

__all__ = [
    "DENSITY",
    "Density",
    "by_module",
    "check",
    "methods_of",
    "of_modules",
    "with_densities",
    "with_methods",
]

DENSITY = "density"

Density = float | Sequence[float] | Tensor
"""One for all modules, or one for each layer, or module, in order; between 0 and 1."""

Methods = Mapping[str, tuple[str, Mapping[str, Any]]]
"""By module, the name of its method, and all options."""


def of_modules(density: Density, addresses: Addresses) -> Tensor:
    """[modules] in float64; [N, modules] of several merges as it is given. OptionError."""
    try:
        given = torch.as_tensor(density, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        problem = f"{str(density)[:40]!r} is no number"
        raise OptionError(DENSITY, problem, "give one, or one a layer or module") from error
    for number in given.flatten().tolist():
        options.check(DENSITY, number, float, low=0.0, high=1.0)
    count, layers = len(addresses.modules), len(addresses.layers)
    if given.dim() == 0:
        return given.expand(count)
    if given.shape[-1] == count and given.dim() <= 2:
        return given
    if given.dim() == 1 and len(given) == layers:
        return given[addresses.layer_of]
    remedy = f"give one number, one for each of {layers} layers, or for each of {count} modules"
    raise OptionError(DENSITY, f"is {list(given.shape)}", remedy)


def check(recipe: Recipe, densities: Tensor, anew: bool) -> None:
    """OptionError where these have no meaning. anew: whether merges are made anew, each as a
    whole."""
    of_rules = [(rule.method, rule.options) for rule in recipe.rules if rule.method]
    asked = [(m, x) for m, x in [(recipe.method, recipe.options), *of_rules] if DENSITY in x]
    if not asked:
        problem = f"{recipe.method!r} keeps all entries"
        raise OptionError(DENSITY, problem, "leave it out, or prepare 'ties', or 'core' with it")
    values = densities.unique().tolist()
    # Of every value, as a method may refuse some.
    apart = {by_module(choose(m, {**x, DENSITY: value})) for m, x in asked for value in values}
    if not anew or len(values) < 2:
        return
    if False in apart:
        problem = f"{recipe.method!r} seeks the largest entries of the whole model"
        raise OptionError(DENSITY, problem, "give one number, or prepare scope='tensor'")
    if recipe.scale == AUTO:
        problem = "λ would be found for the modules of each density by themselves"
        raise OptionError(DENSITY, problem, "give one number, or prepare with a number as scale")


def by_module(chosen: Chosen) -> bool:
    """Whether a method, or the one inside it, makes nothing of the whole model's updates first."""
    inner = chosen
    while inner.inner:
        inner = inner.inner
    row = inner.method
    seen: list[bool] = []

    def groups() -> Iterator[Sequence[Stack]]:
        seen.append(True)
        yield from ()

    if row.prepare:
        row.prepare(Here(groups()), inner.options, Settings(1.0, torch.float32, "auto"))
    return not seen


def methods_of(
    recipe: Recipe, names: Sequence[str], densities: Sequence[float] | None = None
) -> Methods:
    """What the recipe has every module merged by, at other densities where they are given."""
    asked = recipe.of_modules(names)
    usual = recipe.method, dict(recipe.options)
    found = {name: asked.get(name, {}).get("method", usual) for name in names}
    if densities is None:
        return found
    return {
        name: (method, {**given, DENSITY: density} if DENSITY in given else given)
        for (name, (method, given)), density in zip(found.items(), densities)
    }


def with_densities(recipe: Recipe, names: Sequence[str], densities: Sequence[float]) -> Recipe:
    """The recipe of a merge at these densities."""
    return with_methods(recipe, methods_of(recipe, names, densities))


def with_methods(recipe: Recipe, methods: Methods) -> Recipe:
    """The recipe of a merge whose modules have these methods: that of the first, and rules for
    those that have another one."""
    method, given = next(iter(methods.values()))
    rules = tuple(
        Rule(glob.escape(name), method=of, options=own)
        for name, (of, own) in methods.items()
        if (of, own) != (method, given)
    )
    kept = tuple(rule for rule in recipe.rules if not rule.method)
    return dataclasses.replace(recipe, method=method, options=given, rules=(*kept, *rules))
