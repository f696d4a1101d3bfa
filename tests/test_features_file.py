"""What layers are given by task, in a file: merges of what does not touch other tasks' inputs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.close import assert_close
from support.tasks import TARGETS, Small, batches, moments, small, without
from support.trained import trained
from torch import Tensor

import domerge_fast as dm
from domerge_fast import OptionError
from domerge_fast.cli import main as cli
from domerge_fast.storage.features_file import FeaturesFile

TASKS = ("a", "b", "c")
STEP = ["osrm_project"]


@pytest.fixture(scope="module")
def model() -> Small:
    return small()


@pytest.fixture(scope="module")
def place(model: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, and an adapter of every task."""
    folder = tmp_path_factory.mktemp("features")
    for k, task in enumerate(TASKS):
        trained(model, k, folder / task, target_modules=TARGETS)
    made = dm.osrm_save_features(
        model, batches(), target_modules=TARGETS, output=folder / "f.safetensors"
    )
    assert made == folder / "f.safetensors"
    return folder


def sources(place: Path) -> list[Path]:
    return [place / task for task in TASKS]


def given(place: Path, energy: float = 0.5) -> dict:
    return {"pre": STEP, "features": place / "f.safetensors", "features_energy": energy}


def dense(path: Path, name: str) -> Tensor:
    adapter = dm.load(path)
    a, b = adapter.factors(name)
    return adapter.modules[name].scaling * b.double() @ a.double()


def test_the_file_has_what_every_layer_is_given(model, place, tmp_path):
    file = FeaturesFile(place / "f.safetensors")
    assert file.tasks == TASKS
    assert file.inputs["layers.0.q_proj"] == file.inputs["layers.0.v_proj"]
    assert len(load_file(place / "f.safetensors")) == len({*file.inputs.values()}) * 3
    for name in file.inputs:
        for task in TASKS:
            expected = moments(model, name, without(task)) / 2
            found = file.others(name, task).double()
            torch.testing.assert_close(found, expected, atol=1e-6 * expected.trace(), rtol=0)
    whole = file.others("layers.1.down", None).double()
    expected = moments(model, "layers.1.down", batches()) / 3
    torch.testing.assert_close(whole, expected, atol=1e-6 * expected.trace(), rtol=0)
    parts = tmp_path / "parts.safetensors"
    asked = {"target_modules": TARGETS, "output": parts}
    dm.osrm_save_features(model, batches(), max_memory=1, **asked)
    assert parts.read_bytes() == (place / "f.safetensors").read_bytes()
    with pytest.raises(dm.OutputError, match="exists already"):
        dm.osrm_save_features(model, batches(), **asked)
    dm.osrm_save_features(model, batches(), overwrite=True, **asked)


def test_an_adapter_is_projected_by_the_file(model, place):
    features = dm.osrm_features(model, batches(), task="b", target_modules=TARGETS)
    expected = dm.osrm_project(place / "b", features, energy=0.7)
    found = dm.osrm_project(place / "b", place / "f.safetensors", task="b", energy=0.7)
    assert found.modules.keys() == expected.modules.keys()
    assert found.kept == pytest.approx(expected.kept, rel=1e-6)
    with pytest.raises(OptionError, match="not of 'd'"):
        dm.osrm_project(place / "b", place / "f.safetensors", task="d")
    with pytest.raises(OptionError, match="leave task out"):
        dm.osrm_project(place / "b", features, task="b")


@pytest.mark.parametrize("method", ["linear", "tsvm", "do", "ties"])
def test_the_step_is_the_projection_of_every_adapter(place, method):
    file = place / "f.safetensors"
    one = {"scale": 1.0, "form": "deltas", "weights": [1.0, -0.5, 0.7]}
    projected = [dm.osrm_project(place / t, file, task=t, energy=0.5).adapter for t in TASKS]
    expected = dm.merge(projected, method, **one)
    found = dm.merge(sources(place), method, **one, **given(place))
    prepared = dm.prepare(sources(place), method, **given(place)).merge(one["weights"])
    usual = dm.merge(sources(place), method, **one)
    for name in found.names:
        assert_close(found.delta(name), expected.delta(name), 1e-5, name=name)
        assert_close(prepared.delta(name), expected.delta(name), 1e-5, name=name)
    assert any(not torch.allclose(found.delta(n), usual.delta(n), rtol=0.1) for n in found.names)


def test_gradients_go_through_what_was_projected(place):
    kappa = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    p = dm.prepare(sources(place), "linear", **given(place))
    merge = p.merge(kappa, dtype="float64")
    sum(merge.delta(name).square().sum() for name in p.modules).backward()
    assert kappa.grad.isfinite().all()
    assert kappa.grad.abs().min() > 0


def test_the_energy_is_0_9_where_none_is_given(place):
    file = place / "f.safetensors"
    some, other = (
        dm.merge(sources(place), "linear", scale=1.0, pre=STEP, features=file, **x)
        for x in ({}, {"features_energy": 0.9})
    )
    assert all(torch.equal(some.delta(name), other.delta(name)) for name in some.names)


