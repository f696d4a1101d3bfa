"""Merges that see data: how the coefficients are found on the 64 examples a task that choose λ
elsewhere, and what that takes. A row is a name and a function; learned.py runs and scores them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import Deltas
from torch import Tensor

import domerge_fast as dm

Batches = Mapping[str, Sequence[Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Given:
    """adapters: PEFT folders, of the tasks in the order of `batches`. model: the base. batches: of
    the examples, with "labels". heads: by task, from what the model returns to logits. alone: the
    entropy of each adapter on its own task's batches."""

    adapters: Sequence[Path]
    model: torch.nn.Module
    batches: Batches
    heads: Mapping[str, Callable[[Any], Tensor]]
    alone: Mapping[str, float]


@dataclass(frozen=True)
class Found:
    """deltas: ΔW of every module. batches: how many the model was run on. labels: whether any was
    looked at. coefficients: where there are."""

    deltas: Deltas
    batches: int
    coefficients: Tensor | None = None


@dataclass(frozen=True)
class Row:
    """find: what makes the merge of what is given. data: "", "inputs" or "labels"."""

    name: str
    data: str
    find: Callable[[Given], Found]


def plain(given: Given, method: str, **options: Any) -> Found:
    """What a user gets who gives nothing."""
    merged = dm.merge(given.adapters, method, dtype="float32", form="deltas", **options)
    return Found({name: merged.delta(name) for name in merged.names}, 0)


def projected(given: Given, method: str, **options: Any) -> Found:
    """Merged after each adapter is projected off what the other tasks' inputs excite."""
    layers = sorted(dm.load(given.adapters[0]).modules)
    texts = {task: [x["input_ids"] for x in of] for task, of in given.batches.items()}
    with tempfile.TemporaryDirectory() as place:
        features = Path(place) / "features.safetensors"
        dm.osrm_save_features(given.model, texts, target_modules=layers, output=features)
        found = plain(given, method, pre=["osrm_project"], features=features, **options)
    return Found(found.deltas, sum(map(len, texts.values())))


def tuned(given: Given, method: str, groups: Any = (), **options: Any) -> Found:
    prepared = _prepared(given, method, **options)
    return _found(dm.tune(prepared, given.model, given.batches, heads=given.heads, groups=groups))


def cocktail(given: Given, method: str, **settings: Any) -> Found:
    prepared = _prepared(given, method)
    found = dm.cocktail(prepared, given.model, given.batches, heads=given.heads, **settings)
    return _found(found)


def learned(
    given: Given, method: str, level: str, options: Mapping[str, Any] | None = None, **settings: Any
) -> Found:
    prepared = _prepared(given, method, **options or {})
    settings = {"steps": STEPS, "lr": RATE, **settings}
    if settings.get("balance") == "tchebycheff":
        settings["ideal"] = given.alone
    return _found(
        dm.adamerge(
            prepared, given.model, given.batches, level=level, heads=given.heads, **settings
        )
    )


STEPS, RATE = 40, 0.005


def _prepared(given: Given, method: str, **options: Any) -> dm.Prepared:
    return dm.prepare(given.adapters, method, **{"scale": "auto", **options})


def _found(x: dm.Learned) -> Found:
    merged = x.prepared.merge(x.coefficients, x.level)
    deltas = {}
    for name in x.prepared.modules:
        a, b = merged[name]
        deltas[name] = (b @ a).detach()
    return Found(deltas, x.evaluations, x.coefficients)


ROWS = (
    Row("default", "", partial(plain, method="auto")),
    Row("linear", "", partial(plain, method="linear", scale="auto")),
    Row("tsvm", "", partial(plain, method="tsvm")),
    Row("doge", "", partial(plain, method="doge")),
    Row("linear, cocktail", "labels", partial(cocktail, method="linear")),
    Row("linear, tune", "labels", partial(tuned, method="linear")),
    Row("tsvm, tune", "labels", partial(tuned, method="tsvm")),
    Row("tsvm power 0.25, tune", "labels", partial(tuned, method="tsvm", power=0.25)),
    Row("doge, tune", "labels", partial(tuned, method="doge")),
    *(
        Row(f"tsvm, adamerge by {level}", "inputs", partial(learned, method="tsvm", level=level))
        for level in ("task", "layer", "module")
    ),
    Row(
        "linear, adamerge by module",
        "inputs",
        partial(learned, method="linear", level="module"),
    ),
    Row(
        "linear, TARA (A)",
        "inputs",
        partial(learned, method="linear", level="direction", balance="tchebycheff"),
    ),
    Row(
        "linear, TARA (B)",
        "inputs",
        partial(
            learned,
            method="knots",
            options={"inner": "linear"},
            level="direction",
            balance="tchebycheff",
        ),
    ),
    Row("default, osrm_project", "inputs", partial(projected, method="auto")),
    Row(
        "tsvm, osrm_project off 0.5",
        "inputs",
        partial(projected, method="tsvm", features_energy=0.5),
    ),
    Row(
        "tsvm, gradients by module",
        "labels",
        partial(learned, method="tsvm", level="module", loss="cross_entropy"),
    ),
)
"""Of every training; those that take little come first."""
