"""What the page asks for: merges that are prepared in the background, figures, losses, saving."""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .. import options
from ..api import run
from ..errors import OptionError, OutputError
from ..formats import load
from ..methods import TABLE
from ..reading import Source
from ..recipe import SVC, Input, Recipe, all_options, check_scale, check_weights
from ..sessions.kinds.rotated import Cores
from ..sessions.measures import Measured, Measures
from ..sessions.prepare import prepare
from ..sessions.prepared import Prepared
from ..sessions.preparing import has_parts
from ..storage import side_file, yaml_file
from .trial import Losses, Prompt, Trial
from .worker import Check, Worker

__all__ = ["Asked", "Explorer", "Ready", "offered"]

T = TypeVar("T")
FORMS = ("adapter", "recipe")


@dataclass(frozen=True)
class Asked:
    """A merge as the page asks for it. scale: None for the one that is found."""

    method: str
    weights: tuple[float, ...]
    scale: float | None

    @classmethod
    def of(cls, plain: Any, count: int) -> Asked:
        """Of JSON. OptionError for what is no merge of `count` adapters."""
        if not isinstance(plain, dict):
            raise OptionError("request", "is no JSON object", "reload the page")
        method = options.choose("method", plain.get("method"), offered())
        weights, scale = plain.get("weights"), plain.get("scale")
        if not isinstance(weights, list):
            raise OptionError("weights", "is no list", "reload the page")
        given = None if scale is None else check_scale(scale)
        return cls(method, tuple(check_weights(weights, count)), given)


@dataclass(frozen=True)
class Ready:
    """A merge that was prepared. scale: the λ that was found."""

    prepared: Prepared
    measures: Measures
    scale: float


def offered() -> tuple[str, ...]:
    """Methods with a merge that is prepared once; the others make each anew."""
    kept = (name for name in TABLE if name != "auto" and has_parts(Recipe.make(method=name).chosen))
    return ("auto", *kept)


