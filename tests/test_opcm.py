"""OPCM and its resumable form against the paper's recursion, dense and in float64."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from support.close import distance
from support.files import state, unchanged
from support.make import random_factors, write_adapter
from support.merges import adapters, at_one, dense
from support.processes import forked
from support.shapes import CASES, Case, random_case
from torch import Tensor

import domerge_fast as dm
from domerge_fast import AdapterError, DomergeError, OptionError, OutputError
from domerge_fast.adapters import Adapter
from domerge_fast.engine import reader
from domerge_fast.methods.spectral.space import NOISE
from domerge_fast.sessions.disk import FILES, STATE, TENSORS
from domerge_fast.sessions.sequential import Sequential
from domerge_fast.storage import folder as output_folder

ALPHAS = (0.0, 0.5, 0.9, 1.0)
MOST = 32  # adapters one after the other: rounding grows with every step, in the definition too
SHAPES = {f"layers.{i}.q_proj": (40, 48) for i in range(3)} | {"layers.0.up_proj": (24, 7)}
Model = Mapping[str, Tensor]


# The definition


def at_once(tasks: Sequence[Model], alpha: float) -> dict[str, Tensor]:
    """The authors' recursion on a merge of mean norm, with the λ_t of every step; a task is τ of
    its modules. Null vectors, which are arbitrary, are left alone."""
    merged = dict(tasks[0])
    previous = 1.0
    norms = [size(tasks[0])]
    for task in tasks[1:]:
        norms.append(size(task))
        for name, update in task.items():
            if name in merged:
                cleaned = projected(update, merged[name], update.norm() / previous, alpha)
                merged[name] = previous * merged[name] + cleaned
            else:
                merged[name] = update
        for name in merged.keys() - task.keys():
            merged[name] = previous * merged[name]
        present = size(merged)
        previous = present / (sum(norms) / len(norms)) if present else 1.0
        merged = {name: update / previous for name, update in merged.items()}
    return merged


def projected(update: Tensor, merged: Tensor, other: Tensor, alpha: float) -> Tensor:
    """The update off the merge's spectrum, with all of its singular vectors."""
    u, s, vh = torch.linalg.svd(merged)
    rank = int((s > NOISE * (merged.norm() + other)).sum())
    s = s[:rank]
    share = s.cumsum(0) / s.sum()
    k = int((share <= alpha).sum()) if alpha < 1 else rank
    x = u.T @ update @ vh.T
    x[:k, :k] = 0
    x[range(rank), range(rank)] = 0
    return u @ x @ vh


def size(model: Model) -> float:
    return float(torch.stack([update.norm() for update in model.values()]).norm())


def tasks(cases: Mapping[str, Case], weights: Sequence[float]) -> list[dict[str, Tensor]]:
    deltas = {name: case.deltas() for name, case in cases.items()}
    return [{name: w * d[i] for name, d in deltas.items()} for i, w in enumerate(weights)]


def models(count: int, rank: int = 5) -> tuple[list[Adapter], list[dict[str, Tensor]]]:
    """Adapters that lack some modules, and are the first to have others; and their updates."""
    lacks = {0: "layers.0.up_proj", 1: "layers.1.q_proj", 3: "layers.2.q_proj"}
    loaded, updates = [], []
    for i in range(count):
        shapes = {name: shape for name, shape in SHAPES.items() if name != lacks.get(i)}
        factors = random_factors(shapes, rank + i % 2, seed=i)
        loaded.append(dm.from_tensors(factors, 1 / (i + 1), name=f"adapter-{i}"))
        updates.append({n: b.double() @ a.double() / (i + 1) for n, (a, b) in factors.items()})
    return loaded, updates


def check(merged: dm.Merged, expected: Model, tolerance: float = 1e-5) -> None:
    assert set(merged.names) == set(expected)
    for name, update in expected.items():
        assert distance(dense(merged, name), update) < tolerance, name


