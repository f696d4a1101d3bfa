"""domerge-fast tune: a text in, a merge of another size out."""

from __future__ import annotations

import json
import random

import pytest
import torch
from support.causal import WORDS, causal
from support.trained import trained

import domerge_fast as dm
from domerge_fast.cli import main as cli
from domerge_fast.learning import causal as texts

TARGETS = {"target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, two adapters and a text."""
    place = tmp_path_factory.mktemp("tune")
    model = causal(place / "model")
    for k, name in enumerate("ab"):
        trained(model, k, place / name, **TARGETS)
    order = random.Random(0)
    text = " ".join(WORDS[order.randrange(5)] for _ in range(300))
    (place / "text.txt").write_text(text)
    return place


def run(folder, out, *more):
    arguments = [str(folder / "a"), str(folder / "b"), "-o", str(out), "--length", "20"]
    arguments += ["--model", str(folder / "model"), "--text", str(folder / "text.txt"), *more]
    return cli.main(["tune", *arguments])


@pytest.mark.parametrize("method", ["tsvm", "do", "doge"])
def test_what_is_written_has_the_least_loss_of_what_was_tried(folder, tmp_path, method, capsys):
    assert run(folder, tmp_path / "out", "--method", method, "--evaluations", "5", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    losses = [x[str(folder / "text.txt")] for x in told["losses"]]
    assert len(losses) == 5
    assert min(losses) < losses[0]
    model, tokenizer = texts.loaded(str(folder / "model"))
    data = texts.passages([str(folder / "text.txt")], tokenizer, 20, 16)
    alone = dm.prepare([tmp_path / "out"], "linear")
    found = dm.cocktail(alone, model, data).history[0].mean
    assert found == pytest.approx(min(losses), rel=1e-4)


def test_it_tells_what_it_did_and_takes_options_of_methods_and_groups(folder, tmp_path, capsys):
    more = ["--evaluations", "2", "--groups", "*q_proj", "--power", "0.5", "--rank", "3"]
    assert run(folder, tmp_path / "out", *more) == 0
    told = capsys.readouterr().out
    assert "as it was prepared" in told
    assert dm.load(tmp_path / "out").factors("model.layers.0.self_attn.q_proj")[0].shape[0] == 3


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--text", "nowhere.txt"], "cannot be read"),
        (["--model", "nowhere"], "does not load"),
        (["--groups", "x*"], "matches no module"),
        (["--evaluations", "0"], "too small"),
        (["--gamma", "3"], "gamma"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(folder, tmp_path, more, told, capsys):
    assert run(folder, tmp_path / "out", *more) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_passages_are_spread_over_the_text(folder):
    _, tokenizer = texts.loaded(str(folder / "model"))
    (name,) = files = [str(folder / "text.txt")]
    whole = torch.tensor(tokenizer((folder / "text.txt").read_text())["input_ids"])
    found = texts.passages(files, tokenizer, 20, 5)[name]
    assert [x["input_ids"].tolist() for x in found] == [
        [whole[at : at + 20].tolist()] for at in range(0, 300, 60)
    ]
    short = texts.passages(files, tokenizer, 400, 5)[name]
    assert torch.equal(short[0]["input_ids"][0], whole)