def test_a_card_repeats_it_by_the_sums_of_its_files(place, tmp_path):
    for name in (*TASKS, "f.safetensors"):
        copy = shutil.copytree if (place / name).is_dir() else shutil.copy
        copy(place / name, tmp_path / name)
    made = dm.merge(sources(tmp_path), "tsvm", output=tmp_path / "out", **given(tmp_path))
    recipe = dm.Recipe.read(tmp_path / "out", tmp_path)
    assert recipe.features.files.keys() == {"f.safetensors"}
    assert recipe.features_energy == 0.5
    dm.run(recipe, output=tmp_path / "again")
    file = "adapter_model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    assert made.report.recipe.pre == ("osrm_project",)
    tensors = load_file(tmp_path / "f.safetensors")
    save_file({key: 2 * x for key, x in tensors.items()}, tmp_path / "f.safetensors")
    with pytest.raises(OptionError, match="has the files of"):
        dm.Recipe.read(tmp_path / "out", tmp_path)


def test_inspect_tells_how_far_adapters_move_outputs_on_others_inputs(model, place, tmp_path):
    found = dm.inspect(sources(place), features=place / "f.safetensors").on_inputs
    assert found.tasks == found.own == TASKS
    for k, task in enumerate(TASKS):
        moved = squares = 0.0
        for name, row in found.modules.items():
            c, tau = moments(model, name, without(task)), dense(place / task, name)
            square = float(tau.square().sum())
            expected = float((tau @ c @ tau.T).trace()) * len(c) / square / float(c.trace())
            assert row[k] == pytest.approx(expected, rel=1e-3)
            moved, squares = moved + expected * square, squares + square
        assert found.moved[k] == pytest.approx(moved / squares, rel=1e-3)
    less = dm.osrm_project(place / "a", place / "f.safetensors", task="a", output=tmp_path / "a")
    after = dm.inspect([tmp_path / "a"], features=place / "f.safetensors").on_inputs
    assert after.moved[0] < 0.5 * found.moved[0]
    for name, x in less.modules.items():
        assert after.modules[name][0] == pytest.approx(x.after, rel=1e-3, abs=1e-6)
    shutil.copytree(place / "b", tmp_path / "else")
    other = dm.inspect([tmp_path / "else"], features=place / "f.safetensors").on_inputs
    assert other.own == (None,)


def test_the_command_takes_the_file(place, tmp_path, capsys):
    paths = [str(x) for x in sources(place)]
    file = ["--features", str(place / "f.safetensors")]
    assert cli.main(["inspect", *paths, *file]) == 0
    assert "moved on the inputs of a, b, c" in capsys.readouterr().out
    assert cli.main(["inspect", *paths, *file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["on_inputs"]["own"] == [*TASKS]
    line = ["merge", *paths, "-o", str(tmp_path / "out"), "--pre", *STEP, *file]
    assert cli.main([*line, "--method", "linear", "--features-energy", "0.5"]) == 0
    expected = dm.merge(sources(place), "linear", **given(place))
    out = dm.load(tmp_path / "out")
    for name in expected.names:
        a, b = out.factors(name)
        assert_close(b @ a, expected.delta(name), 1e-6, name=name)
    capsys.readouterr()
    line = ["osrm", "project", paths[0], *file, "--task", "a", "-o", str(tmp_path / "less")]
    assert cli.main([*line, "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["kept"]
    assert kept == pytest.approx(dm.osrm_project(paths[0], file[1], task="a").kept)
    assert cli.main(["osrm", "project", paths[0], "-o", str(tmp_path / "none")]) == 2
    assert "give --features, or --model and --texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"features": None, "features_energy": None}, "give features"),
        ({"pre": []}, "no step takes them"),
        ({"features_energy": 1.0}, "no share"),
        ({"features_energy": "half"}, "finite number"),
        ({"features": "none.safetensors"}, "none.safetensors"),
        ({"features": "a/adapter_model.safetensors"}, "no inputs of layers by task"),
        ({"features": "one.safetensors"}, "no task is called 'b'"),
        ({"features": "few.safetensors"}, "nothing of 'layers.0.down'"),
        ({"features": "wide.safetensors"}, "has 48 inputs, and the features have 40"),
        ({"features": "nan.safetensors"}, "NaN"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(model, place, tmp_path, changed, said):
    asked = given(place) | changed
    if isinstance(asked["features"], str):
        asked["features"] = place / asked["features"]
    _others(model, place)
    with pytest.raises(dm.DomergeError, match=said):
        dm.merge(sources(place), "linear", output=tmp_path / "out", **asked)
    assert not any(tmp_path.iterdir())


def _others(model: Small, place: Path) -> None:
    """Files that do not fit."""
    if (place / "nan.safetensors").exists():
        return
    one = {"a": batches()["a"]}
    dm.osrm_save_features(
        model, one, target_modules=TARGETS, output=place / "one.safetensors", overwrite=True
    )
    dm.osrm_save_features(
        model, batches(), target_modules=["q_proj"], output=place / "few.safetensors"
    )
    tensors = load_file(place / "f.safetensors")
    with safe_open(place / "f.safetensors", "pt") as file:
        said = file.metadata()
    cut = {key: x[:40, :40].contiguous() for key, x in tensors.items()}
    save_file(cut, place / "wide.safetensors", said)
    save_file({k: x * float("nan") for k, x in tensors.items()}, place / "nan.safetensors", said)


def test_a_file_of_one_task_has_no_others(model, place):
    _others(model, place)
    with pytest.raises(OptionError, match="of 'a' alone"):
        dm.osrm_project(place / "a", place / "one.safetensors", task="a")
