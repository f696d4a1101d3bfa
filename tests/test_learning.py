"""Coefficients that are learned or tried: gradients, what they lead to, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from support.close import assert_close
from torch import Tensor, nn
from torch.func import functional_call

import domerge_fast as dm
from domerge_fast.learning.batches import Runner
from domerge_fast.learning.learned import attached
from domerge_fast.learning.line_search import least
from domerge_fast.learning.losses import chosen

CLASSES, WIDTH = 3, 6
NAMES = ("first", "second")
SHAPES = {"first": (8, WIDTH), "second": (CLASSES, 8)}


class Model(nn.Module):
    """Logits [batch, CLASSES]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().double()


def batches(seed: int, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, WIDTH, generator=generator, dtype=torch.float64) for _ in range(count)]


def adapters(sizes: tuple[float, ...] = (1.0, 1.0), seed: int = 1) -> list[dm.Adapter]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for k, size in enumerate(sizes):
        factors = {
            name: (
                torch.randn(2, n, generator=generator),
                size * torch.randn(m, 2, generator=generator),
            )
            for name, (m, n) in SHAPES.items()
        }
        found.append(dm.from_tensors(factors, name="ab"[k]))
    return found


DATA = {"a": batches(1), "b": batches(2)}
LABELLED = {task: [(x, x[:, :CLASSES].argmax(1)) for x in xs] for task, xs in DATA.items()}


def dense_loss(prepared: dm.Prepared, kappa: Tensor, batch: Tensor) -> Tensor:
    """The entropy with ΔW in the weights."""
    base = model()
    merged = prepared.merge(kappa, dtype="float64")
    weights = {}
    for name in NAMES:
        a, b = merged[name]
        weights[f"{name}.weight"] = base.get_parameter(f"{name}.weight") + b @ a
    logs = functional_call(base, weights, (batch,)).log_softmax(1)
    return -(logs.exp() * logs).sum(1).mean()


# adamerge


@pytest.mark.parametrize("method", ["linear", "tsvm", "iso_c", "do", "knots"])
def test_the_gradient_is_that_of_the_dense_model(method):
    """Of `knots` with every joint direction's coefficient of each adapter."""
    given = {"inner": "linear"} if method == "knots" else {}
    prepared = dm.prepare(adapters(), method, **given)
    start = torch.tensor([[0.7, 0.4], [1.2, 0.3]], dtype=torch.float64)
    level = "direction" if given else "module"
    if given:
        start = torch.linspace(0.2, 1.1, 16, dtype=torch.float64).view(2, 8)
    kappas = [start.clone() for _ in range(2)]
    for kappa in kappas:
        kappa.requires_grad_()
    base = model()
    with prepared.attach(base) as live:
        live.set(kappas[0], level)
        found = Runner(base, chosen("entropy"), None).loss("a", DATA["a"][0])
        (slope,) = torch.autograd.grad(found, kappas[0])
    expected = dense_loss(prepared, kappas[1], DATA["a"][0])
    (dense,) = torch.autograd.grad(expected, kappas[1])
    assert_close(found.detach(), expected.detach(), 1e-5)
    assert_close(slope, dense, 1e-4)


@pytest.mark.parametrize("level", ["task", "layer", "module", "direction", "joint"])
def test_the_entropy_falls_at_every_level_and_the_model_stays(level):
    """ "joint": the directions of a basis that all share, TARA's variant B."""
    base = model()
    base.second.bias.requires_grad_(False)
    before = {name: x.clone() for name, x in base.state_dict().items()}
    asked = {name: p.requires_grad for name, p in base.named_parameters()}
    joint = {"method": "knots", "inner": "linear"} if level == "joint" else {"method": "linear"}
    prepared = dm.prepare(adapters(), **joint)
    named = "direction" if level == "joint" else level
    found = dm.adamerge(prepared, base, DATA, level=named, steps=30, lr=0.05)
    assert (
        found.coefficients.shape
        == {
            "task": (2,),
            "layer": (2, 2),
            "module": (2, 2),
            "direction": (2, 4),
            "joint": (2, 8),
        }[level]
    )
    assert len(found.history) == 30
    assert found.evaluations == 60
    assert found.history[-1].mean < 0.7 * found.history[0].mean
    after = base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert {name: p.requires_grad for name, p in base.named_parameters()} == asked
    merged = prepared.merge(found.coefficients, named)
    assert merged["first"][0].shape[1] == WIDTH