# All at once


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("name", CASES)
def test_the_method_is_its_dense_definition(name, alpha):
    full = CASES[name]
    case = Case(full.a[:MOST], full.b[:MOST], full.scalings[:MOST])
    loaded = adapters({"x": case})
    merged = at_one(loaded, "opcm", weights=case.weights, scale=-0.3, alpha=alpha)
    expected = at_once(tasks({"x": case}, case.weights), alpha)["x"]
    assert distance(dense(merged, "x"), -0.3 * expected) < 1e-5


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_whole_model_is_rescaled_by_one_number(count, monkeypatch):
    monkeypatch.setattr(reader, "GROUP_BYTES", 1)
    loaded, updates = models(count)
    merged = at_one(loaded, "opcm")
    check(merged, at_once(updates, 0.5))
    norm = size({name: dense(merged, name) for name in merged.names})
    assert norm == pytest.approx(sum(map(size, updates)) / count, rel=1e-5)


def test_modules_of_any_shapes_merge_together():
    cases = {f"{n}x{m}": random_case((3, 5, 2), n, m, n) for n, m in ((61, 33), (40, 50), (7, 5))}
    cases |= {name: CASES[name] for name in ("odd d", "duplicated", "shared A", "mixed sizes")}
    weights = [1.0, -0.5, 2.0]
    merged = at_one(adapters(cases), "opcm", weights=weights)
    check(merged, at_once(tasks(cases, weights), 0.5))
    assert merged.report["7x5"].rank == 5


def test_one_adapter_comes_back_with_its_weight():
    case = CASES["one adapter"]
    merged = at_one(adapters({"x": case}), "opcm", weights=[-3])
    assert distance(dense(merged, "x"), -3 * case.deltas()[0]) < 1e-6


def test_the_order_decides_what_gives_way():
    loaded = adapters({"x": CASES["odd d"]})
    forth, back = (dense(at_one(order, "opcm"), "x") for order in (loaded, loaded[::-1]))
    assert distance(forth, back) > 0.05


def test_nothing_of_the_merge_s_own_directions_is_added():
    """The same adapter twice is closed by the diagonal alone, whatever its size."""
    case = CASES["one adapter"]
    loaded = adapters({"x": case})
    merged = at_one([*loaded, *loaded], "opcm", weights=[1, 3], alpha=0)
    assert distance(dense(merged, "x"), 2 * case.deltas()[0]) < 1e-6


def test_how_an_update_is_split_into_factors_does_not_matter():
    case = CASES["usual"]
    split = Case([a / (i + 1) for i, a in enumerate(case.a)], [], case.scalings)
    split.b.extend((i + 1) * b for i, b in enumerate(case.b))
    expected, result = (dense(at_one(adapters({"x": c}), "opcm"), "x") for c in (case, split))
    assert distance(result, expected) < 1e-5


def test_an_adapter_without_updates_only_lowers_the_mean():
    case = random_case((3, 2), 20, 12)
    case.a[1].zero_()
    merged = at_one(adapters({"x": case}), "opcm")
    assert distance(dense(merged, "x"), case.deltas()[0] / 2) < 1e-6


# One at a time


def added(folder: Path, loaded: Sequence[Adapter | Path], resume: bool, **how) -> Sequential:
    growing = Sequential.start(folder, **how)
    for adapter in loaded:
        growing.add(adapter)
        if resume:
            growing = Sequential.open(folder)
    return growing


@pytest.mark.parametrize("resume", [False, True], ids=["one process", "resumed"])
@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_eight_added_one_by_one_are_eight_at_once(alpha, resume, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "GROUP_BYTES", 1)
    loaded, updates = models(8)
    growing = added(tmp_path / "state", loaded, resume, alpha=alpha)
    expected = at_one(loaded, "opcm", alpha=alpha)
    check(growing.merged(), {name: dense(expected, name) for name in expected.names})
    check(growing.merged(scale=-2), {n: -2 * x for n, x in at_once(updates, alpha).items()})
    steps = growing.state.steps
    assert [step.adapter for step in steps] == [adapter.name for adapter in loaded]
    for step, update in zip(steps, updates, strict=True):
        assert step.norm == pytest.approx(size(update), rel=1e-5)
        assert step.energy_kept == 1


