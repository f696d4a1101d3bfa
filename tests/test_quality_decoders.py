"""The decoder sets of the quality benchmark: their examples, and losses in place of logits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks" / "quality"


@pytest.fixture
def quality(monkeypatch):
    """The benchmark's modules can be imported."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


def test_examples_of_a_kind_of_text_do_not_overlap(quality, monkeypatch, tmp_path):
    import decoder

    lines = [" ".join(map(str, range(7 * k, 7 * k + 7))) for k in range(20_000)]
    monkeypatch.setattr(decoder.wheels, "unpacked", lambda data: tmp_path)
    monkeypatch.setattr(decoder, "base", lambda data: tmp_path)
    monkeypatch.setattr(decoder, "KINDS", {"numbers": lambda root: lines})

    def words(texts):
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

    monkeypatch.setattr(decoder.AutoTokenizer, "from_pretrained", lambda path: words)
    published = tmp_path / "published.json"
    published.write_text('{"numbers": "another sha256"}')
    monkeypatch.setattr(decoder, "HASHES", published)
    assert decoder.changed(tmp_path) == []
    found = decoder.examples("numbers", 0, tmp_path)
    assert found.shape == (decoder.VALIDATION + decoder.TEST + decoder.TRAIN, decoder.TOKENS)
    assert len(found.unique()) == found.numel()
    assert (found[:, 0] % 7 == 0).all()
    assert decoder.changed(tmp_path) == ["numbers (decoder)"]
    other = decoder.examples("numbers", 1, tmp_path)
    assert not torch.equal(other, found)
    assert torch.equal(other.sort(0).values, found.sort(0).values)


def test_a_set_that_is_scored_by_losses(quality, monkeypatch, tmp_path):
    import byte_llama
    import measure
    import score

    monkeypatch.setattr(byte_llama, "BASE_STEPS", 8)
    monkeypatch.setattr(byte_llama, "STEPS", 6)
    adapters, bench = byte_llama.adapters(tmp_path, 0), byte_llama.bench(tmp_path)
    known = measure.training(bench, adapters)
    examples = byte_llama.VALIDATION + byte_llama.TEST
    assert [x.shape for x in known["own"]] == [(examples,)] * 4
    assert min(score.gains(known, known["base"], score.TEST)[1]) > 0
    assert score.accuracy(known, known["base"]) is None
    again = bench.outputs({}, 1.0, known["tasks"])
    assert all(torch.equal(again[task], known["base"][task]) for task in known["tasks"])
