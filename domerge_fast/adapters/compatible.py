"""Whether several adapters belong to one base model and can become one adapter."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import AdapterError, DomergeError
from ..storage.garbage import uncollected
from .adapter import Adapter, Module
from .base_model import check_base

__all__ = ["check_compatible"]


@uncollected()
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
    _check_modules(adapters)


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
    return f"{module.kind} of {module.m} outputs and {inputs} inputs"