def test_after_every_add_it_is_the_merge_so_far(tmp_path):
    loaded, updates = models(5)
    growing = Sequential.start(tmp_path / "state")
    for count, adapter in enumerate(loaded, 1):
        growing.add(adapter)
        check(growing.merged(), at_once(updates[:count], 0.5))


def test_weights(tmp_path):
    case = CASES["odd d"]
    growing = Sequential.start(tmp_path / "state", alpha=0.3)
    for adapter, weight in zip(adapters({"x": case}), case.weights, strict=True):
        growing.add(adapter, weight)
    check(growing.merged(), at_once(tasks({"x": case}, case.weights), 0.3))
    assert growing.merged().report.recipe.weights == tuple(case.weights)


@pytest.mark.parametrize("name", ["zero factors", "all zero", "d below R", "d is 1", "duplicated"])
def test_hard_shapes_one_by_one(name, tmp_path):
    case = CASES[name]
    growing = added(tmp_path / "state", adapters({"x": case}), True)
    check(growing.merged(), at_once(tasks({"x": case}, [1.0] * len(case.a)), 0.5))


def test_the_folder_does_not_grow_with_the_adapters(tmp_path):
    """Eight adapters of rank 5 and 6 on 24 x 7: what is kept is of rank 7."""
    growing = Sequential.start(tmp_path / "state")
    sizes = []
    for seed in range(8):
        factors = random_factors({"x": (24, 7)}, 5, seed=seed)
        growing.add(dm.from_tensors(factors))
        sizes.append((tmp_path / "state" / TENSORS).stat().st_size)
    assert growing.merged().report["x"].rank == 7
    assert len(set(sizes[1:])) == 1


def test_a_cap_on_the_rank_says_what_it_keeps(tmp_path):
    case = CASES["odd d"]
    loaded = adapters({"x": case})
    growing = Sequential.start(tmp_path / "state", rank=4)
    kept = [growing.add(adapter).energy_kept for adapter in loaded]
    total, shares = torch.zeros(33, 61, dtype=torch.float64), []
    for update in case.deltas():
        total = total + (projected(update, total, update.norm(), 0.5) if total.any() else update)
        u, s, vh = torch.linalg.svd(total)
        shares.append(float(s[:4].square().sum() / s.square().sum()))
        total = u[:, :4] @ s[:4].diag() @ vh[:4]
    assert kept == pytest.approx(shares, rel=1e-5)
    assert kept[0] == 1 > kept[1]
    merged = growing.merged()
    assert merged.report["x"].rank == 4
    mean = sum(float(update.norm()) for update in case.deltas()) / 3
    assert distance(dense(merged, "x"), total * mean / total.norm()) < 1e-5


def folders(tmp_path: Path, count: int = 3, **config) -> list[Path]:
    return [
        write_adapter(
            tmp_path / f"adapter-{i}",
            random_factors(SHAPES, 4 + i, seed=i, dtype=torch.bfloat16),
            **config,
        )
        for i in range(count)
    ]