def test_an_adapter_that_alone_helps_gets_more_and_the_other_less():
    """Labels are what the base says with adapter a on; b is noise."""
    base = model()
    prepared = dm.prepare(adapters(), "linear")
    with prepared.attach(base) as live:
        live.set(torch.tensor([1.0, 0.0]))
        with torch.no_grad():
            data = {t: [(x, base(x).argmax(1)) for x in xs] for t, xs in DATA.items()}
    found = dm.adamerge(
        prepared, base, data, loss="cross_entropy", init=0.3, steps=60, lr=0.02
    ).coefficients
    assert found[0] > 0.5
    assert found[1] < 0.2


def test_the_same_seed_finds_the_same_bits_and_another_does_not():
    prepared = dm.prepare(adapters(), "tsvm")
    found = [
        dm.adamerge(prepared, model(), DATA, steps=5, lr=0.1, seed=seed).coefficients
        for seed in (3, 3, 4)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_coefficients_are_clamped_and_pulled_to_where_they_began():
    prepared = dm.prepare(adapters(), "linear")
    settings = {"steps": 20, "lr": 0.2, "init": 0.5}
    free = dm.adamerge(prepared, model(), DATA, **settings).coefficients
    assert float((free - 0.5).abs().max()) > 0.5
    clamped = dm.adamerge(prepared, model(), DATA, clamp=(0.4, 0.6), **settings).coefficients
    assert 0.4 <= float(clamped.min()) < float(clamped.max()) <= 0.6
    pulled = dm.adamerge(prepared, model(), DATA, pull=10.0, **settings).coefficients
    assert float((pulled - 0.5).norm()) < 0.5 * float((free - 0.5).norm())


def test_balances_weigh_the_tasks():
    """As the derivative of the one loss that they stand for, by differences."""
    prepared = dm.prepare(adapters(), "linear")
    one = {task: xs[:1] for task, xs in DATA.items()}
    start = {t: float(dense_loss(prepared, torch.ones(2), xs[0]).detach()) for t, xs in one.items()}
    joined = {
        "sum": lambda x: x["a"] + x["b"],
        "start": lambda x: x["a"] / start["a"] + x["b"] / start["b"],
        "tchebycheff": lambda x: (
            0.1 * torch.stack([(x["a"] - 0.5) / 0.2, x["b"] / 0.2]).logsumexp(0)
        ),
    }
    for balance, join in joined.items():
        kappa = torch.ones(2, dtype=torch.float64, requires_grad=True)
        total = join({t: dense_loss(prepared, kappa, xs[0]) for t, xs in one.items()})
        (slope,) = torch.autograd.grad(total, kappa)
        begun = slope.detach() / 100
        found = dm.adamerge(
            prepared,
            model(),
            one,
            balance=balance,
            smoothness=0.1,
            ideal={"a": 0.5},
            steps=1,
            pull=0.0,
            lr=1.0,
        )
        assert torch.equal((found.coefficients - 1).sign(), -begun.sign()), balance


def test_what_is_held_out_tells_when_to_stop_and_what_to_keep():
    prepared = dm.prepare(adapters(), "linear")
    found = dm.adamerge(
        prepared,
        model(),
        DATA,
        steps=200,
        lr=0.1,
        held_out=LABELLED,
        held_out_loss="cross_entropy",
        patience=2,
    )
    looked = [step for step in found.history if step.held_out is not None]
    assert len(found.history) < 200
    with prepared.attach(base := model()) as live:
        live.set(found.coefficients)
        kept = Runner(base, chosen("cross_entropy"), None).mean(LABELLED)
    assert_close(
        torch.tensor(sum(kept.values()) / 2), torch.tensor(min(s.held_out for s in looked))
    )


def test_ctrl_c_keeps_what_was_found():
    def progress(step, left):
        if step.number == 3:
            raise KeyboardInterrupt

    prepared = dm.prepare(adapters(), "linear")
    found = dm.adamerge(prepared, base := model(), DATA, steps=50, lr=0.1, progress=progress)
    assert found.interrupted
    assert len(found.history) == 4
    whole = dm.adamerge(prepared, model(), DATA, steps=4, lr=0.1)
    assert torch.equal(found.coefficients, whole.coefficients)
    assert not any(name.startswith("base_model") for name, _ in base.named_modules())


def test_heads_make_logits_and_a_loss_may_be_a_function():
    prepared = dm.prepare(adapters(), "linear")
    heads = {"a": lambda logits: 2 * logits}

    def loss(outputs, batch):
        return outputs.square().mean()

    found = dm.adamerge(prepared, model(), {"a": DATA["a"]}, heads=heads, loss=loss, steps=3)
    plain = dm.adamerge(prepared, model(), {"a": DATA["a"]}, loss=loss, steps=3)
    assert found.history[0].losses["a"] == pytest.approx(4 * plain.history[0].losses["a"])


# cocktail


def test_cocktail_is_a_softmax_of_the_losses_of_single_adapters():
    prepared = dm.prepare(adapters(), "linear")
    found = dm.cocktail(prepared, model(), LABELLED, temperature=0.5)
    expected = torch.tensor([-2 * x for x in found.losses.values()], dtype=torch.float64).softmax(0)
    assert_close(found.coefficients, expected, 1e-12)
    assert found.evaluations == 16
    for i, name in enumerate("ab"):
        with prepared.attach(base := model()) as live:
            live.set(torch.eye(2)[i])
            losses = Runner(base, chosen("cross_entropy"), None).mean(LABELLED)
        assert found.losses[name] == pytest.approx(sum(losses.values()) / 2)
    cold = dm.cocktail(prepared, model(), LABELLED, temperature=1e-4, total=3.0, batches=1)
    assert sorted(cold.coefficients.tolist()) == pytest.approx([0.0, 3.0])
    assert cold.evaluations == 4


# tune


@pytest.mark.parametrize("target", [0.02, 0.5, 1.0, 3.3, 40.0])
def test_a_line_search_finds_the_least_in_few_evaluations(target):
    tried: dict[float, float] = {}
    best = least(lambda x: (math.log(x / target)) ** 2 + 1, 1.0, 1.5, 14, tried)
    assert abs(math.log(best / target)) < 0.1
    assert len(tried) <= 14
    assert least(lambda x: abs(math.log(x / target)), 1.0, 1.5, 1) == 1.0


def test_a_line_search_takes_the_best_of_what_it_tried():
    """Of a function with several dents, flat places among them."""
    tried: dict[float, float] = {}
    best = least(lambda x: round(math.sin(9 * x), 1), 1.0, 1.5, 10, tried)
    assert tried[best] == min(tried.values())
    assert least(lambda x: 0.0, 1.0, 1.5, 6) in (1.0, 1.5, 1 / 1.5)


@pytest.mark.parametrize("method", ["linear", "do", "svd", "ties"])
def test_tune_finds_the_size_for_any_method(method):
    """What the merge of twice the size puts out is wanted; that of ties is in the weights."""
    prepared = dm.prepare(adapters((0.3, 0.3)), method)
    base, x = model(), DATA["a"][0]
    fresh = {name: p.clone() for name, p in base.state_dict().items()}
    twice = dm.prepare(adapters((0.3, 0.3)), method, scale=2.0)
    with attached(twice, base, None) as live, torch.no_grad():
        live.set([1.0, 1.0])
        wanted = base(x)
    found = dm.tune(prepared, base, lambda m: float((m(x) - wanted).square().mean()))
    assert len(found.history) <= 8
    scale = found.prepared.scale * found.coefficients
    assert_close(scale, torch.full_like(scale, 2.0), 0.02)
    assert found.prepared.recipe.scale == found.prepared.scale
    assert found.losses["objective"] == min(step.mean for step in found.history)
    assert all(torch.equal(p, fresh[name]) for name, p in base.state_dict().items())


def test_tune_takes_groups_adapters_and_an_objective():
    prepared = dm.prepare(adapters(), "linear")

    base, x = model(), DATA["a"][0]
    with prepared.attach(base) as live, torch.no_grad():
        live.set(torch.tensor([1.5, 0.5]))
        target = base(x)

    def objective(m: nn.Module) -> float:
        return float((m(x) - target).square().mean())

    found = dm.tune(prepared, model(), objective, evaluations=4, groups=["second"])
    assert len(set(found.coefficients[0].tolist())) == 1
    assert not torch.equal(found.coefficients[0], found.coefficients[1])
    of_adapters = dm.tune(prepared, model(), objective, evaluations=4, groups="adapters")
    assert torch.equal(of_adapters.coefficients[0], of_adapters.coefficients[1])
    assert of_adapters.coefficients[0, 0] > of_adapters.coefficients[0, 1]
    least_found = min(step.mean for step in of_adapters.history)
    with prepared.attach(base := model()) as live, torch.no_grad():
        live.set(of_adapters.coefficients)
        assert objective(base) == pytest.approx(least_found)


def test_ctrl_c_ends_tune_with_the_best_so_far():
    def progress(step, left):
        if step.number == 2:
            raise KeyboardInterrupt

    prepared = dm.prepare(adapters(), "linear")
    found = dm.tune(prepared, model(), LABELLED, progress=progress)
    assert found.interrupted
    assert len(found.history) == 3


def test_what_was_found_is_saved(tmp_path):
    prepared = dm.prepare(adapters(), "linear")
    found = dm.tune(prepared, model(), LABELLED, evaluations=2)
    found.save(tmp_path / "out")
    merged = dm.load(tmp_path / "out")
    a, b = found.prepared.merge(found.coefficients)["first"]
    read = merged.factors("first")
    assert_close(read[1].double() @ read[0].double(), b.double() @ a.double(), 1e-6)


# Losses


def test_entropy_and_cross_entropy_of_tokens():
    ids = torch.tensor([[4, 1, 2, 0], [3, 2, 1, 2]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, 2, -100], [-100, 2, 1, 2]])
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    logs = logits.log_softmax(-1)
    entropy = -(logs.exp() * logs).sum(-1)
    batch = {"input_ids": ids, "attention_mask": mask}
    places = {
        "all": [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)],
        "answer": [(0, 1), (1, 0), (1, 1), (1, 2)],
        "last": [(0, 2), (1, 3)],
    }
    for tokens, at in places.items():
        expected = torch.stack([entropy[i, t] for i, t in at]).mean()
        found = chosen("entropy", tokens)(logits, {**batch, "labels": labels})
        assert_close(found, expected, name=tokens)
    for tokens, given in (("all", batch), ("answer", {**batch, "labels": labels})):
        expected = torch.stack([-logs[i, t, ids[i, t + 1]] for i, t in places[tokens]]).mean()
        assert_close(chosen("cross_entropy")(logits, given), expected, name=tokens)


