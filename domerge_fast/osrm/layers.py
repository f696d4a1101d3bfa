"""The linear layers of a model that an adapter is to have."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..adapters.names import PREFIX, Spelling
from ..errors import OptionError, some

__all__ = ["Linear", "chosen"]


@dataclass(frozen=True)
class Linear:
    """A layer y = W x + b with W [m, n]. name: as PEFT calls it. transposed: stored as [n, m], as
    transformers' Conv1D does."""

    name: str
    layer: nn.Module
    m: int
    n: int
    transposed: bool = False


def chosen(model: nn.Module, target_modules: Sequence[str] | str) -> dict[str, Linear]:
    """The layers that `target_modules` names as in PEFT: ends of their names, or one regular
    expression for a whole name; by name, in the model's order.

    OptionError for what is no linear layer, is one under two names, or is named and not there.
    """
    _check_model(model)
    wanted = _matcher(target_modules)
    named = dict(model.named_modules(remove_duplicate=False))
    spell = Spelling([PREFIX + path for path in named])
    paths = {spell(PREFIX + path): path for path in named if path}
    found = {
        name: _linear(name, named[path]) for name, path in paths.items() if wanted.fullmatch(name)
    }
    if not found:
        some_linear = [n for n, path in paths.items() if isinstance(named[path], nn.Linear)]
        remedy = f"the model's linear layers are {some(some_linear)}"
        raise OptionError("target_modules", f"{target_modules!r} names none of its layers", remedy)
    if isinstance(target_modules, str):
        missing = []
    else:
        missing = [t for t in target_modules if not any(_ends(name, t) for name in found)]
    if missing:
        problem = f"the model has no layers called {some(missing)}"
        raise OptionError("target_modules", problem, "leave them out, or correct the names")
    _check_tied(found)
    return found


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise OptionError("model", f"is a {type(model).__name__}", "give a torch module")
    if hasattr(model, "peft_config"):
        problem = "has adapters already, and the inputs of the base model are needed"
        raise OptionError("model", problem, "give the base model (model.unload(), or load it anew)")


def _matcher(target_modules: Sequence[str] | str) -> re.Pattern[str]:
    if target_modules == "all-linear":
        problem = "'all-linear' leaves it to PEFT which layers those are"
        raise OptionError("target_modules", problem, "name them, as ['q_proj', 'v_proj']")
    if isinstance(target_modules, str):
        try:
            return re.compile(target_modules)
        except re.error as error:
            problem = f"{target_modules!r} is no regular expression ({error})"
            raise OptionError("target_modules", problem, "correct it, or give names") from error
    names = list(target_modules)
    if not names or not all(isinstance(name, str) and name for name in names):
        problem = f"{target_modules!r} is no list of names"
        raise OptionError("target_modules", problem, "name layers, as ['q_proj', 'v_proj']")
    return re.compile(rf"(?:.*\.)?(?:{'|'.join(map(re.escape, names))})", re.DOTALL)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _linear(name: str, layer: nn.Module) -> Linear:
    if isinstance(layer, nn.Linear):
        return Linear(name, layer, layer.out_features, layer.in_features)
    weight = getattr(layer, "weight", None)
    if type(layer).__name__ == "Conv1D" and weight is not None and weight.ndim == 2:
        n, m = weight.shape
        return Linear(name, layer, m, n, transposed=True)
    problem = f"{name!r} is a {type(layer).__name__}, no linear layer"
    raise OptionError("target_modules", problem, "name linear layers alone")


def _check_tied(found: dict[str, Linear]) -> None:
    """Its inputs would be those of several places, and PEFT would adapt it at one of them."""
    first: dict[int, str] = {}
    for name, linear in found.items():
        other = first.setdefault(id(linear.layer), name)
        if other != name:
            problem = f"{other!r} and {name!r} are one layer"
            raise OptionError("target_modules", problem, "leave tied layers out")
