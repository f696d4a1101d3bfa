"""Merge adapters of a live PeftModel into a new adapter of it, by PEFT's own call.

    from domerge_fast.integrations import peft

    peft.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "merged")

    peft.install()
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "merged", combination_type="do")

`add_weighted_adapter` here always runs a method of this package, also where PEFT has a type of the
same name ("linear", "svd"). After `install`, PEFT's names mean what they mean in PEFT.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Sequence
from typing import Any

from torch import nn

from .. import api
from ..adapters import Adapter
from ..adapters.differences import check_none
from ..errors import DomergeError, OptionError
from ..formats import from_model
from ..formats.peft.read import unwrapped
from ..methods import TABLE
from ..options import check
from ..results.report import Report

__all__ = ["PEFT_TYPES", "add_weighted_adapter", "install", "uninstall"]

try:
    from peft import LoraModel, PeftModel
except ImportError as error:
    raise DomergeError(f"{__name__} needs PEFT ({error}); pip install peft") from error

from .peft_adding import add

_ELEMENTWISE = ("dare_linear", "dare_ties", "magnitude_prune", "ties")
PEFT_TYPES = frozenset(
    {"cat", "linear", "svd", *_ELEMENTWISE, *(f"{kind}_svd" for kind in _ELEMENTWISE)}
)
"""PEFT's own combination types; those a newer PEFT declares are found by `install`."""

_OF_BASE: dict[str, Any] = {
    "base_model_name_or_path": None,
    "revision": None,
    "layer_replication": None,
}
_ELSEWHERE = {
    "method": "say combination_type",
    "rank": "say svd_rank",
    "output": "save the new adapter with the model's save_pretrained",
    "overwrite": "save the new adapter with the model's save_pretrained",
    "force": "save the new adapter with the model's save_pretrained",
    "base_model": "leave it out, adapters of one model have one base",
    "ragged": "leave it out, modules of a live model have their own ranks",
    "form": "leave it out, what is added is an adapter",
    "base": "leave it out, the model has its base",
}


def add_weighted_adapter(
    model: PeftModel | LoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "auto",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    **options: Any,
) -> Report:
    """Merge LoRA adapters of a live model into a new adapter, called `adapter_name`.

    adapters: names of adapters of the model. weights: one number each, negative to subtract; "do"
        uses w_i / sum |w| over the adapters that have a module, the other methods the weights as
        they are (`domerge_fast.merge`). One adapter alone is reweighted: its weight is the factor
        on what the method makes of it.
    combination_type: a name from `domerge_fast.list_methods()`; "auto" says in the
        report what it took.
    svd_rank: truncate every module to this rank, with any method; None: the method's own rank,
        which is exact except for "svd".
    density, majority_sign_method: options of the methods that have them.
    svd_clamp, svd_full_matrices, svd_driver: refused unless they are PEFT's defaults; nothing here
        takes a dense SVD.
    options: the method's own, and `scale`, `energy`, `pre`, `post`, `whole`, `dtype`, `backend`,
        `device`, `max_device_memory` and `progress` of `domerge_fast.merge`. scale: as there, but 1
        by default for the names that are PEFT's too.

    Modules have their own ranks: what the model's save_pretrained writes then has patterns, and
    `merge` of that folder alone makes one rank of them.

    The new adapter is on the devices and in the dtype of those it is made of, frozen, with scaling
    1. Nothing else changes: not the active adapter, nor what is trained. Modules that adapters save
    whole (modules_to_save) are merged as in `domerge_fast.merge`; W0 is the model's own module, but
    for heads that a classifier's base model does not have.

    Returns the merge's report. Raises DomergeError (a ValueError), one line, for an unknown type,
    option or adapter, a name that is taken, and whatever cannot be merged exactly; the model has no
    new adapter then.
    """
    tuner = _tuner(model)
    TABLE.choose("combination_type", combination_type)
    _check_names(tuner, adapters, adapter_name)
    if svd_rank is not None:
        check("svd_rank", svd_rank, int, low=1)
    for name, differs in (
        ("svd_clamp", svd_clamp is not None),
        ("svd_full_matrices", svd_full_matrices is not True),
        ("svd_driver", svd_driver is not None),
    ):
        if differs:
            raise OptionError(name, "is for PEFT's dense SVD, there is none here", "leave it out")
    for name in options.keys() & _ELSEWHERE.keys():
        raise OptionError(name, "is not an option on a live model", _ELSEWHERE[name])
    if density is not None:
        options["density"] = density
    if majority_sign_method != "total":
        options["majority_sign_method"] = majority_sign_method
    if len(adapters) == len(weights) == 1 and weights[0] != 0:
        factor = check("weights", weights[0], float)
        scale = 1.0 if options.get("scale") in (None, "auto") else options["scale"]
        options["scale"] = check("scale", scale, float) * factor
        weights = [1.0]
    elif combination_type in PEFT_TYPES:
        options.setdefault("scale", 1.0)
    sources = _read(tuner, adapters)
    for source in sources:
        check_none(source, "a live model")
    merged = api.merge(sources, combination_type, weights=weights, rank=svd_rank, **options)
    add(tuner, adapter_name, merged, sources)
    return merged.report


