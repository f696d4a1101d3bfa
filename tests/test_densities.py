"""Densities as coefficients of prepared merges: what `merge` makes with them as an option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.close import assert_close
from test_live import adapters as live_adapters
from test_live import base, logits, tokens, with_deltas
from test_prepared import MODULES, WEIGHTS, adapters, folders, inputs

import domerge_fast as dm
from domerge_fast import Budget, Space, ops

ANEW: list[tuple[str, dict[str, Any]]] = [
    ("ties", {}),
    ("ties", {"conventions": "paper"}),
    ("ties", {"conventions": "mergekit"}),
    ("ties", {"pre": ["equalize"]}),
    ("ties", {"scale": "auto"}),
    ("magnitude_prune", {}),
    ("magnitude_prune", {"scope": "model"}),
    ("breadcrumbs", {"outliers": 0.05}),
    ("dare", {"seed": 3}),
    ("dare", {"conventions": "mergekit"}),
    ("dare_ties", {}),
    ("della", {"epsilon": 0.1}),
    ("robust", {}),
    ("knots", {"inner": "ties"}),
    ("do", {"directions": "ties"}),
]
ONCE: list[tuple[str, dict[str, Any]]] = [
    ("core", {"inner": "ties"}),
    ("core", {"inner": "dare", "seed": 1}),
    ("core", {"inner": "robust"}),
    ("ctm", {"inner": "magnitude_prune", "rank": 3}),
]
ROWS = torch.tensor([[0.9, -0.4, 0.6], [0.3, 0.0, 1.1]])


def merged(p: dm.Prepared, sources: list[dm.Adapter], **given: Any) -> dm.Merged:
    """By `merge` itself, dense where the method is."""
    chosen = p.recipe.chosen
    form = "deltas" if chosen.dense and not chosen.truncates else "adapter"
    return dm.merge(sources, p.recipe.method, **{"scale": 1.0, **given}, form=form)


@pytest.mark.parametrize(("method", "given"), ANEW + ONCE)
def test_a_density_is_the_option_of_that_name(method, given):
    """In any order of merges, whose thresholds are kept; with an adapter that takes no part."""
    sources, _ = inputs("robust" if "robust" in (method, given.get("inner")) else method)
    p = dm.prepare(sources, method, **given)
    rows = ROWS[:1] if p.kind == "rotated" or method in ("knots", "do") else ROWS
    for density, weights in [(0.5, rows[0]), (0.3, rows[-1]), (0.5, rows[-1]), (0.8, rows[0])]:
        found = p.merge(weights, density=density)
        expected = merged(p, sources, weights=weights.tolist(), density=density, **given)
        for name in p.modules:
            if p.kind == "tiles":
                assert found.delta(name).equal(expected.delta(name)), name
            else:
                assert_close(found.delta(name), expected.delta(name), 1e-6, name=name)
    usual = merged(p, sources, weights=WEIGHTS, **given)
    for name in p.modules:
        assert_close(p.merge(WEIGHTS).delta(name), usual.delta(name), 1e-6, name=name)


@pytest.mark.parametrize(
    ("method", "given"),
    [ANEW[0], ANEW[7], ANEW[8], ANEW[13], ONCE[0]],
)
def test_densities_by_layer_and_module_are_rules(method, given):
    sources = adapters()
    p = dm.prepare(sources, method, **given)
    by_module = torch.linspace(0.2, 0.9, len(MODULES)).tolist()
    for density, row in (([0.25, 0.7], [0.25] * 3 + [0.7] * 3), (by_module, by_module)):
        own = {name: dict(given, density=x) for name, x in zip(p.modules, row)}
        rules = [{"modules": name, "method": method, **x} for name, x in own.items()]
        expected = merged(p, sources, weights=WEIGHTS, rules=rules, **given)
        found = p.merge(WEIGHTS, density=density)
        for name in p.modules:
            assert_close(found.delta(name), expected.delta(name), 1e-6, name=name)
    _, second = p.merge_many([[1.0, 1.0, 1.0], WEIGHTS], density=by_module)
    for name in p.modules:
        assert_close(second.delta(name), found.delta(name), 1e-6, name=name)


def test_what_was_counted_is_not_counted_again(monkeypatch):
    passes = []

    def counts(*given, **settings):
        passes.append(given)
        return found(*given, **settings)

    found = ops.entry_counts
    monkeypatch.setattr(ops, "entry_counts", counts)
    for scope, again in (("tensor", 0), ("model", 0)):
        p = dm.prepare(adapters(), "magnitude_prune", scope=scope)
        seen = []
        for density, weights in ((0.2, WEIGHTS), (0.4, WEIGHTS), (0.2, [1, 1, 1]), (1, WEIGHTS)):
            passes.clear()
            p.merge(weights, density=density)
            seen.append(len(passes))
        assert seen == [2 * len(MODULES), len(MODULES), again, 0]


def test_other_updates_than_those_that_were_read_are_counted_anew():
    """Steps before, and methods outside, make others of them at other weights."""
    for given in ({"pre": ["equalize"]}, {"method": "knots", "inner": "ties"}):
        p = dm.prepare(adapters(), **{"method": "ties", **given})
        p.merge(WEIGHTS, density=0.3)
        assert not p.counted.upper


@pytest.mark.parametrize(
    ("method", "given", "density", "said"),
    [
        ("tsvm", {}, 0.5, "keeps all entries"),
        ("do", {}, 0.5, "keeps all entries"),
        ("core", {"inner": "iso_c"}, 0.5, "keeps all entries"),
        ("ties", {"conventions": "paper"}, [0.1, 0.5], "of the whole model"),
        ("ties", {"conventions": "paper", "density": 1.0}, [0.1, 1.0], "of the whole model"),
        ("knots", {"inner": "ties", "scope": "model"}, [0.1, 0.5], "of the whole model"),
        ("ties", {"scale": "auto"}, [0.1, 0.5], "λ would be found"),
        ("della", {"epsilon": 0.2}, 0.9, "out of"),
        ("ties", {}, 1.2, "too large"),
        ("ties", {}, -0.2, "too small"),
        ("ties", {}, float("nan"), "finite"),
        ("ties", {}, "half", "no number"),
        ("ties", {}, [0.1, 0.2, 0.3], "one for each of 2 layers, or for each of 6 modules"),
        ("ties", {}, [[0.1] * 6], "of many merges"),
    ],
)
def test_densities_without_a_meaning_are_refused(method, given, density, said):
    p = dm.prepare(adapters(), method, **given)
    with pytest.raises(dm.OptionError, match=said):
        p.merge(WEIGHTS, density=density)


@pytest.mark.parametrize(("method", "given"), [("ties", {}), ("core", {"inner": "ties"})])
@pytest.mark.parametrize("density", [0.35, [0.25, 0.7]])
def test_what_is_saved_repeats_from_its_card(tmp_path, method, given, density):
    sources = folders(tmp_path)
    p = dm.prepare(sources, method, **given)
    expected = p.merge(WEIGHTS, density=density)
    p.save(WEIGHTS, tmp_path / "out", density=density, form="deltas")
    again = dm.run(dm.Recipe.read(tmp_path / "out", tmp_path), sources)
    many = p.at_density(density).save_many([WEIGHTS], tmp_path / "many", form="deltas")
    assert [*many] == ["0"]
    for name in p.modules:
        assert_close(again.delta(name), expected.delta(name), 1e-6, name=name)
    for file in ("deltas.safetensors",):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "many/0" / file).read_bytes()


def test_a_density_is_in_the_state(tmp_path):
    p = dm.prepare(adapters(), "core", inner="ties").at_density([0.25, 0.7])
    p.state(tmp_path / "state")
    opened = dm.Prepared.open(tmp_path / "state")
    for name in p.modules:
        assert opened.merge(WEIGHTS).delta(name).equal(p.merge(WEIGHTS).delta(name))
    other = opened.merge(WEIGHTS, density=0.5)
    expected = dm.prepare(adapters(), "core", inner="ties", density=0.5).merge(WEIGHTS)
    for name in p.modules:
        assert_close(other.delta(name), expected.delta(name), 1e-6)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_live_model_takes_densities(in_place):
    model, batch = base(), tokens()
    p = dm.prepare(live_adapters(), "core", inner="ties")
    densities = torch.rand(2, len(p.modules), generator=torch.Generator().manual_seed(0))
    alone = []
    with p.attach(model, in_place=in_place) as live:
        for density in (*densities, 0.5):
            live.set(WEIGHTS, density=density)
            alone.append(logits(model, batch).detach())
            merge = p.merge(WEIGHTS, density=density)
            assert_close(alone[-1], logits(with_deltas(base(), merge), batch), 1e-5)
        if not in_place:
            live.candidates([WEIGHTS, WEIGHTS], density=densities)
            for one, other in zip(logits(model, batch.repeat(2, 1)).split(2), alone):
                assert_close(one, other, 1e-6)
            with pytest.raises(dm.OptionError, match="as many merges"):
                live.candidates([WEIGHTS] * 3, density=densities)
            with pytest.raises(dm.OptionError, match="option 'density'"):
                live.set(WEIGHTS, density=densities)
    live = dm.prepare(live_adapters(), "tsvm").attach(base())
    with live, pytest.raises(dm.OptionError, match="keeps all entries"):
        live.set(WEIGHTS, density=0.5)


def size(merge: Any, examples: int | None) -> float:
    return -float(sum(merge.delta(name).square().sum() for name in merge.names))


SPACE = Space(groups="layer", density=(0.1, 0.6))


@pytest.mark.parametrize(("method", "given"), [("ties", {}), ("core", {"inner": "ties"})])
def test_a_search_finds_densities_by_layer(tmp_path, method, given):
    sources = folders(tmp_path)
    p = dm.prepare(sources, method, density=0.3, **given)
    found = dm.search(p, lambda merge, _: -size(merge, _), SPACE, Budget(4), strategy="random")
    assert found.trials[0].values["layer 1 density"] == 0.3
    assert found.trials[0].score == pytest.approx(-size(p.merge([1, 1, 1]), None))
    assert found.best.number > 0
    shares = [found.best.values[f"layer {k} density"] for k in (0, 1)]
    assert shares[0] != shares[1]
    assert all(0.1 <= x <= 0.6 for x in shares)
    expected = p.merge(found.coefficients, density=shares)
    prepared, kappa = found.merge
    for name in p.modules:
        assert prepared.merge(kappa).delta(name).equal(expected.delta(name))
    found.save(tmp_path / "out", form="deltas")
    again = dm.run(dm.Recipe.read(tmp_path / "out", tmp_path), sources)
    for name in p.modules:
        assert_close(again.delta(name), expected.delta(name), 1e-6)


def test_methods_of_a_mixed_search_have_densities_where_they_have_any(tmp_path):
    sources = folders(tmp_path)
    several = {
        "all": dm.prepare(sources, "tsvm"),
        "few": dm.prepare(sources, "core", inner="ties"),
    }
    found = dm.search(several, size, SPACE, Budget(8), strategy="random", seed=2)
    mixed = [t for t in found.trials if len({t.values[f"layer {k} method"] for k in (0, 1)}) == 2]
    assert mixed
    found.save(tmp_path / "out", trial=mixed[0], form="deltas")
    again = dm.run(dm.Recipe.read(tmp_path / "out", tmp_path), sources)
    candidate = found.layout.candidate(mixed[0].values)
    for k, (name, method) in enumerate(zip(candidate.modules, candidate.methods)):
        density = float(candidate.densities[k]) if method == "few" else None
        one = several[method].merge(candidate.weights, density=density)
        assert_close(again.delta(name), one.delta(name), 1e-6, name=name)


@pytest.mark.parametrize("population", [1, 3])
def test_a_search_on_a_live_model_is_that_in_memory(population):
    sources, batch = live_adapters(), tokens(1)
    several = {
        "few": dm.prepare(sources, "core", inner="ties"),
        "all": dm.prepare(sources, "tsvm"),
    }
    model = base()

    def evaluate(live: Any, examples: int | None, candidates: int = 0) -> Any:
        rows = logits(live, batch.repeat(max(1, candidates), 1)).flatten(1).norm(dim=1)
        return rows.tolist() if candidates else rows.item()

    given = {"strategy": "random", "live": model, "population": population}
    found = dm.search(several, evaluate, SPACE, Budget(3), **given)
    for trial in found.trials:
        prepared, kappa = dm.sessions.search.mixing.combined(
            several, found.layout.candidate(trial.values)
        )
        with prepared.attach(other := base()) as live:
            live.set(kappa)
            score = evaluate(other, None)
        assert trial.score == pytest.approx(score, rel=1e-5)
    assert len({t.score for t in found.trials}) == 3


@pytest.mark.parametrize(
    ("method", "given", "space", "said"),
    [
        ("tsvm", {}, SPACE, "keep all entries"),
        ("ties", {"conventions": "paper"}, SPACE, "of the whole model"),
        ("della", {}, Space(density=(0.2, 1.0)), None),
        ("della", {}, Space(density=(0.2, 0.95)), "out of"),
    ],
)
def test_what_has_no_density_is_not_searched(method, given, space, said):
    p = dm.prepare(adapters(), method, **given)
    if said is None:
        assert dm.search(p, size, space, Budget(1), strategy="random").best
        return
    with pytest.raises(dm.OptionError, match=said):
        dm.search(p, size, space, Budget(1), strategy="random")


def test_bounds_of_densities_are_checked():
    for density in ((0.5, 1.5), (-0.1, 0.5), (0.5, 0.5), 0.5):
        with pytest.raises(dm.OptionError, match="density"):
            Space(density=density)
    with pytest.raises(dm.OptionError, match="leave parts, scale and density out"):
        dm.search(dm.prepare(adapters(), "ties"), size, Space(pick=True, density=(0.1, 0.2)))