def test_it_is_written_as_peft_writes(tmp_path):
    carried = {"score.weight": torch.randn(3, 4)}
    inputs = folders(tmp_path, carried=carried, modules_to_save=["score"], task_type="SEQ_CLS")
    growing = added(tmp_path / "state", inputs, True)
    expected = at_one(inputs, "opcm", output=tmp_path / "expected")
    growing.save(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        growing.save(tmp_path / "out")
    with pytest.raises(OutputError, match="is one of the adapters to merge"):
        growing.save(tmp_path / "state", overwrite=True)
    configs = [
        json.loads((tmp_path / folder / "adapter_config.json").read_text())
        for folder in ("out", "expected")
    ]
    assert configs[0] == configs[1]
    found = dm.load(tmp_path / "out")
    assert {module.dtype for module in found.modules.values()} == {torch.bfloat16}
    assert torch.equal(
        found.carried["base_model.model.score.weight"].read(), carried["score.weight"]
    )
    for name in SHAPES:
        a, b = found.factors(name)
        assert distance(b.double() @ a.double(), dense(expected, name)) < 1e-2
    assert "adapter-2" in (tmp_path / "out/README.md").read_text()


def test_embeddings_and_convolutions(tmp_path):
    generator = torch.Generator().manual_seed(0)
    loaded = [
        dm.from_tensors(
            {
                "embed": (
                    torch.randn(3, 50, generator=generator),
                    torch.randn(8, 3, generator=generator),
                ),
                "conv": (
                    torch.randn(2, 4, 3, 3, generator=generator),
                    torch.randn(6, 2, 1, 1, generator=generator),
                ),
            },
            embeddings=["embed"],
        )
        for _ in range(3)
    ]
    growing = added(tmp_path / "state", loaded, True)
    growing.save(tmp_path / "out")
    expected = at_one(loaded, "opcm")
    found = dm.load(tmp_path / "out")
    assert [module.kind for module in found.modules.values()] == ["conv2d", "embedding"]
    assert found.modules["conv"].a_shape[1:] == (4, 3, 3)
    for name in found.modules:
        a, b = found.factors(name)
        assert distance(b.double() @ a.double(), dense(expected, name)) < 1e-5


def test_what_was_returned_stays_when_more_is_added(tmp_path):
    loaded, updates = models(2)
    growing = Sequential.start(tmp_path / "state")
    growing.add(loaded[0])
    first = growing.merged()
    growing.add(loaded[1])
    check(first, updates[0])


def test_half_precision_that_does_not_hold_the_merge_is_refused(tmp_path):
    huge = dm.from_tensors({"x": (torch.full((1, 4), 1e6), torch.full((4, 1), 1e6))})
    growing = added(tmp_path / "state", [huge], False)
    with unchanged(tmp_path), pytest.raises(DomergeError, match=r"'x': .* does not fit"):
        growing.save(tmp_path / "out", dtype="float16")


# Refusals


def test_refusals_are_one_line(tmp_path):
    inputs = folders(tmp_path, 1)
    growing = Sequential.start(tmp_path / "state")
    with pytest.raises(OptionError, match=r"nothing was added to .*; add an adapter first"):
        growing.merged()
    with pytest.raises(OutputError, match="exists already"):
        Sequential.start(tmp_path / "state")
    with pytest.raises(OutputError, match="holds other files"):
        Sequential.start(inputs[0], overwrite=True)
    with pytest.raises(OptionError, match=r"no sequential merge .*; check the path, or start one"):
        Sequential.open(tmp_path / "nowhere")
    with pytest.raises(OptionError, match="no sequential merge"):
        Sequential.open(inputs[0])
    with pytest.raises(OptionError, match="rank"):
        Sequential.start(tmp_path / "other", rank=0)
    with pytest.raises(OptionError, match="alpha"):
        Sequential.start(tmp_path / "other", alpha=-1)
    with pytest.raises(OptionError, match="0 adds nothing"):
        growing.add(inputs[0], 0)
    with pytest.raises(OptionError, match="dtype"):
        added(tmp_path / "other", inputs, False).merged(dtype="int8")
    with pytest.raises(OptionError, match="0 leaves nothing"):
        Sequential.open(tmp_path / "other").merged(scale=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("[" * 100_000, "nested deeper"),
        ('{"format": 2, "kind": "sequential"}', "is damaged"),
        ('{"format": 2}', "is damaged"),
        ('{"format": 2, "kind": "prepared"}', "but a session of kind 'prepared'; check the path"),
        ('{"format": 3, "kind": "sequential", "steps": [], "alpha": 1}', "format 3"),
    ],
)
def test_a_damaged_state_is_refused(text, message, tmp_path):
    Sequential.start(tmp_path / "state")
    (tmp_path / "state" / STATE).write_text(text)
    with pytest.raises(OptionError, match=message):
        Sequential.open(tmp_path / "state")