# What is refused


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({}, "no tasks"),
        ({"a": []}, "no batches"),
        ({"a": iter(batches(1))}, "only once"),
        ({"a": torch.ones(2, WIDTH)}, "no batches, but a Tensor"),
        ({"a": [3]}, "a batch is a int"),
        ({"a": [torch.full((2, WIDTH), math.nan, dtype=torch.float64)]}, "is nan on 'a'"),
    ],
)
def test_data_that_does_not_fit_is_refused(data, told):
    prepared = dm.prepare(adapters(), "linear")
    with pytest.raises(dm.OptionError, match=told):
        dm.adamerge(prepared, model().double(), data, steps=1)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"level": "block"}, "level"),
        ({"balance": "fair"}, "balance"),
        ({"loss": "hinge"}, "loss"),
        ({"steps": 0}, "steps"),
        ({"init": [1.0, 2.0, 3.0]}, "init"),
        ({"clamp": (1.0, 0.0)}, "clamp"),
        ({"loss": "cross_entropy"}, "labels"),
        ({"loss": lambda outputs, batch: outputs}, "not one number"),
        ({"heads": {"a": lambda x: x[0]}}, "logits"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, told):
    prepared = dm.prepare(adapters(), "linear")
    with pytest.raises(dm.OptionError, match=told):
        dm.adamerge(prepared, model(), DATA, **{"steps": 1, **given})


def test_what_has_no_gradient_is_refused():
    for method, options in (("lego", {}), ("core", {"inner": "ties"}), ("ties", {})):
        prepared = dm.prepare(adapters(), method, **options)
        with pytest.raises(dm.OptionError, match=r"smooth|gradient"):
            dm.adamerge(prepared, model(), DATA, steps=1)
    with pytest.raises(dm.OptionError, match="matches no module"):
        dm.tune(prepared, model(), LABELLED, groups=["x*"])
    with pytest.raises(dm.OptionError, match="finite"):
        dm.tune(prepared, model(), lambda m: math.nan)
