"""The quality benchmark from training to figures, on a tiny model and two invented tasks."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

FOLDER = Path(__file__).parent.parent / "benchmarks" / "quality"


@pytest.fixture
def quality(monkeypatch, tmp_path):
    """Its modules; a base of two narrow layers, and texts of tokens that the class shifts."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import bases
    import encoders
    import tasks

    def load(name, data):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        config = BertConfig(vocab_size=50, num_attention_heads=2, **sizes)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        return BertModel(config).eval()

    def task(name, data):
        order = random.Random(name)
        examples = []
        for k in range(500):
            label = k % 2
            words = [str(order.randrange(5, 25) + 20 * label) for _ in range(order.randrange(3, 6))]
            examples.append((" ".join(words), label if name == "first" else 1 - label))
        return tasks.Task(["1", "2"], examples)

    def tokenizer(data):
        def tokens(texts, **settings):
            several = isinstance(texts, list)
            found = [
                [int(word) for word in text.split()] for text in (texts if several else [texts])
            ]
            return {"input_ids": found if several else found[0]}

        return tokens

    monkeypatch.setattr(bases, "load", load)
    monkeypatch.setattr(bases, "tokenizer", tokenizer)
    monkeypatch.setattr(tasks, "TASKS", {"first": None, "second": None})
    monkeypatch.setattr(tasks, "task", task)
    encoders._tokens.cache_clear()
    kind = encoders.Kind([(30, 1e-2)], (2, 4))
    adapters = encoders.adapters(kind, "tiny", 0, tmp_path, tmp_path / "adapters")
    yield adapters, encoders.bench("tiny", 0, tmp_path), tmp_path
    for name in ("bases", "encoders", "tasks", "bench", "merges", "measure", "score", "wheels"):
        sys.modules.pop(name, None)


def test_from_training_to_figures(quality):
    adapters, bench, folder = quality
    import measure
    import score
    from merges import DO, MEAN, Candidate

    known = measure.keep(folder / "training.pt", lambda: measure.training(bench, adapters))
    gain, own = score.gains(known, known["base"], score.TEST)
    assert gain.tolist() == [0, 0]
    assert min(own) > 0.1
    assert [x.shape for x in known["own"]] == [(320, 2)] * 2
    torch.testing.assert_close(
        known["schatten"][..., 0].norm(dim=1), torch.tensor(known["norms"]).double()
    )

    merge = measure.merge(bench, adapters, MEAN, known)
    scale = score.tuned(known, merge)
    assert merge["scales"][1] < scale < merge["scales"][-1]
    direct = bench.outputs(MEAN.deltas([a.path for a in adapters]), scale, known["tasks"])
    share = score.shares(known, direct).mean().item()
    figures = score.summary(known, merge, measure.merge(bench, adapters, DO, known))
    assert figures["share"] == pytest.approx(share, abs=0.02)
    low, high = figures["interval"]
    assert low < figures["share"] < high

    sum_of_one = Candidate("one", "linear").deltas([adapters[0].path])
    alone = bench.outputs(sum_of_one, 1.0, known["tasks"])
    assert score.shares(known, alone)[0] == pytest.approx(1.0, abs=1e-6)


def test_what_is_kept_is_not_made_again(quality):
    _, _, folder = quality
    import measure

    assert measure.keep(folder / "x.pt", lambda: {"x": 1.0}) == {"x": 1.0}
    assert measure.keep(folder / "x.pt", lambda: pytest.fail("made again")) == {"x": 1.0}
