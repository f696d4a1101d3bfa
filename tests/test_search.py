"""Searched merges: what is tried, what is kept, and what is never returned."""

from __future__ import annotations

import itertools
import os
import signal
import time

import optuna
import pytest
import torch
from support.make import random_factors, write_adapter
from support.processes import forked

import domerge_fast as dm
from domerge_fast import Budget, Space, prepare, search
from domerge_fast.sessions.search.limits import Rate
from domerge_fast.sessions.search.mixing import combined

SHAPES = {f"layers.{k}.{part}": (12, 16) for k in range(3) for part in ("attn.q", "mlp.up")}
WANTED = torch.tensor([0.4, 1.2, 0.1])
"""The coefficients that are best."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [
        write_adapter(folder / name, random_factors(SHAPES, 2, seed=k))
        for k, name in enumerate("abc")
    ]


@pytest.fixture(scope="module")
def prepared(adapters):
    return prepare(adapters, "linear")


class Near:
    """How near a merge is to one with given coefficients, as seen on some of 90 examples: each
    has noise of its own."""

    def __init__(self, prepared, wanted=WANTED, noise=0.0, safe=None):
        self.wanted = prepared.merge(wanted)
        self.noise = noise * torch.randn(90, generator=torch.Generator().manual_seed(0))
        self.safe, self.seen = safe, []

    def __call__(self, merged, budget):
        self.seen.append(budget)
        apart = sum((merged.delta(n) - self.wanted.delta(n)).square().sum() for n in merged.names)
        size = sum(self.wanted.delta(n).square().sum() for n in merged.names)
        score = -float(apart / size) + float(self.noise[:budget].mean())
        if self.safe is None:
            return score
        return {"score": score, "constraints": {"safety": self.safe(merged, budget or 90)}}


def values(found):
    return [(t.number, t.values, t.examples, t.score) for t in found.trials]


def test_it_finds_what_is_best(prepared):
    near = Near(prepared)
    found = search(prepared, near, budget=Budget(60), seed=1)
    assert found.best.score > near(prepared.merge([1.0, 1.0, 1.0]), None) + 0.1
    assert found.best.score == max(t.score for t in found.trials)
    assert found.trials[0].values == {f"all weight of {p}": 1.0 for p in prepared.adapters}
    assert len(found.trials) == 60
    assert found.coefficients.shape == (6, 3)


@pytest.mark.parametrize("strategy", ["tpe", "cma", "random", "gp"])
def test_the_same_seed_gives_the_same_trials(prepared, strategy):
    first, again, other = (
        search(prepared, Near(prepared), budget=Budget(12), strategy=strategy, seed=seed)
        for seed in (3, 3, 4)
    )
    assert values(first) == values(again)
    assert values(first) != values(other)
    assert len({str(t.values) for t in first.trials}) == 12


def test_a_search_that_is_taken_up_again_goes_on_as_it_would_have(prepared, tmp_path):
    whole = search(prepared, Near(prepared), budget=Budget(24), seed=5)
    storage = tmp_path / "study.log"
    for trials in (7, 15, 24):
        found = search(prepared, Near(prepared), budget=Budget(trials), seed=5, storage=storage)
    assert values(found) == values(whole)
    near = Near(prepared)
    search(prepared, near, budget=Budget(24), seed=5, storage=storage)
    assert near.seen == []


def test_few_examples_are_enough_for_what_is_poor(prepared):
    near = Near(prepared, noise=0.2)
    found = search(prepared, near, budget=Budget(40, fidelity=(10, 90)), seed=2)
    assert set(near.seen) == {10, 30, 90}
    assert [t.examples for t in found.trials if t.complete] == [90] * near.seen.count(90)
    assert sum(near.seen) < 0.7 * 40 * 90
    assert found.best.complete
    rungs = {e: sorted(t.score for t in found.trials if t.examples == e) for e in (10, 90)}
    assert rungs[10][-1] < rungs[90][-1]


@pytest.mark.parametrize(
    "strategy", ["tpe", "cma", "random", pytest.param("gp", marks=pytest.mark.slow)]
)
def test_what_is_returned_is_within_the_constraints(prepared, strategy, tmp_path):
    """What scores best has more of "b" than is safe."""

    def safe(merged, budget):
        share = float(merged["layers.0.attn.q"][1][:, 2:4].norm() / full)
        return Rate(int(budget * (1.0 if share < 0.6 else 0.7)), budget)

    full = float(prepared.merge([1.0, 1.0, 1.0])["layers.0.attn.q"][1][:, 2:4].norm())
    near = Near(prepared, safe=safe)
    found = search(
        *(prepared, near),
        budget=Budget(40, fidelity=(30, 90)),
        strategy=strategy,
        constraints={"safety": 0.9},
        seed=1,
    )
    assert found.best.feasible
    assert float(found.coefficients[0, 1]) < 0.6
    (verdict,) = found.verdicts
    assert verdict.holds
    assert verdict.low >= 0.9
    unsafe = [t for t in found.trials if t.complete and not t.feasible]
    assert unsafe
    assert max(t.score for t in unsafe) > found.best.score or strategy != "random"
    with pytest.raises(dm.OptionError, match="not shown to be within"):
        found.save(tmp_path / "out", unsafe[0])
    assert not (tmp_path / "out").exists()


def test_a_pass_at_few_examples_is_no_pass(prepared):
    """All of 20 pass, of 90 not: nothing may be returned, and how far it is off is said."""

    def safe(merged, budget):
        return Rate(budget if budget < 90 else 80, budget)

    near = Near(prepared, safe=safe)
    with pytest.raises(dm.Infeasible, match=r"safety 0.8889 of 90 .* fails by") as error:
        search(
            *(prepared, near),
            budget=Budget(12, fidelity=(20, 90)),
            constraints={"safety": 0.9},
        )
    assert len(error.value.trials) == 12


def test_too_few_examples_to_show_a_threshold_are_named(prepared):
    near = Near(prepared, safe=lambda merged, budget: Rate(budget, budget))
    with pytest.raises(dm.Infeasible, match=r"give 381 examples or more"):
        search(prepared, near, budget=Budget(3), constraints={"safety": 0.99})


def test_several_objectives_have_a_front(prepared):
    one, other = (Near(prepared, w) for w in (torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])))

    def both(merged, budget):
        return {"tasks": {"x": one(merged, budget), "y": other(merged, budget)}}

    found = search(prepared, both, budget=Budget(60), objectives=["x", "y"], seed=1)
    front = sorted((t.tasks["x"], t.tasks["y"]) for t in found.pareto)
    assert len(front) > 3
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(front))
    assert found.best.score == max(t.score for t in found.trials)


def test_groups_have_coefficients_and_methods_of_their_own(adapters, prepared):
    far = prepare(adapters, "tsvm")
    rows = torch.zeros(6, 3, dtype=torch.float64)
    rows[:2], rows[2:] = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.0, 0.5, 1.5])
    near = Near(prepared, rows)
    space = Space(groups="layer", parts={"*attn*": "attention", "*": "rest"}, scale=(0.5, 1.5))
    several = {"plain": prepared, "far": far}
    found = search(several, near, space, Budget(30), initial=["default", "alone"], seed=1)
    names = found.layout.choices
    assert len(names) == 3 + 3 * 2 * (3 + 1)
    assert {c.name for c in names} >= {"layer 0 method", "layer 2/rest scale"}
    assert found.trials[2].values["layer 1/attention weight of " + prepared.adapters[1]] == 1.0
    assert found.trials[2].values["layer 1/attention weight of " + prepared.adapters[0]] == 0.0
    candidate = found.candidate
    assert set(candidate.methods) <= {"plain", "far"}
    assert len({tuple(r) for r in candidate.weights.tolist()}) == 6


def test_a_mixed_merge_is_each_module_s_own(adapters, prepared, tmp_path):
    """Every module as its own method makes it, also once it is written."""
    several = {"linear": prepared, "do": prepare(adapters, "do"), "iso": prepare(adapters, "iso_c")}
    space = Space(groups="module", scale=(0.5, 2.0))
    found = search(several, Near(prepared), space, Budget(8), strategy="random", seed=8)
    candidates = [(t, found.layout.candidate(t.values)) for t in found.trials]
    trial, candidate = next((t, c) for t, c in candidates if len(set(c.methods)) == 3)
    found.save(tmp_path / "out", trial)
    written = dm.load(tmp_path / "out")
    for k, (name, method) in enumerate(zip(candidate.modules, candidate.methods)):
        own = several[method].merge(candidate.weights).delta(name)
        a, b = written.factors(name)
        assert torch.allclose(b @ a, candidate.scales[k].float() * own, atol=1e-5)


def test_what_is_made_for_the_whole_model_is_not_mixed(adapters, prepared):
    svc = dm.prepare(adapters, "tsvm", post=["svc"])
    for other in (dm.prepare(adapters, "ties"), dm.prepare(adapters, "auto"), svc):
        several = {"linear": prepared, "other": other}
        with pytest.raises(dm.OptionError, match=r"be a part of one|for the whole model"):
            search(several, Near(prepared), Space(groups="layer"), Budget(2))
        found = search(several, Near(prepared), Space(scale=(0.5, 2.0)) if other.alike else None,
                       Budget(6), strategy="random", seed=1)  # fmt: skip
        assert {t.values["all method"] for t in found.trials} == {"linear", "other"}


def test_the_scale_of_a_calibrated_merge_counts(adapters, prepared):
    """Twice its coefficients are the same merge."""
    auto = dm.prepare(adapters, "tsvm", post=["svc"])
    found = search(auto, Near(prepared), Space(scale=(0.5, 2.0)), Budget(3), seed=1)
    candidate = found.layout.candidate(found.trials[-1].values)
    made, kappa = combined({"merged": auto}, candidate)
    name = auto.modules[0]
    wanted = candidate.scales[0].float() * auto.merge(candidate.weights).delta(name)
    assert torch.allclose(made.merge(kappa).delta(name), wanted, atol=1e-6)


def test_the_card_says_what_was_found(prepared, tmp_path):
    near = Near(prepared, safe=lambda merged, budget: Rate(89, 90))
    near.digest = "ab" * 32
    found = search(prepared, near, budget=Budget(4), constraints={"safety": 0.9})
    found.save(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("trial", "at least 0.9: holds", near.digest, "measure once more on others"):
        assert said in card
    prepared.save(found.coefficients, tmp_path / "plain")
    out, plain = (dm.load(tmp_path / x) for x in ("out", "plain"))
    for name in prepared.modules:
        assert all(map(torch.equal, out.factors(name), plain.factors(name)))


def test_a_study_is_drawn(prepared, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.rcParams["axes.grid"], matplotlib.rcParams["axes.facecolor"]
    near = Near(prepared, noise=0.1)
    halved = search(prepared, near, budget=Budget(8, fidelity=(10, 90)))
    both = search(
        *(prepared, lambda merged, budget: {"tasks": {"x": near(merged, 9), "y": 1.0}}),
        budget=Budget(6),
        objectives=["x", "y"],
    )
    names = [[p.name for p in x.pictures(tmp_path / "figures")] for x in (halved, both)]
    assert names == [["history.png", "examples.png"], ["history.png", "front.png"]]
    assert sorted(os.listdir(tmp_path / "figures")) == sorted({*names[0], *names[1]})
    after = matplotlib.rcParams["axes.grid"], matplotlib.rcParams["axes.facecolor"]
    assert after == before


def test_another_search_s_study_is_refused(prepared, tmp_path):
    storage = tmp_path / "study.log"
    search(prepared, Near(prepared), budget=Budget(3), storage=storage)
    with pytest.raises(dm.OptionError, match="other choices"):
        search(prepared, Near(prepared), Space(weight=(0, 3)), Budget(4), storage=storage)
    with pytest.raises(dm.OptionError, match="other fidelity"):
        search(prepared, Near(prepared), budget=Budget(4, fidelity=50), storage=storage)
    for k, text in enumerate(("some text", "some text\n", '{"a": 1}\n', "[1]\n", "\n")):
        (tmp_path / f"{k}").write_text(text)
        with pytest.raises(dm.OptionError, match="no journal"):
            search(prepared, Near(prepared), budget=Budget(4), storage=tmp_path / f"{k}")
        assert (tmp_path / f"{k}").read_text() == text


def test_a_half_written_line_does_no_harm(prepared, tmp_path):
    storage = tmp_path / "study.log"
    first = search(prepared, Near(prepared), budget=Budget(5), seed=1, storage=storage)
    with open(storage, "a") as file:
        file.write('{"op_code": 4, "worker_id": "x", "st')
    found = search(prepared, Near(prepared), budget=Budget(9), seed=1, storage=storage)
    assert values(found)[:5] == values(first)
    assert len(found.trials) == 9


def test_an_answer_that_is_not_finite_is_a_failed_trial(prepared):
    near = Near(prepared)
    count = iter(range(20))
    found = search(
        prepared,
        lambda merged, budget: float("nan") if next(count) % 3 == 0 else near(merged, budget),
        budget=Budget(9),
    )
    assert [bool(t.failed) for t in found.trials] == [True, False, False] * 3
    assert len(found.trials) == 9
    with pytest.raises(dm.Infeasible, match="not finite"):
        search(prepared, lambda merged, budget: float("inf"), budget=Budget(3))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("good", "as the score"),
        ({}, "has no score"),
        ({"scores": 1}, "has scores"),
        (None, "score"),
    ],
)
def test_an_answer_that_is_none_is_refused(prepared, answer, said):
    with pytest.raises(dm.OptionError, match=said):
        search(prepared, lambda merged, budget: answer, budget=Budget(2))


def test_a_constraint_that_is_not_measured_is_refused(prepared):
    near = Near(prepared)
    with pytest.raises(dm.OptionError, match="no constraint 'safety'"):
        search(prepared, near, budget=Budget(2), constraints={"safety": 0.5})
    with pytest.raises(dm.OptionError, match="nothing of how sure"):
        search(
            *(prepared, lambda merged, budget: {"score": 1, "constraints": {"safety": 0.7}}),
            budget=Budget(2),
            constraints={"safety": 0.5},
        )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"strategy": "tpee"}, "did you mean 'tpe'"),
        ({"strategy": "ppo"}, "pick=True"),
        ({"strategy": "cma", "space": Space(pick=True)}, "choice of names"),
        ({"objectives": ["x"]}, "not several"),
        ({"population": 2}, "live model"),
        ({"initial": ["best"]}, "not known"),
        ({"constraints": "safety"}, "is a text"),
        ({"space": Space(groups={"*.nothing": "x"})}, "finds no module"),
        ({"space": Space(method=["tiess"])}, "not known"),
    ],
)
def test_what_cannot_be_searched_is_refused(prepared, given, said):
    with pytest.raises(dm.OptionError, match=said):
        search(prepared, Near(prepared), budget=Budget(2), **given)


@pytest.mark.parametrize(
    "made",
    [
        lambda: Space(groups="layers:0"),
        lambda: Space(groups="all"),
        lambda: Space(weight=(1, 1)),
        lambda: Space(scale=3),
        lambda: Budget(0),
        lambda: Budget(fidelity=(9, 3)),
        lambda: Budget(fidelity=(1, 2, 3)),
        lambda: Budget(eta=1),
    ],
)
def test_spaces_and_budgets_are_checked(made):
    with pytest.raises(dm.OptionError):
        made()


def test_ctrl_c_keeps_what_was_found(prepared, tmp_path):
    near, storage = Near(prepared), tmp_path / "study.log"

    def stopped(merged, budget):
        if len(near.seen) == 6:
            raise KeyboardInterrupt
        return near(merged, budget)

    found = search(prepared, stopped, budget=Budget(10), seed=1, storage=storage)
    assert found.interrupted
    assert len(found.trials) == 6
    whole = search(prepared, Near(prepared), budget=Budget(10), seed=1, storage=storage)
    assert not whole.interrupted
    assert len(whole.trials) == 10


def test_an_evaluator_s_error_keeps_the_study(prepared, tmp_path):
    near, storage = Near(prepared), tmp_path / "study.log"

    def broken(merged, budget):
        if len(near.seen) == 4:
            raise RuntimeError("out of memory")
        return near(merged, budget)

    with pytest.raises(RuntimeError, match="out of memory"):
        search(prepared, broken, budget=Budget(8), seed=1, storage=storage)
    found = search(prepared, Near(prepared), budget=Budget(8), seed=1, storage=storage)
    assert len(found.trials) == 8
    assert sorted(os.listdir(f"{storage}.workers")) == ["journal", "lock"]


def test_nothing_global_is_changed(prepared):
    before = optuna.logging.get_verbosity(), torch.get_rng_state()
    search(prepared, Near(prepared), budget=Budget(12))
    assert optuna.logging.get_verbosity() == before[0]
    assert bool((torch.get_rng_state() == before[1]).all())


def test_time_ends_a_search(prepared):
    near = Near(prepared)

    def slow(merged, budget):
        time.sleep(0.05)
        return near(merged, budget)

    found = search(prepared, slow, budget=Budget(500, seconds=0.2))
    assert 1 <= len(found.trials) <= 5


def worker(adapters, storage, trials, hang, pipe):
    """A search in a process of its own; at trial `hang` it says so and waits to be killed."""
    prepared = prepare(adapters, "linear")
    near = Near(prepared)

    def evaluate(merged, budget):
        if len(near.seen) == hang:
            pipe.send("waiting")
            time.sleep(60)
        return near(merged, budget)

    pipe.send(len(search(prepared, evaluate, budget=Budget(trials), storage=storage).trials))


def test_a_killed_worker_s_trial_is_not_lost(adapters, prepared, tmp_path):
    storage = tmp_path / "study.log"
    process, pipe = forked(worker, adapters, storage, 12, 5)
    assert pipe.poll(60)
    assert pipe.recv() == "waiting"
    # Another one meanwhile: of 12 trials, one is begun elsewhere.
    found = search(prepared, Near(prepared), budget=Budget(11), seed=0, storage=storage)
    assert len(found.trials) == 10
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    found = search(prepared, Near(prepared), budget=Budget(12), seed=0, storage=storage)
    assert len(found.trials) == 12
    assert all(t.complete for t in found.trials)
    study = found.study.get_trials(deepcopy=False)
    lost = [t for t in study if t.state == optuna.trial.TrialState.FAIL]
    assert len(lost) == 1
    assert any(t.values == lost[0].params for t in found.trials)


def test_several_processes_make_the_trials_that_were_asked_for(adapters, prepared, tmp_path):
    storage = tmp_path / "study.log"
    others = [forked(worker, adapters, storage, 20, -1) for _ in range(2)]
    for process, pipe in others:
        assert pipe.poll(120)
        pipe.recv()
        process.join()
    found = search(prepared, Near(prepared), budget=Budget(20), storage=storage)
    assert [t.number for t in found.trials] == list(range(20))


def test_the_adapter_that_spoils_a_merge_is_named(prepared):
    """By constraints first, then by the score."""
    full = prepared.merge([1.0, 1.0, 1.0])["layers.0.attn.q"][1][:, 2:4].norm()

    def safe(merged, budget):
        share = float(merged["layers.0.attn.q"][1][:, 2:4].norm() / full)
        return Rate(95 if share < 0.5 else 60, 100)

    near = Near(prepared, torch.tensor([1.0, 1.0, 0.0]), safe=safe)
    found = dm.leave_one_out(prepared, near, constraints={"safety": 0.8})
    a, b, c = prepared.adapters
    assert found.worst == b
    assert found.missing > 0
    assert found.without[b][1] == 0
    assert found.without[a][1] == found.missing
    assert f"without {b}: score -" in str(found)
    by_score = dm.leave_one_out(prepared, Near(prepared, torch.tensor([1.0, 1.0, 0.0])))
    assert by_score.worst == c
    assert dm.leave_one_out(prepared, Near(prepared, torch.ones(3))).worst is None
    with pytest.raises(dm.OptionError, match="by direction"):
        dm.leave_one_out(prepared, near, torch.ones(6, 2))
