"""Candidates on a live model: one by one, many in one forward pass, of several methods."""

from __future__ import annotations

import pytest
import torch
from support.close import distance
from support.trained import trained
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import domerge_fast as dm
from domerge_fast import Budget, Space, evaluators
from domerge_fast.evaluators import AtMost, CrossEntropy


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    modules = ["q_proj", "down_proj"]
    return [
        trained(model, seed, folder / f"{seed}", target_modules=modules, task_type="CAUSAL_LM")
        for seed in (1, 2)
    ]


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 40, (n,), generator=generator).tolist() for n in (5, 9, 7, 6, 4, 8)]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in rows]


def dense_loss(model, texts):
    """Of one text at a time, without padding."""
    losses = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([text["input_ids"]])
            logits = model(input_ids=ids).logits[0, 1:-1]
            losses.append(nn.functional.cross_entropy(logits, ids[0, 2:]).item())
    return sum(losses) / len(losses)


def outputs(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 30)[None]).logits


def state(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def with_update(model, deltas):
    """The model's outputs with dense updates in its weights."""
    weights = {name: model.get_submodule(name).weight for name in deltas}
    with torch.no_grad():
        for name, delta in deltas.items():
            weights[name] += delta
        found = outputs(model)
        for name, delta in deltas.items():
            weights[name] -= delta
    return found


def test_cross_entropy_is_that_of_one_text_at_a_time(model, texts):
    evaluator = CrossEntropy(texts, batch=4, shuffle=None)
    assert evaluator(model)["score"] == pytest.approx(-dense_loss(model, texts), rel=1e-5)
    assert evaluator(model, 3)["score"] == pytest.approx(-dense_loss(model, texts[:3]), rel=1e-5)
    some = evaluator(model, range(2, 5))["score"]
    assert some == pytest.approx(-dense_loss(model, texts[2:5]), rel=1e-5)
    with pytest.raises(dm.OptionError, match="has 6"):
        evaluator(model, 7)


def test_tasks_have_weights_and_constraints_intervals(model, texts):
    data = {"a": texts[:3], "b": texts[3:], "safe": texts}
    evaluator = CrossEntropy(data, weights={"a": 0.5}, constraints=["safe"], shuffle=None)
    found = evaluator(model)
    a, b = dense_loss(model, texts[:3]), dense_loss(model, texts[3:])
    assert found["score"] == pytest.approx(-0.5 * a - b, rel=1e-5)
    assert found["tasks"] == pytest.approx({"a": -a, "b": -b}, rel=1e-5)
    safe = found["constraints"]["safe"]
    assert safe.value == pytest.approx(dense_loss(model, texts), rel=1e-5)
    assert safe.bounds[0] < safe.value < safe.bounds[1]


class Words:
    """A tokenizer of words by their length."""

    eos_token_id = 2

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [len(word) for word in text.split()]}

    def apply_chat_template(self, said, tokenize, add_generation_prompt):
        assert add_generation_prompt
        assert not tokenize
        return " ".join(["user:", *(x["content"] for x in said), "assistant:"])


def test_only_answers_count(model):
    def loss(ids, first):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[0, first - 1 : -1]
        return nn.functional.cross_entropy(logits, tokens[0, first:]).item()

    pair = [{"prompt": "one two", "answer": "three or four"}]
    found = {
        template: -CrossEntropy(pair, Words(), template=template)(model)["score"]
        for template in (None, "Question: {prompt}", "chat")
    }
    assert found[None] == pytest.approx(loss([1, 3, 3, 5, 2, 4, 2], 3), rel=1e-5)
    asked = found["Question: {prompt}"]
    assert asked == pytest.approx(loss([1, 9, 3, 3, 5, 2, 4, 2], 4), rel=1e-5)
    assert found["chat"] == pytest.approx(loss([5, 3, 3, 10, 5, 2, 4, 2], 4), rel=1e-5)
    whole = -CrossEntropy(["one two three"], Words())(model)["score"]
    assert whole == pytest.approx(loss([1, 3, 3, 5], 1), rel=1e-5)


@pytest.mark.parametrize(
    ("data", "given", "said"),
    [
        ([], {}, "no examples"),
        (["a text"], {}, "is missing"),
        ([{"prompt": "x"}], {"tokenizer": Words()}, "'answer'"),
        ([{"input_ids": [1, 2], "labels": [1]}], {}, "one label a token"),
        ([{"input_ids": [1, 2], "labels": [1, -100]}], {}, "no token that counts"),
        ([{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}], {"length": 2}, "that counts"),
        ([{"input_ids": [1, 2]}], {"template": "Q:"}, "no place for the prompt"),
        ([{"input_ids": [1, 2]}], {"constraints": ["b"]}, "not known"),
    ],
)
def test_data_that_cannot_be_evaluated_is_refused(data, given, said):
    with pytest.raises(dm.OptionError, match=said):
        CrossEntropy(data, **given)


def test_a_sum_of_the_data_tells_them_apart(texts):
    sums = {
        CrossEntropy(texts).digest,
        CrossEntropy(texts[:5]).digest,
        CrossEntropy(texts, weights={"task": 2.0}).digest,
    }
    assert len(sums) == 3
    assert CrossEntropy(texts).digest in sums