class Explorer:
    """adapters: names. output: the folder that merges and recipes are saved in.

    Each method is prepared by a thread when it is asked for first, and kept, but for the first,
    "auto"; what is tried on the model is done by another, one thing at a time.
    """

    def __init__(
        self,
        adapters: Sequence[Source],
        output: Path,
        trial: Trial | None = None,
        **prepared: Any,
    ) -> None:
        """prepared: what `prepare` is given besides. Raises as that does for the adapters."""
        self._sources = tuple(adapters)
        self._loaded = tuple(load(x) if isinstance(x, (str, Path)) else x for x in adapters)
        self._given, self.output, self._trial = prepared, output, trial
        self._preparing, self._running = Worker("domerge-prepare"), Worker("domerge-run")
        self._lock = threading.Lock()
        self._done: dict[str, tuple[int, int]] = {}
        self._ready: dict[str, Future[Ready]] = {"auto": Future()}
        self._alone: Future[Losses] | None = None
        self._texts: dict[tuple[Prompt, Any], str] = {}
        first = self._prepared("auto", lambda: None)  # here, where Ctrl-C ends it at once
        self._ready["auto"].set_result(first)
        self.adapters = first.prepared.adapters
        self.interference = first.prepared.interference

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the adapters that are in files."""
        return tuple(str(x) for x in self._sources if isinstance(x, (str, Path)))

    @property
    def has_model(self) -> bool:
        return self._trial is not None

    @property
    def has_texts(self) -> bool:
        return self._trial is not None and bool(self._trial.data)

    def stop(self) -> None:
        """Stop what is being worked on; whoever waits for it gets Superseded."""
        self._preparing.stop()
        self._running.stop()

    def close(self) -> None:
        """Stop, and let go of the threads."""
        self.stop()
        self._preparing.close()
        self._running.close()

    def ready(self, method: str) -> Ready | None:
        """None while it is still being prepared. Raises as `prepare` does."""
        return _if_done(self._of(method))

    def done(self, method: str) -> tuple[int, int]:
        """How many modules of how many were gone through of what is being prepared."""
        return self._done.get(method, (0, 1))

    def figures(self, asked: Asked) -> tuple[Ready, Measured] | None:
        """Of the merge; None while its method is being prepared."""
        ready = self.ready(asked.method)
        if ready is None:
            return None
        return ready, ready.measures.at(asked.weights, asked.scale or ready.scale)

    def alone(self) -> Losses | None:
        """Losses without a merge; None while they are computed."""
        with self._lock:
            if self._alone is None:
                self._alone = self._running.lasting(self._of_each)
            return _if_done(self._alone)

    def loss(self, asked: Asked) -> Mapping[str, float]:
        """By text, with the merge on the model."""
        trial, given = self._model(), self._merge(asked)
        return self._running.newest("loss", asked, lambda x: trial.losses(*given, x)).result()

    def text(self, asked: Asked, prompt: Prompt, of: Any) -> str:
        """What the model writes after a prompt. of: "merge", "base" for the model without adapters,
        or the number of an adapter, alone; these are kept until another prompt is given."""
        trial, key = self._model(), (prompt, of)
        given = self._merge(asked) if of == "merge" else self._lone(self._of_numbers(of))
        self._texts = {k: text for k, text in self._texts.items() if k[0] == prompt}
        if key in self._texts:
            return self._texts[key]
        work = functools.partial(trial.text, *given, prompt)
        found = self._running.newest("text", asked, work).result()
        if of != "merge":
            self._texts[key] = found
        return found

    def save(self, asked: Asked, name: Any, form: Any) -> Path:
        """Write the merge, or its recipe, into the folder. OptionError for a name that is none of a
        file there; OutputError for one that is there already; otherwise raises as `merge` does."""
        options.choose("form", form, FORMS)
        if not isinstance(name, str) or not _is_name(name):
            raise OptionError("name", "is no name of a file", "give one without slashes")
        place = self.output / (f"{name}.yml" if form == "recipe" else name)
        recipe = self.recipe(asked)
        if form == "adapter":
            goes_on = self._preparing.check
            run(recipe, self._loaded, output=place, progress=lambda done, total: goes_on())
            return place
        side_file.check(str(place))
        if os.path.lexists(place):
            raise OutputError(str(place), "is there already", "give another name")
        with side_file.told(str(place)), open(place, "x", encoding="utf-8") as file:
            file.write(yaml_file.text(recipe.plain()))
        return place

    def recipe(self, asked: Asked) -> Recipe:
        """Of the merge, with the method and λ that are taken."""
        ready = self._of(asked.method).result()
        taken = ready.prepared
        calibrated = any(isinstance(x, Cores) and x.calibrated for x in taken.alike)
        recipe = dataclasses.replace(
            taken.recipe,
            method=taken.method.method.name,
            options=all_options(taken.method),
            post=(SVC,) if calibrated else (),
            adapters=tuple(map(Input, self.paths)),
            weights=asked.weights,
            scale=asked.scale or ready.scale,
        )
        return recipe.absolute()

    def _of(self, method: str) -> Future[Ready]:
        with self._lock:
            if method not in self._ready:
                work = functools.partial(self._prepared, method)
                self._ready[method] = self._preparing.lasting(work)
            return self._ready[method]

    def _prepared(self, method: str, check: Check) -> Ready:
        def progress(done: int, total: int) -> None:
            self._done[method] = done, total
            check()

        found = prepare(self._loaded, method, scale="auto", progress=progress, **self._given)
        measures = Measures.of(found, progress=lambda done, total: check())
        return Ready(found, measures, found.scale)

    def _of_each(self, check: Check) -> Losses:
        trial, each = self._model(), ("base", *range(len(self.adapters)))
        found = [trial.losses(*self._lone(self._of_numbers(of)), check) for of in each]
        return Losses(found[0], found[1:])

    def _merge(self, asked: Asked) -> tuple[Prepared, tuple[float, ...]]:
        """What the model gets of a merge, once its method is prepared."""
        ready = self._of(asked.method).result()
        return ready.prepared.at_scale(asked.scale or ready.scale), asked.weights

    def _lone(self, weights: tuple[float, ...]) -> tuple[Prepared, tuple[float, ...]]:
        """An adapter alone is a sum with one weight."""
        return self._of("linear").result().prepared.at_scale(1.0), weights

    def _model(self) -> Trial:
        if self._trial is None:
            raise OptionError("model", "is not given", "say --model")
        return self._trial

    def _of_numbers(self, of: Any) -> tuple[float, ...]:
        """Weights of an adapter alone by its number, or of none for "base"."""
        count = len(self.adapters)
        if of != "base" and not (type(of) is int and 0 <= of < count):
            raise OptionError("of", f"{str(of)[:20]!r} is no adapter", "reload the page")
        return tuple(float(of == k) for k in range(count))


def _is_name(name: str) -> bool:
    """Whether it is that of a file in a folder."""
    return Path(name).name == name and name not in ("", "..") and "\0" not in name


def _if_done(future: Future[T]) -> T | None:
    return future.result() if future.done() else None
