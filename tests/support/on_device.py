"""The ops as the tests call them: inputs go to the device of a backend, results come back.

A backend is named as in the registry, with ":cuda" added where it is tested on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from domerge_fast import ops
from domerge_fast.algebra.side import Side
from domerge_fast.backends import registry


def _places() -> Iterator[Any]:
    for name, status in registry.backends().items():
        if status.available and status.devices != ("cuda",):
            yield name
        if status.available and torch.cuda.is_available() and status.devices != ("cpu",):
            yield pytest.param(f"{name}:cuda", marks=pytest.mark.gpu)


AVAILABLE = list(_places())
FAST = [place for place in AVAILABLE if "reference" not in str(place)]
GPU = [place for place in FAST if not any(name in str(place) for name in ("cpu", "torch"))]
"""Kernels for GPUs, wherever they run."""


def split(place: str) -> tuple[str, str]:
    """The backend's name and its device."""
    name, _, device = place.partition(":")
    return name, device or "cpu"


def move(x: Any, device: str) -> Any:
    """Problems and tensors in lists and tuples, on the device."""
    if isinstance(x, Side):
        return Side(tuple(move(b, device) for b in x.blocks), x.scales)
    if isinstance(x, Tensor):  # in the same memory layout, a slice's too
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
    if isinstance(x, (list, tuple)):
        return type(x)(move(item, device) for item in x)
    return x


def call(op: str, *args: Any, backend: str = "auto", **options: Any) -> Any:
    """ops.<op>, whatever it runs on."""
    name, device = split(backend)
    if device == "cpu":
        return getattr(ops, op)(*args, backend=name, **options)
    moved = {key: move(value, device) for key, value in options.items()}
    return move(getattr(ops, op)(*move(args, device), backend=name, **moved), "cpu")


def __getattr__(op: str) -> Any:
    if op not in ops.__all__:
        raise AttributeError(op)
    return lambda *args, **options: call(op, *args, **options)
