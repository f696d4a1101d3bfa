"""Whether several adapters belong to one base model and can become one adapter."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import AdapterError, DomergeError
from .adapter import Adapter, Module
from .base_model import check_base
from .names import EXPERT
from .stems import split

__all__ = ["check_compatible", "check_names"]


def check_compatible(adapters: Sequence[Adapter], base_model: str | None = None) -> None:
    """Raise AdapterError unless the adapters fit one base model.

    Same base model and revision where both are stated (``base_model`` states it for all, and the
    adapters' own statements are then not compared), same ``layer_replication``, same kind and shape
    for every shared module. Modules may be missing. ``fan_in_fan_out`` says how the base stores
    its weights, not what an update is, and PEFT sets it in the first adapter of a model only: it is
    not compared, nor are the tensors that adapters save whole (whole.py). Reads no tensor.
    """
    if not adapters:
        raise DomergeError("no adapters given; give at least one")
    check_base(adapters, base_model)
    _check_replication(adapters)
    _check_experts(adapters)
    _check_modules(adapters)


def check_names(adapters: Sequence[Adapter]) -> None:
    """Raise AdapterError for adapters whose modules have names of different kinds, as those of
    kohya's files and of PEFT's are; plain tensors have whatever names they were given."""
    styled = [(a, a.style) for a in adapters if a.style]
    for adapter, style in styled[1:]:
        first, expected = styled[0]
        if style.names != expected.names:
            problem = f"has the format {style.format!r}, adapter {first.name!r} "
            problem += f"{expected.format!r}, and their modules have different names"
            raise AdapterError(adapter.name, None, problem, "merge adapters of one format")


def _check_experts(adapters: Sequence[Adapter]) -> None:
    """The experts of a layer are one parameter in all adapters, or modules in all."""
    as_one: dict[str, tuple[Adapter, str]] = {}
    for adapter in adapters:
        for name, module in adapter.pieces.items():
            as_one.setdefault(_layer(name), (adapter, module.parameter))
    if not as_one:
        return
    one_by_one: dict[str, tuple[Adapter, str]] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            if not module.slice and EXPERT.fullmatch(name):
                one_by_one.setdefault(_layer(name), (adapter, name))
    for layer in sorted(one_by_one.keys() & as_one.keys()):
        (adapter, name), (other, parameter) = one_by_one[layer], as_one[layer]
        problem = f"is a module of one expert, adapter {other.name!r} adapts {parameter!r}, which "
        problem += "has all experts"
        remedy = "load it with PEFT and transformers 5, and save it again"
        raise AdapterError(adapter.name, name, problem, remedy)


def _layer(name: str) -> str:
    """A module's name up to the number of its layer."""
    stem, rest = split(name)
    return f"{stem}.{rest.partition('.')[0]}"


def _check_replication(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    expected = first.config.layer_replication or None
    for adapter in adapters[1:]:
        value = adapter.config.layer_replication or None
        if value != expected:
            problem = f"layer_replication is {value}, in adapter {first.name!r} it is {expected}"
            remedy = "merge adapters with one layer_replication (see adapter_config.json)"
            raise AdapterError(adapter.name, None, problem, remedy)


def _check_modules(adapters: Sequence[Adapter]) -> None:
    first = adapters[0]
    if all(x.names == first.names and x.layers == first.layers for x in adapters[1:]):
        return
    seen: dict[str, tuple[Adapter, Module]] = {}
    for adapter in adapters:
        for name, module in adapter.modules.items():
            owner, expected = seen.setdefault(name, (adapter, module))
            if module.layer != expected.layer:
                alike = module.kind == expected.kind == "embedding" and module.m == expected.m
                remedy = "merge adapters of one base model"
                if alike:
                    remedy += " whose vocabulary was resized alike"
                problem = (
                    f"adapts a {_describe(module)}, adapter {owner.name!r} a {_describe(expected)}"
                )
                raise AdapterError(adapter.name, name, problem, remedy)


def _describe(module: Module) -> str:
    inputs = "x".join(map(str, module.a_shape[1:]))
    what = f"{module.kind} of {module.m} outputs and {inputs} inputs"
    return f"{what}, one of {module.slice.count}" if module.slice else what
