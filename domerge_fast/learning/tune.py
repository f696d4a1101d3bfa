"""λ from a few examples: a bracketing line search on a loss, from the merge as it was prepared.

    λ = x λ_0, with the x of least loss: tried at 1, at `ratio` times that and over it until the
    best has a worse one on either side, then where a parabola through these is least

x is on the coefficients where merges are as large as these; on the scale of what is returned, where
only their ratios count, or merges are made anew. Where weights are asked for by groups of modules,
or by adapter, the same for one after the other with the rest as it is, on coefficients. No
gradients: any method, and any objective. The best of what was tried is returned; Ctrl-C ends it
with that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from .. import options
from ..errors import OptionError
from ..sessions.coefficients import Kappa
from ..sessions.prepared import Prepared
from .batches import Batches, Clock, Data, Heads, Runner, by_task
from .learned import Learned, Live, Progress, Step, attached, frozen
from .line_search import least
from .losses import Loss, chosen

__all__ = ["tune"]

ADAPTERS = "adapters"
Objective = Callable[[torch.nn.Module], float]


def tune(
    prepared: Prepared,
    model: torch.nn.Module,
    data: Data | Batches | Objective,
    *,
    evaluations: int = 8,
    ratio: float = 1.5,
    init: Kappa | None = None,
    groups: Sequence[str] | str = (),
    group_evaluations: int = 4,
    loss: Loss = "cross_entropy",
    tokens: str = "auto",
    heads: Heads | None = None,
    batches: int | None = None,
    live: Live | None = None,
    progress: Progress | None = None,
) -> Learned:
    """Find the size of a prepared merge, and of its parts if asked for, on a few examples.

    data: batches, by task if there are several, whose mean loss is made least; or a function of the
        model that returns what is. evaluations: how often that is looked at, 6 to 10.
    ratio: of one x to the next. init: κ_0; None: 1 each.
    groups: patterns of modules' names that get a factor each, or "adapters" for one by adapter;
        each is looked for in `group_evaluations` more.
    batches: of each task, at most. model, loss, tokens, heads, live, progress: as of `adamerge`.

    OptionError for what does not fit, and where a loss is not finite.
    """
    options.check("evaluations", evaluations, int, low=1)
    options.check("group_evaluations", group_evaluations, int, low=1)
    options.check("ratio", ratio, float, low=1.01)
    start = prepared.expand([1.0] * len(prepared.adapters) if init is None else init).detach()
    masks = [*_masks(prepared, groups, start)]
    by_scale = prepared.kind == "tiles" or prepared.recipe.chosen.by_ratio
    if by_scale and live is not None:
        problem = f"{prepared.recipe.method!r} has no size in its coefficients"
        raise OptionError("live", problem, "leave it out: each size is attached anew")
    known = None if callable(data) else by_task(data)
    runner = Runner(model, chosen(loss, tokens), heads)
    clock = Clock(evaluations + group_evaluations * len(masks))

    def look() -> dict[str, float]:
        if known is None:
            assert callable(data)
            with torch.no_grad():
                return {"objective": float(data(model))}
        return runner.mean(known, batches)

    def at_scale(factor: float, kappa: Tensor) -> dict[str, float]:
        with attached(_rescaled(prepared, factor), model, None) as on_it:
            on_it.set(kappa)
            return look()

    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(model))
        value = at_scale
        if not by_scale:
            on_it = stack.enter_context(attached(prepared, model, live))

            def value(factor: float, kappa: Tensor) -> dict[str, float]:
                on_it.set(factor * kappa)
                return look()

        search = _Search(value, clock, progress)
        interrupted = search.all_of(start, masks, ratio, evaluations, group_evaluations)
    factor, kappa = search.best
    return Learned(
        _rescaled(prepared, factor) if by_scale else prepared,
        kappa if by_scale else factor * kappa,
        "module" if kappa.shape[-1] == len(prepared.adapters) else "direction",
        tuple(search.history),
        runner.ran or len(search.history),
        clock.passed,
        interrupted,
        search.losses,
    )


def _rescaled(prepared: Prepared, factor: float) -> Prepared:
    """With λ times a factor. OptionError where λ differs between modules that are merged anew."""
    if prepared.kind == "tiles" and len(set(prepared.scales.values())) > 1:
        problem = "was found for modules by the number of their adapters"
        raise OptionError("scale", problem, "give one to prepare, as 1.0")
    scale = factor * prepared.scale
    return dataclasses.replace(
        prepared,
        recipe=dataclasses.replace(prepared.recipe, scale=scale),
        alike=tuple(dataclasses.replace(x, scale=factor * x.scale) for x in prepared.alike),
        scale=scale,
        scales={count: factor * x for count, x in prepared.scales.items()},
    )


def _masks(prepared: Prepared, groups: Sequence[str] | str, like: Tensor) -> Iterator[Tensor]:
    """What each factor is on: ones among zeros, of the coefficients' shape."""
    if groups == ADAPTERS:
        if like.shape[-1] != len(prepared.adapters):
            raise OptionError("groups", "single directions have no adapters", "name modules")
        yield from (row.expand_as(like) for row in torch.eye(like.shape[-1]).to(like))
        return
    if isinstance(groups, str):
        raise OptionError("groups", f"is {groups!r}", "give a list of patterns, or 'adapters'")
    for pattern in groups:
        chosen_rows = torch.tensor([fnmatchcase(name, pattern) for name in prepared.modules])
        if not chosen_rows.any():
            problem = f"{pattern!r} matches no module"
            raise OptionError("groups", problem, f"there is, for one, {prepared.modules[0]!r}")
        yield chosen_rows[:, None].to(like).expand_as(like)


class _Search:
    """What was tried: factors on a merge, and its coefficients; and the best of it."""

    def __init__(
        self,
        value: Callable[[float, Tensor], dict[str, float]],
        clock: Clock,
        progress: Progress | None,
    ) -> None:
        self._value, self._clock, self._progress = value, clock, progress
        self.history: list[Step] = []
        self.best: tuple[float, Tensor]
        self.losses: dict[str, float] = {}
        self._least = math.inf

    def all_of(
        self, start: Tensor, masks: Sequence[Tensor], ratio: float, most: int, of_each: int
    ) -> bool:
        """Search for a factor on all, then on each mask. Returns whether Ctrl-C ended it."""
        try:
            least(lambda x: self._at(x, start), 1.0, ratio, most)
            for mask in masks:
                self._along(mask, ratio, of_each)
        except KeyboardInterrupt:
            if not self.history:
                raise
            return True
        return False

    def _along(self, mask: Tensor, ratio: float, most: int) -> None:
        factor, kappa = self.best
        known = {1.0: self._least}
        least(lambda x: self._at(factor, kappa * (1 + (x - 1) * mask)), 1.0, ratio, most, known)

    def _at(self, factor: float, kappa: Tensor) -> float:
        losses = self._value(factor, kappa)
        step = Step(len(self.history), losses, None, self._clock.passed)
        if not math.isfinite(step.mean):
            raise OptionError("data", f"is {step.mean}", "return a finite number, less for better")
        self.history.append(step)
        if step.mean < self._least:
            self.best, self._least, self.losses = (factor, kappa), step.mean, losses
        if self._progress:
            self._progress(step, self._clock.left(len(self.history)))
        return step.mean