def install() -> None:
    """Let `add_weighted_adapter` of PEFT's models take the methods of this package.

    PEFT's own combination types, and calls that name none, go to PEFT as they are; every other
    type comes here. Installing again changes nothing; `uninstall` takes it back.
    """
    original = LoraModel.add_weighted_adapter
    if hasattr(original, "replaced_by_domerge_fast"):
        return
    hints = typing.get_type_hints(original)
    theirs = {None, *PEFT_TYPES, *typing.get_args(hints.get("combination_type"))}

    @functools.wraps(original)
    def either(self: LoraModel, *args: Any, **kwargs: Any) -> Any:
        kind = args[3] if len(args) > 3 else kwargs.get("combination_type")
        add = original if kind in theirs else add_weighted_adapter
        return add(self, *args, **kwargs)

    either.replaced_by_domerge_fast = original  # type: ignore[attr-defined]
    LoraModel.add_weighted_adapter = either  # type: ignore[method-assign]


def uninstall() -> None:
    """Undo `install`; nothing happens where it was not called."""
    current = LoraModel.add_weighted_adapter
    original = getattr(current, "replaced_by_domerge_fast", current)
    LoraModel.add_weighted_adapter = original  # type: ignore[method-assign]


class _AsPeftModel(nn.Module):
    """A LoraModel under the names that its PeftModel gives its parts."""

    def __init__(self, base_model: LoraModel) -> None:
        super().__init__()
        self.base_model = base_model
        self.peft_config = base_model.peft_config


def _tuner(model: Any) -> LoraModel:
    model = unwrapped(model)
    tuner = model.base_model if isinstance(model, PeftModel) else model
    tuner = unwrapped(tuner)
    if not isinstance(tuner, LoraModel):
        problem = f"a {type(tuner).__name__} has no LoRA adapters"
        raise OptionError("model", problem, "give a PeftModel or LoraModel")
    return tuner


def _check_names(tuner: LoraModel, adapters: Sequence[str], adapter_name: str) -> None:
    if isinstance(adapters, str):
        raise OptionError("adapters", "is one name, not a list", f"say [{adapters!r}]")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        problem = f"{adapter_name!r} cannot be the name of a module"
        raise OptionError("adapter_name", problem, "give a word without dots")
    if adapter_name in tuner.peft_config:
        remedy = "give another name, or delete it first (model.delete_adapter)"
        raise OptionError("adapter_name", f"the model has {adapter_name!r} already", remedy)


def _read(tuner: LoraModel, adapters: Sequence[str]) -> list[Adapter]:
    """The adapters.

    What their configs say of the base is said for all by the first that says it: PEFT writes it
    into the config of the adapter that was there first.
    """
    model = _AsPeftModel(tuner)
    found = [from_model(model, name) for name in adapters]
    of_base = {
        field: next(filter(None, (getattr(x.config, field) for x in found)), default)
        for field, default in _OF_BASE.items()
    }
    return [dataclasses.replace(x, config=dataclasses.replace(x.config, **of_base)) for x in found]
