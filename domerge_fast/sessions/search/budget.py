"""How much is tried, and of how many examples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ... import options
from ...errors import OptionError

__all__ = ["Budget"]


@dataclass(frozen=True)
class Budget:
    """What a search may take.

    trials: candidates in all, over all processes that share a storage. fidelity: the examples that
        a candidate is evaluated on: their number, or (few, all): it begins with few, and the best
        of every `eta` go on to `eta` times as many (successive halving, without waiting for each
        other). None: the evaluator decides, and gets None. seconds: no candidate is begun later.
    """

    trials: int = 100
    fidelity: int | tuple[int, int] | None = None
    eta: int = 3
    seconds: float | None = None

    def __post_init__(self) -> None:
        options.check("trials", self.trials, int, low=1)
        options.check("eta", self.eta, int, low=2)
        if self.seconds is not None:
            options.check("seconds", self.seconds, float, low=0.0)
        few, most = self._span
        for number in (few, most):
            if number is not None:
                options.check("fidelity", number, int, low=1)
        if few is not None and most is not None and few > most:
            problem = f"begins with {few} examples and ends with {most}"
            raise OptionError("fidelity", problem, "give (few, all)")

    @property
    def _span(self) -> tuple[int | None, int | None]:
        if isinstance(self.fidelity, tuple):
            if len(self.fidelity) != 2:
                problem = f"{self.fidelity!r} is no pair"
                raise OptionError("fidelity", problem, "give (few, all)")
            return self.fidelity
        return self.fidelity, self.fidelity

    @property
    def rungs(self) -> tuple[int | None, ...]:
        """The numbers of examples, from few to all: `eta` times more at each step, and the last
        step between √eta and eta √eta times more."""
        few, most = self._span
        if few is None or most is None or few == most:
            return (most,)
        steps = max(1, round(math.log(most / few, self.eta)))
        return (*(few * self.eta**k for k in range(steps)), most)
