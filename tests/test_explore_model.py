"""What the page tries on a model: texts after a prompt, those of the merge that is saved."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from peft import PeftModel
from support.causal import WORDS, causal
from support.trained import trained
from test_explore import PROMPT, WEIGHTS, answered, asked, client
from transformers import AutoModelForCausalLM, AutoTokenizer

import domerge_fast as dm
from domerge_fast.explore import trial
from domerge_fast.explore.explorer import Explorer
from domerge_fast.explore.trial import MOST_CHARACTERS, MOST_TOKENS, Trial
from domerge_fast.learning.causal import continued, loaded, passages


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, two adapters and a text."""
    place = tmp_path_factory.mktemp("models")
    model = causal(place / "model")
    for k, name in enumerate("ab"):
        trained(model, k, place / name, target_modules=["q_proj", "down_proj"], lora_alpha=60)
    (place / "text.txt").write_text(" ".join(WORDS * 10))
    return place


@pytest.fixture
def explorer(folder, tmp_path) -> Iterator[Explorer]:
    model, tokenizer = loaded(str(folder / "model"))
    data = passages([str(folder / "text.txt")], tokenizer, 16, 2)
    found = Explorer([folder / "a", folder / "b"], tmp_path, Trial(model, tokenizer, data))
    yield found
    found.close()


def written(folder: Path, adapter: Path | None) -> str:
    """What transformers writes with an adapter that PEFT loads."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    given = tokenizer(PROMPT["prompt"], return_tensors="pt")
    ids = model.generate(input_ids=given["input_ids"], max_new_tokens=12, do_sample=False)
    return tokenizer.decode(ids[0, 2:], skip_special_tokens=True)


def test_texts_are_what_the_saved_merge_and_each_adapter_write(explorer, folder, tmp_path):
    dm.merge(
        [folder / "a", folder / "b"], "tsvm", weights=WEIGHTS, scale=0.7, output=tmp_path / "m"
    )
    adapters = {"merge": tmp_path / "m", "base": None, 0: folder / "a", 1: folder / "b"}
    found = {}
    for of, adapter in adapters.items():
        found[of] = answered(explorer, "/text", asked("tsvm", **PROMPT | {"of": of}))["text"]
        assert found[of] == written(folder, adapter)
        assert 0 < len(found[of].split()) <= 12
    assert len({found["base"], found[0], found[1]}) == 3
    assert found["merge"] != found["base"]


def test_the_model_is_as_it_was_afterwards(explorer, folder):
    before = written(folder, None)
    answered(explorer, "/text", asked("do", **PROMPT))
    assert not [name for name, _ in explorer._trial.model.named_modules() if "lora" in name]
    assert answered(explorer, "/text", asked(**PROMPT | {"of": "base"}))["text"] == before


def test_what_no_slider_changes_is_written_once(explorer, monkeypatch):
    written = []
    usual = continued

    def counted(*given) -> str:
        written.append(given[2])
        return usual(*given)

    monkeypatch.setattr(trial, "continued", counted)
    for weights in ([1, 1], [1, 0]):
        for of in ("base", 1, "merge"):
            answered(explorer, "/text", asked(weights=weights, **PROMPT | {"of": of}))
    assert len(written) == 4
    answered(explorer, "/text", asked(**PROMPT | {"of": 1, "prompt": "w3"}))
    assert written[-1] == "w3"
    assert len(explorer._texts) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"of": 2}, "option 'of'"),
        ({"of": True}, "option 'of'"),
        ({"of": "<b>"}, "option 'of'"),
        ({"of": None}, "option 'of'"),
        ({"prompt": ""}, "option 'prompt'"),
        ({"prompt": 3}, "option 'prompt'"),
        ({"prompt": " "}, "option 'prompt': has no tokens"),
        ({"prompt": "w1 " * MOST_CHARACTERS}, "option 'prompt'"),
        ({"tokens": 0}, "option 'tokens'"),
        ({"tokens": MOST_TOKENS + 1}, "option 'tokens'"),
        ({"tokens": "12"}, "option 'tokens'"),
        ({"tokens": None}, "option 'tokens'"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line(explorer, given, said):
    answer = client(explorer).post("/text", json=asked(**PROMPT | given))
    assert answer.status_code == 422
    assert said in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_a_prompt_that_leaves_no_room_is_refused(folder):
    model, tokenizer = loaded(str(folder / "model"))
    model.config.max_position_embeddings = 10
    assert continued(model, tokenizer, "w1 w2", 8)
    with pytest.raises(dm.OptionError, match="has 3 tokens, and the model takes 10 with the 8"):
        continued(model, tokenizer, "w1 w2 w3", 8)


def test_generating_stops_at_the_next_token(folder):
    model, tokenizer = loaded(str(folder / "model"))
    asked_for = []

    def check() -> None:
        asked_for.append(1)
        if len(asked_for) == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        continued(model, tokenizer, "w1", 100, check)
    assert len(asked_for) == 5


@pytest.mark.parametrize("newer", ["loss", "text"])
def test_a_newer_request_stops_an_older_text(explorer, newer, monkeypatch):
    explorer.alone()  # asked for first, as by a page that is open
    begins = threading.Event()

    def endless(model: object, tokenizer: object, prompt: str, most: int, check) -> str:
        if prompt == "new":
            return "written"
        begins.set()
        while True:
            check()
            time.sleep(0.001)

    monkeypatch.setattr(trial, "continued", endless)
    answers = []

    def ask() -> None:
        answers.append(client(explorer).post("/text", json=asked(**PROMPT)))

    old = threading.Thread(target=ask)
    old.start()
    assert begins.wait(60)
    if newer == "loss":
        assert answered(explorer, "/loss", asked(weights=[0.5, 0.5]))["losses"]
    else:
        found = answered(explorer, "/text", asked(**PROMPT | {"prompt": "new"}))
        assert found == {"text": "written"}
    old.join(60)
    assert [x.status_code for x in answers] == [422]
    assert "something else was asked for" in answers[0].json()["error"]


def test_without_texts_there_are_no_losses_on_the_page(folder, tmp_path):
    model, tokenizer = loaded(str(folder / "model"))
    explorer = Explorer([folder / "a", folder / "b"], tmp_path, Trial(model, tokenizer, {}))
    page = client(explorer).get("/?token=a-token").text
    explorer.close()
    assert 'id="losses"' not in page
    assert page.count('<dd data-of="') == 4  # the merge, the base and two adapters