def test_a_state_of_the_first_format_is_refused(tmp_path):
    Sequential.start(tmp_path / "state")
    (tmp_path / "state" / STATE).rename(tmp_path / "state" / "sequential.json")
    with pytest.raises(OptionError, match=r"format 1 .*; use the version that wrote it, or start "):
        Sequential.open(tmp_path / "state")


def test_factors_that_are_not_those_of_the_state_are_refused(tmp_path):
    inputs = folders(tmp_path, 1)
    growing = added(tmp_path / "state", inputs, False)
    path = tmp_path / "state" / TENSORS
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with unchanged(tmp_path), pytest.raises(AdapterError, match=r"is not what session\.json was"):
        growing.add(inputs[0])


def test_damaged_factors_are_refused(tmp_path):
    inputs = folders(tmp_path, 1)
    growing = added(tmp_path / "state", inputs, False)
    path = tmp_path / "state" / TENSORS
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="is truncated"):
        growing.add(inputs[0])


def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    growing = added(tmp_path / "state", folders(tmp_path), False)
    wrong = write_adapter(tmp_path / "wrong", random_factors({"layers.0.q_proj": (40, 47)}, 2))
    other = write_adapter(
        tmp_path / "other", random_factors(SHAPES, 2), base_model_name_or_path="another"
    )
    factors = random_factors(SHAPES, 2)
    factors["layers.2.q_proj"][0][0, 0] = float("nan")
    spoiled = write_adapter(tmp_path / "spoiled", factors)
    for adapter, message in (
        (wrong, "wrong', module 'layers.0.q_proj': adapts a linear of 40 outputs and 47 inputs"),
        (other, "other': its base model is 'another'"),
        (spoiled, "spoiled', module 'layers.2.q_proj': NaN in lora_A"),
    ):
        with unchanged(tmp_path), pytest.raises(AdapterError) as caught:
            growing.add(adapter)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    stated = Sequential.start(tmp_path / "stated", base_model="base")
    stated.add(tmp_path / "adapter-0")
    stated.add(other)
    assert len(stated.state.steps) == 2


def test_what_others_have_added_meanwhile_is_kept(tmp_path):
    inputs = folders(tmp_path)
    one = added(tmp_path / "state", inputs[:1], False)
    other = Sequential.open(tmp_path / "state")
    other.add(inputs[1])
    one.add(inputs[2])
    expected = added(tmp_path / "expected", inputs, False)
    assert one.state == expected.state == Sequential.open(tmp_path / "state").state
    check(one.merged(), {name: dense(expected.merged(), name) for name in SHAPES}, 1e-2)


@pytest.mark.parametrize("changed", [{"alpha": 0.4}, {"rank": 3}, {"base_model": "another"}, {}])
def test_a_merge_that_was_started_anew_is_not_added_to(changed, tmp_path):
    inputs = folders(tmp_path)
    one = added(tmp_path / "state", inputs[:1] if not changed else [], False)
    Sequential.start(tmp_path / "state", overwrite=True, **changed)
    with unchanged(tmp_path), pytest.raises(OutputError, match="was started anew by someone else"):
        one.add(inputs[2])


# Whole or not at all


def add_until_told(folder: Path, adapter: Path, moment: str, pipe: Connection) -> None:
    reader.GROUP_BYTES = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def wait(*_: object, **__: object) -> None:
        pipe.send("there")
        time.sleep(60)

    def progress(done: int, _: int) -> None:
        if moment == "adding" and done == 3:
            wait()

    if moment == "before the swap":
        output_folder._swap = wait
    Sequential.open(folder).add(adapter, progress=progress)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "Ctrl-C"])