@pytest.mark.parametrize("methods", [["linear"], ["do"], ["do", "tsvm", "iso_c", "linear"]])
def test_a_candidate_on_a_live_model_is_the_one_in_memory(model, adapters, methods):
    """Also as it is written, and the model is as it was at the end."""
    several = {m: dm.prepare(adapters, m, scale=1.3) for m in methods}
    before, seen = state(model), []
    space = Space(groups="layer", scale=(0.5, 2.0))

    def evaluate(live, examples):
        seen.append(outputs(live))
        return 0.0

    found = dm.search(*(several, evaluate, space, Budget(5)), strategy="random", live=model, seed=1)
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items())
    for trial, live in zip(found.trials, seen):
        candidate = found.layout.candidate(trial.values)
        deltas = {}
        for k, (name, method) in enumerate(zip(candidate.modules, candidate.methods)):
            delta = several[method].merge(candidate.weights).delta(name)
            deltas[name] = candidate.scales[k].float() * delta
        assert distance(live, with_update(model, deltas)) < 1e-5


@pytest.mark.parametrize("methods", [["linear"], ["do", "iso_c"]])
def test_many_in_one_forward_are_each_what_one_is(model, adapters, methods, texts):
    several = {m: dm.prepare(adapters, m) for m in methods}
    evaluator = CrossEntropy({"a": texts, "b": texts[:2]}, batch=4, constraints=["b"])
    space = Space(groups="layer", scale=(0.5, 2.0))
    one, many = (
        dm.search(
            *(several, evaluator, space, Budget(10)),
            strategy="random",
            live=model,
            population=population,
            seed=1,
        )
        for population in (1, 4)
    )
    assert [t.values for t in one.trials] == [t.values for t in many.trials]
    for x, y in zip(one.trials, many.trials):
        assert x.score == pytest.approx(y.score, rel=1e-5)
    assert len({t.score for t in one.trials}) == 10


def test_what_is_picked_is_an_adapter_alone_a_merge_or_nothing(model, adapters, tmp_path):
    """Also in what is written."""
    several = {m: dm.prepare(adapters, m) for m in ("linear", "iso_c")}
    space, seen = Space(groups="layer", pick=True), []

    def evaluate(live, examples):
        seen.append(outputs(live))
        return 0.0

    found = dm.search(several, evaluate, space, Budget(12), strategy="random", live=model, seed=3)
    names = several["linear"].adapters
    kappa = {f"{names[0]} alone": [1.0, 0.0], f"{names[1]} alone": [0.0, 1.0]}
    picked = set()
    for trial, live in zip(found.trials, seen):
        deltas = {}
        for name in several["linear"].modules:
            pick = trial.values[f"layer {name.split('.')[2]} pick"]
            picked.add(pick)
            method = "iso_c" if pick == "all by iso_c" else "linear"
            if pick != "nothing":
                deltas[name] = several[method].merge(kappa.get(pick, [1.0, 1.0])).delta(name)
        assert distance(live, with_update(model, deltas)) < 1e-5
        if deltas:
            found.save(tmp_path / f"{trial.number}", trial)
            written = dm.load(tmp_path / f"{trial.number}")
            for name, delta in deltas.items():
                a, b = written.factors(name)
                assert distance(b @ a, delta) < 1e-5
            others = written.modules.keys() - deltas.keys()
            assert all(not bool((b @ a).any()) for a, b in map(written.factors, others))
    assert picked == {*kappa, "all by linear", "all by iso_c", "nothing"}


def test_an_error_leaves_the_model_as_it_was(model, adapters):
    before = state(model)

    def broken(live, examples):
        raise RuntimeError("broken")

    several = {m: dm.prepare(adapters, m) for m in ("linear", "do")}
    with pytest.raises(RuntimeError, match="broken"):
        dm.search(several, broken, live=model)
    assert state(model).keys() == before.keys()
    with pytest.raises(dm.OptionError, match="leave live out"):
        dm.search(dm.prepare(adapters, "ties"), broken, live=model)
    with (
        dm.prepare(adapters, "linear").attach(model) as live,
        pytest.raises(dm.OptionError, match="give the model"),
    ):
        dm.search(several, broken, live=live)
    assert state(model).keys() == before.keys()


def test_a_loss_can_be_a_constraint(model, adapters, texts):
    evaluator = CrossEntropy({"a": texts, "kept": texts}, constraints=["kept"])
    prepared = dm.prepare(adapters, "linear")
    given = {"budget": Budget(12), "strategy": "random", "live": model, "seed": 1}
    base = evaluator(model)["constraints"]["kept"]
    most = base.bounds[1] + 0.05
    found = dm.search(prepared, evaluator, constraints={"kept": AtMost(most)}, **given)
    assert found.verdicts[0].high <= most
    assert evaluators.Mean is type(base)
    with pytest.raises(dm.Infeasible, match=r"asked at most 0\.1: fails by"):
        dm.search(prepared, evaluator, constraints={"kept": AtMost(0.1)}, **given)
