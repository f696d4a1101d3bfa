"""Whether several adapters belong to one base model and can become one adapter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import AdapterError, DomergeError
from ..garbage import uncollected
from .adapter import Adapter, Module
from .lazy import LazyTensor, in_step
from .names import PREFIX


@uncollected()
def check_compatible(adapters: Sequence[Adapter], base_model: str | None = None) -> None:
    """Raise AdapterError unless the adapters fit one base model.

    Same base model and revision where both are stated (``base_model`` states it for all, and the
    adapters' own statements are then not compared), same ``layer_replication``, same kind and shape
    for every shared module, and carried tensors that are bitwise the same in all adapters. Modules
    may be missing. ``fan_in_fan_out`` says how the base stores its weights, not what an update is,
    and PEFT sets it in the first adapter of a model only: it is not compared. Reads carried
    tensors, nothing else.
    """
    if not adapters:
        raise DomergeError("no adapters given; give at least one")
    if base_model is None:
        for field, what in (
            ("base_model_name_or_path", "base model"),
            ("revision", "base model revision"),
        ):
            _check_stated(adapters, field, what)
    _check_replication(adapters)
    _check_modules(adapters)
    first = adapters[0]
    for other in adapters[1:]:
        _check_carried(first, other)


def _check_stated(adapters: Sequence[Adapter], field: str, what: str) -> None:
    stated = [(adapter, value) for adapter in adapters if (value := getattr(adapter.config, field))]
    for adapter, value in stated[1:]:
        first, expected = stated[0]
        if value != expected:
            problem = f"its {what} is {value!r}, that of adapter {first.name!r} is {expected!r}"
            remedy = "merge adapters of one base, or say base_model=... if they are the same"
            raise AdapterError(adapter.name, None, problem, remedy)


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
            if _layer(module) != _layer(expected):
                problem = (
                    f"adapts a {_describe(module)}, adapter {owner.name!r} a {_describe(expected)}"
                )
                remedy = "merge adapters of one base model"
                raise AdapterError(adapter.name, name, problem, remedy)


def _layer(module: Module) -> tuple[object, ...]:
    return module.kind, module.b_shape[0], module.a_shape[1:]


def _describe(module: Module) -> str:
    inputs = "x".join(map(str, module.a_shape[1:]))
    return f"{module.kind} of {module.m} outputs and {inputs} inputs"


def _check_carried(first: Adapter, other: Adapter) -> None:
    for key in sorted(first.carried.keys() ^ other.carried.keys()):
        owner, lacking = (first, other) if key in first.carried else (other, first)
        module = key.removeprefix(PREFIX).rpartition(".")[0]
        if lora := _adapted(lacking, module):
            problem = f"is LoRA here, but adapter {owner.name!r} saves it whole ({key})"
            remedy = "train it the same way in all adapters"
            raise AdapterError(lacking.name, lora, problem, remedy)
        problem = f"does not have {key!r}, which adapter {owner.name!r} saves whole"
        remedy = "save it in all adapters or in none (modules_to_save, save_embedding_layers)"
        raise AdapterError(lacking.name, None, problem, remedy)
    for key in sorted(first.carried):
        if not _same(first.carried[key], other.carried[key]):
            problem = f"{key!r} differs from that of adapter {first.name!r}"
            remedy = (
                "tensors saved whole cannot be merged; train these modules as LoRA or not at all"
            )
            raise AdapterError(other.name, None, problem, remedy)


def _adapted(adapter: Adapter, module: str) -> str | None:
    """The adapter's LoRA module that is ``module`` or one of its parents or children."""
    for name in adapter.modules:
        if name == module or name.startswith(f"{module}.") or module.startswith(f"{name}."):
            return name
    return None


def _same(one: LazyTensor, other: LazyTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(torch.equal(_bits(a), _bits(b)) for a, b in in_step([one, other]))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
