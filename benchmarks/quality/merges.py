"""The merges that are compared: methods with their options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench import Deltas

import domerge_fast as dm


@dataclass(frozen=True)
class Candidate:
    """A method with its options. mean: the weights are divided by their number. cut: to the
    largest rank of an adapter."""

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    mean: bool = False
    cut: bool = False

    def deltas(self, adapters: Sequence[Path]) -> Deltas:
        """ΔW of every module in float32, at λ = 1."""
        merged = self._merged(adapters, scale=1.0)
        return {name: merged.delta(name) for name in merged.names}

    def default(self, adapters: Sequence[Path]) -> tuple[float, Deltas, str]:
        """λ where a user gives none, ΔW with it, and what the report says besides."""
        merged = self._merged(adapters)
        deltas = {name: merged.delta(name) for name in merged.names}
        return merged.report.scale, deltas, " ".join(merged.report.notes)

    def _merged(self, adapters: Sequence[Path], **scale: float) -> dm.Merged:
        weights = [1 / len(adapters)] * len(adapters) if self.mean else None
        rank = {"rank": max(map(_rank, adapters))} if self.cut else {}
        settings = {"weights": weights, "dtype": "float32", "form": "deltas"}
        return dm.merge(adapters, self.method, **settings, **scale, **rank, **self.options)


def _rank(adapter: Path) -> int:
    loaded = dm.load(adapter)
    return max(len(loaded.factors(name)[0]) for name in loaded.modules)


DEFAULT = Candidate("default", "auto")
"""What a user gets who gives nothing but adapters."""
MEAN = Candidate("mean", "linear", mean=True)
DO = Candidate("do", "do")

SVC = {"post": ["svc"]}

CORE = (
    MEAN,
    DO,
    Candidate("do, decouple only", "do", {"orthogonalize": False}),
    Candidate("do, orthogonalize only", "do", {"decouple": False}),
    Candidate("tsvm", "tsvm"),
    Candidate("tsvm, power 0.25", "tsvm", {"power": 0.25}),
    Candidate("tsvm, power 0.5", "tsvm", {"power": 0.5}),
    Candidate("tsvm, power 0.25, svc", "tsvm", {"power": 0.25, **SVC}),
    Candidate("tsvm, power 0.5, svc", "tsvm", {"power": 0.5, **SVC}),
    Candidate("iso_c, equalized", "iso_c", {"pre": ["equalize"]}),
    Candidate("ties", "ties"),
)
"""Scored on every training."""

MORE = (
    Candidate("iso_c", "iso_c"),
    Candidate("do, svc", "do", SVC),
    Candidate("do, directions of power 0.5", "do", {"directions": "linear", "power": 0.5}),
    Candidate("linear, svc", "linear", SVC),
    Candidate("iso_c, svc", "iso_c", SVC),
    Candidate("pico", "pico"),
    Candidate("wudi", "wudi"),
    Candidate("iso_cts", "iso_cts"),
    Candidate("subspace_boost", "subspace_boost"),
    Candidate("mean, power 0.5", "linear", {"power": 0.5}, mean=True),
    Candidate("tsvm, power 0", "tsvm", {"power": 0.0}),
    Candidate("tsvm, power 0, svc", "tsvm", {"power": 0.0, **SVC}),
    Candidate("dare_ties", "dare_ties", {"seed": 1}),
    Candidate("knots", "knots"),
)
"""Scored besides on the first training of some sets."""

CUT = (
    *(
        replace(c, name=f"{c.name}, cut", cut=True)
        for c in (*CORE, Candidate("linear", "linear"), Candidate("linear, svc", "linear", SVC))
        if c.name in ("do", "tsvm", "linear", "linear, svc") or "svc" in c.options.get("post", ())
    ),
    Candidate("ctm, ties", "ctm", cut=True),
    Candidate("ctm, linear", "ctm", {"inner": "linear"}, cut=True),
)
"""At the rank of one adapter."""
