"""How often a merge reads its adapters' factors: the ops that compute with them, counted."""

from __future__ import annotations

from collections import Counter
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.make import random_factors
from torch import Tensor

import domerge_fast as dm
from domerge_fast import ops
from domerge_fast.algebra.side import Side
from domerge_fast.backends import registry
from domerge_fast.engine import interference
from domerge_fast.formats import from_tensors
from domerge_fast.methods import TABLE

SHAPES = {"x": (40, 56), "y": (72, 40), "z": (40, 40)}
RANK, ADAPTERS = 4, 3
CHECK = "block_largest"
"""What looks at sizes, at the speed of memory: it is no pass of the kernels."""

READING = ("gram", "block_gram", "apply", "apply_decouple", "truncate", "orthogonalize_factors")


class Reads:
    """Entries of the given tensors that ops read, in units of all there are, by op."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._own = {x.data_ptr() for x in tensors}
        self._all = sum(x.numel() for x in tensors)
        self._read: Counter[str] = Counter()

    def wrapped(self, module: ModuleType) -> SimpleNamespace:
        names = (*READING, CHECK)
        counted = {name: self._counted(name, getattr(module, name)) for name in names}
        return SimpleNamespace(**{**vars(module), **counted})

    def _counted(self, name: str, op: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self._read[name] += sum(x.numel() for x in _tensors(arguments) if self._is_ours(x))
            return op(*arguments, **options)

        return run

    def _is_ours(self, x: Tensor) -> bool:
        return x.data_ptr() in self._own

    @property
    def passes(self) -> float:
        return self.by(*READING)

    def by(self, *names: str) -> float:
        return sum(self._read[name] for name in names) / self._all


def _tensors(thing: Any) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, Side):
        return list(thing.blocks)
    return [x for part in thing for x in _tensors(part)] if isinstance(thing, (list, tuple)) else []


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A merge of three adapters by a method, and how it read them."""

    def count(method: str, **options: Any) -> Reads:
        made = [random_factors(SHAPES, RANK, seed=i) for i in range(options.pop("count", ADAPTERS))]
        counter = Reads([x for factors in made for pair in factors.values() for x in pair])
        load = registry.load
        with monkeypatch.context() as patch:
            patch.setattr(registry, "load", lambda name: counter.wrapped(load(name)))
            dm.merge(
                [from_tensors(f, 2.0, name=str(i)) for i, f in enumerate(made)], method, **options
            )
        return counter

    return count


def test_the_counter_sees_every_read(monkeypatch):
    x = torch.randn(RANK, 40)
    counter, load = Reads([x]), registry.load
    monkeypatch.setattr(registry, "load", lambda name: counter.wrapped(load(name)))
    ops.gram([Side((x,), (1.0,))])
    ops.apply([None], [Side((x,), (1.0,))], torch.float32)
    ops.gram([Side((x.clone(),), (1.0,))])
    assert counter.passes == 2


@pytest.mark.parametrize("method", [name for name, row in TABLE.items() if row.coefficients])
def test_a_method_in_r_by_r_takes_its_grams_once_and_applies_once(reads, method):
    found = reads(method, scale=1.0, count=2)
    assert found.by("apply") == 1
    assert found.by("gram") == (2 if TABLE[method].reduce else 1)
    assert found.by("truncate", "apply_decouple", "orthogonalize_factors") == 0


@pytest.mark.parametrize("method", ["svd", "tsvm", "linear", "slerp", "lego"])
@pytest.mark.parametrize("cut", [{"rank": 5}, {"energy": 0.9}], ids=str)
def test_a_cut_reads_nothing_again(reads, method, cut):
    assert reads(method, scale=1.0, count=2, **cut).passes == 2


def test_do_reads_twice(reads):
    assert reads("do", scale=1.0).passes == 2


@pytest.mark.parametrize("method", ["linear", "cat"])
@pytest.mark.parametrize(("report", "op"), [("norms", "block_gram"), ("none", "apply")])
def test_a_sum_reads_once_for_itself_and_once_for_norms(reads, method, report, op):
    found = reads(method, scale=1.0, report=report)
    assert found.by("apply") == 1
    assert found.by(op) == 1
    assert found.by(CHECK) == 1
    assert found.passes == (2 if report == "norms" else 1)


@pytest.mark.parametrize("method", ["linear", "do", "tsvm", "ties"])
def test_more_adapters_than_are_compared_are_not_read_again_for_norms(reads, monkeypatch, method):
    given = reads(method, scale=1.0).passes
    monkeypatch.setattr(interference, "MOST_COMPARED", 2)
    assert reads(method, scale=1.0).passes <= given


@pytest.mark.parametrize("method", ["do", "tsvm", "iso_c", "linear", "svd", "slerp", "lego"])
def test_a_scale_that_is_found_costs_one_read_more_at_most(reads, method):
    given = reads(method, scale=1.0, count=2).passes
    assert reads(method, scale="auto", count=2).passes <= given + 1