@pytest.mark.parametrize("moment", ["adding", "before the swap"])
def test_an_add_that_is_stopped_leaves_the_old_state(moment, number, tmp_path):
    inputs = folders(tmp_path)
    place = tmp_path / "place/state"
    added(place, inputs[:2], False)
    before = state(place)
    process, pipe = forked(add_until_told, place, inputs[2], moment)
    assert pipe.recv() == "there"
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode != 0
    assert state(place) == before
    if number == signal.SIGINT:
        assert os.listdir(place.parent) == ["state"]
    Sequential.open(place).add(inputs[2])
    expected = added(tmp_path / "expected", inputs, False)
    check(
        Sequential.open(place).merged(),
        {name: dense(expected.merged(), name) for name in SHAPES},
        1e-2,
    )
    assert sorted(os.listdir(place)) == sorted(FILES)


def test_the_choices_of_the_start_are_kept(tmp_path):
    chosen = {"alpha": 0.25, "rank": 3, "base_model": "base", "whole": "drop"}
    growing = Sequential.start(tmp_path / "state", **chosen)
    for found in (growing.state, Sequential.open(tmp_path / "state").state):
        assert {name: getattr(found, name) for name in chosen} == chosen
    growing.add(folders(tmp_path, 1)[0])
    assert {name: getattr(growing.state, name) for name in chosen} == chosen


def test_what_is_done_with_names_is_said_when_an_adapter_is_added_and_in_the_card(tmp_path):
    names = ["model.layers.0.mlp.up", "layers.0.mlp.up", "_orig_mod.layers.0.mlp.up"]
    names += ["model.layers.7.mlp.up"]
    inputs = [
        write_adapter(
            tmp_path / f"adapter-{i}",
            random_factors({name: (6, 8)}, 2, seed=i),
            base_model_name_or_path="base",
        )
        for i, name in enumerate(names)
    ]
    as_in = "'layers' is 'model.layers', as in the sum so far"
    said = [
        [],
        [f"adapter 2 (adapter-1): {as_in}"],
        [f"adapter 3 (adapter-2): {text}" for text in ("names without '_orig_mod'", as_in)],
        ["adapter 4 (adapter-3): has no module of another adapter, is kept beside them"],
    ]
    said[3].insert(0, "the sum so far: has no module of another adapter, is kept beside them")
    Sequential.start(tmp_path / "state")
    for adapter, expected in zip(inputs, said):
        assert list(Sequential.open(tmp_path / "state").add(adapter).notes) == expected
    merged = Sequential.open(tmp_path / "state").save(tmp_path / "merged")
    card = (tmp_path / "merged/README.md").read_text()
    for note in [note for notes in said for note in notes]:
        assert note in merged.report.notes
        assert note in card


@pytest.mark.parametrize(
    ("whole", "said"),
    [
        ("auto", []),
        ("drop", ["left out, saved whole by the adapters: score.weight"]),
        ("from:2", ["adapter 1 (adapter-0): left out, saved whole: score.weight"]),
    ],
)
def test_what_is_left_out_of_an_adapter_is_said(whole, said, tmp_path):
    factors = random_factors({"x": (6, 8)}, 2)
    score = {"score.weight": torch.ones(2, 6)}
    adapter = write_adapter(
        tmp_path / "adapter-0", factors, carried=score, modules_to_save=["score"]
    )
    (adapter / "tokenizer.json").write_text("{}")
    growing = Sequential.start(tmp_path / "state", whole=whole)
    tokenizer = "adapter 1 (adapter-0): its tokenizer is not copied (tokenizer.json)"
    assert list(growing.add(adapter).notes) == [*said, tokenizer]
    assert Sequential.open(tmp_path / "state").state == growing.state


def test_a_copied_folder_goes_its_own_way(tmp_path):
    inputs = folders(tmp_path)
    added(tmp_path / "state", inputs[:1], False)
    shutil.copytree(tmp_path / "state", tmp_path / "copy")
    with unchanged(tmp_path / "state"):
        Sequential.open(tmp_path / "copy").add(inputs[1])
    assert len(Sequential.open(tmp_path / "copy").state.steps) == 2
