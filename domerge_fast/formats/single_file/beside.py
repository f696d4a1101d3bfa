"""What a file changes beside factors: biases, and the weights and biases of norms.

ComfyUI reads them as `.diff` and `.diff_b` of the module that has them, LyCORIS those of norms as
`.w_norm` and `.b_norm`, which ComfyUI reads too. They are added as they are: alpha is no scale of
theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...adapters.differences import owner_of
from ...errors import AdapterError, DomergeError
from ...storage.lazy import LazyTensor
from ..peft.assemble import check_dtype
from ..target import Target
from .grammar import B_NORM, DIFF, DIFF_B, W_NORM

__all__ = ["differences", "is_beside", "norms", "written"]

_PARAMETERS = {DIFF: "weight", W_NORM: "weight", DIFF_B: "bias", B_NORM: "bias"}

Parts = Mapping[str, tuple[str, LazyTensor]]
"""By part: the key and the tensor."""


def is_beside(part: str, tensor: LazyTensor) -> bool:
    """Whether a part of a module is none of its factors: a vector as `.diff` is that of a norm."""
    return part in (DIFF_B, W_NORM, B_NORM) or (part == DIFF and len(tensor.shape) == 1)


def differences(adapter: str, modules: Mapping[str, Parts]) -> dict[str, LazyTensor]:
    """The changes by the names of their parameters. AdapterError for what is no vector, and for two
    of one parameter."""
    found: dict[str, LazyTensor] = {}
    for module, parts in modules.items():
        for part, (key, tensor) in parts.items():
            name = f"{module}.{_PARAMETERS[part]}"
            check_dtype(adapter, module, repr(key), tensor.dtype)
            if len(tensor.shape) != 1 or 0 in tensor.shape or name in found:
                what = "a second change of it" if name in found else f"shape {list(tensor.shape)}"
                problem = f"has {key!r} for its {_PARAMETERS[part]} ({what}), where one vector is"
                raise AdapterError(adapter, module, f"{problem} expected", "save it again")
            found[name] = tensor
    return found


def norms(modules: Mapping[str, Parts]) -> frozenset[str]:
    """The modules that are spelled as norms."""
    return frozenset(n for n, parts in modules.items() if not {W_NORM, B_NORM}.isdisjoint(parts))


def written(target: Target) -> Iterator[tuple[str, LazyTensor]]:
    """The merged changes by key. DomergeError for one of a weight that has an update as well."""
    spelled = frozenset().union(*(style.norms for style in target.styles))
    for name, tensor in target.changes.tensors(target.dtype).items():
        module, is_bias = owner_of(name), name.endswith(".bias")
        if module in target.layouts and not is_bias:
            problem = (
                f"{name!r} is a vector in one adapter, and has an update of a matrix in another"
            )
            raise DomergeError(f"{problem}; merge adapters of one base model")
        ends = (W_NORM, B_NORM) if module in spelled else (DIFF, DIFF_B)
        yield f"{module}.{ends[is_bias]}", tensor
