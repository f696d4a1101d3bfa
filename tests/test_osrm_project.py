"""Adapters without what other tasks' inputs excite, against the projection of dense updates."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from support.make import write_adapter
from support.tasks import TARGETS, Small, batches, moments, small, texts, without
from support.trained import trained
from torch import Tensor

import domerge_fast as dm
from domerge_fast import AdapterError, OptionError, OutputError

NAMES = [f"layers.{k}.{last}" for k in range(2) for last in TARGETS]


@pytest.fixture(scope="module")
def model() -> Small:
    return small()


@pytest.fixture(scope="module")
def features(model: Small) -> dict[str, Tensor]:
    return dm.osrm_features(model, batches(), task="a", target_modules=TARGETS)


@pytest.fixture(scope="module")
def adapter(model: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "trained"
    return trained(model, 5, folder, target_modules=TARGETS)


def dense(adapter: dm.Adapter, name: str) -> Tensor:
    a, b = adapter.factors(name)
    return adapter.modules[name].scaling * b.double() @ a.double()


def leading(c: Tensor, energy: float) -> Tensor:
    values, vectors = torch.linalg.eigh(c.double())
    k = int((values.flip(0).cumsum(0) / values.sum() < energy).sum()) + 1
    return vectors[:, -k:]


def test_features_are_the_mean_over_tasks_by_layer(model, features):
    assert list(features) == NAMES
    for name, c in features.items():
        expected = moments(model, name, without("a")) / 2
        torch.testing.assert_close(c.double(), expected, atol=1e-6 * expected.trace(), rtol=0)
    assert features["layers.0.q_proj"] is features["layers.0.v_proj"]
    parts = dm.osrm_features(model, without("a"), target_modules=TARGETS, max_memory=1)
    assert all(parts[name].equal(c) for name, c in features.items())


@pytest.mark.parametrize("energy", [None, 0.5, 0.99])
def test_the_update_loses_the_directions_that_hold_the_energy(adapter, features, energy):
    made = dm.osrm_project(adapter, features, energy=energy)
    before = dm.load(adapter)
    kept = norms = 0.0
    for name, c in features.items():
        v, tau, less = leading(c, energy or 0.9), dense(before, name), dense(made.adapter, name)
        expected = tau - tau @ v @ v.T
        assert (less - expected).norm() < 1e-6 * tau.norm()
        module = made.modules[name]
        assert module.off == v.shape[1]
        assert module.kept == pytest.approx(float(expected.norm() ** 2 / tau.norm() ** 2))
        kept, norms = kept + float(expected.norm() ** 2), norms + float(tau.norm() ** 2)
        for moved, update in ((module.before, tau), (module.after, expected)):
            share = (update @ c.double() @ update.T).trace() / c.double().trace()
            expected_share = float(share * len(c) / update.norm() ** 2)
            assert moved == pytest.approx(expected_share, rel=1e-3, abs=1e-6)
        assert module.after < module.before
    assert made.kept == pytest.approx(kept / norms)
    assert made.path is None


def test_it_is_merged_as_any_adapter(adapter, features, tmp_path):
    other = write_adapter(
        tmp_path / "other",
        {n: dm.load(adapter).factors(n) for n in NAMES},
        base_model_name_or_path=None,
    )
    made = dm.osrm_project(adapter, features, k=3)
    merged = dm.merge([made.adapter, other], "linear")
    for name in NAMES:
        expected = dense(made.adapter, name) + dense(dm.load(other), name)
        assert (merged.delta(name).double() - expected).norm() < 1e-6 * expected.norm()


def test_what_is_written_is_what_is_in_memory_and_loads_in_peft(model, adapter, features, tmp_path):
    made = dm.osrm_project(adapter, features, k=3, output=tmp_path / "out")
    assert made.path == tmp_path / "out"
    again = dm.load(made.path)
    for name in NAMES:
        for x, y in zip(again.factors(name), made.adapter.factors(name), strict=True):
            assert x.equal(y)
        assert again.modules[name].scaling == dm.load(adapter).modules[name].scaling == 2.0
    base = Small()
    base.load_state_dict(model.state_dict())
    plain = base.eval()(texts(1))
    ready = peft.PeftModel.from_pretrained(base, made.path).merge_and_unload()
    for name in NAMES:
        moved = ready.get_submodule(name).weight - model.get_submodule(name).weight
        torch.testing.assert_close(moved.double(), dense(again, name), atol=1e-6, rtol=1e-4)
    assert not torch.equal(ready(texts(1)), plain)
    with pytest.raises(OutputError, match="exists already"):
        dm.osrm_project(adapter, features, k=3, output=tmp_path / "out")
    with pytest.raises(OutputError, match="is the adapter to project"):
        dm.osrm_project(adapter, features, k=3, output=adapter, force=True)


def test_what_is_saved_whole_comes_along(model, features, tmp_path):
    folder = trained(
        model, 5, tmp_path / "whole", target_modules=TARGETS, modules_to_save=["experts.0"]
    )
    made = dm.osrm_project(folder, features, k=3, output=tmp_path / "out")
    before, after = dm.load(folder).carried, dm.load(made.path).carried
    assert before.keys() == after.keys() != set()
    assert all(x.read().equal(after[key].read()) for key, x in before.items())


def test_dtypes_stay(features, tmp_path):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 48, generator=generator).bfloat16()
    b = torch.randn(48, 2, generator=generator).half()
    given = dm.from_tensors({"layers.0.q_proj": (a, b)})
    made = dm.osrm_project(given, features, k=3)
    less, same = made.adapter.factors("layers.0.q_proj")
    assert (less.dtype, same.dtype) == (torch.bfloat16, torch.float16)
    assert same.equal(b)


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"energy": 0.9, "k": 2}, "one of both"),
        ({"energy": 1.0}, "no share"),
        ({"k": 0}, "too small"),
        ({"k": 8}, "leaves nothing of 'layers.0.down'"),
        ({"features": []}, "are a list"),
        ({"features": {}}, "have nothing of layers.0.down"),
    ],
)
def test_what_does_not_fit_is_refused(adapter, features, tmp_path, changed, part):
    with pytest.raises(OptionError, match=part):
        dm.osrm_project(adapter, **{"features": features, "output": tmp_path / "out", **changed})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c[:, :5],
        lambda c: c.long(),
        lambda c: c * torch.nan,
        lambda c: c.triu(),
        lambda c: 0 * c,
        lambda c: -c,
        lambda c: c.tolist(),
    ],
)
def test_features_that_are_none_are_refused(adapter, features, damage):
    wrong = {**features, "layers.1.q_proj": damage(features["layers.1.q_proj"])}
    with pytest.raises(OptionError, match=r"layers.1.q_proj"):
        dm.osrm_project(adapter, wrong)


def test_what_is_no_update_of_linear_layers_is_refused(model, features, tmp_path):
    dora = trained(model, 1, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(AdapterError, match="is a DoRA"):
        dm.osrm_project(dora, features)
    embedding = trained(model, 1, tmp_path / "embedding", target_modules=["embed", "q_proj"])
    with pytest.raises(AdapterError, match=r"'embed'.*no linear layer"):
        dm.osrm_project(embedding, features)
    fresh = dm.from_tensors({"layers.0.q_proj": (torch.ones(2, 48), torch.zeros(48, 2))})
    with pytest.raises(AdapterError, match="has not been trained"):
        dm.osrm_project(fresh, features)
    damaged = dm.from_tensors(
        {"layers.0.q_proj": (torch.ones(2, 48), torch.full((48, 2), torch.inf))}
    )
    with pytest.raises(AdapterError, match="NaN or an infinite"):
        dm.osrm_project(damaged, features)
    v = leading(features["layers.0.q_proj"], 0.9)[:, -1:].T.float()
    along = dm.from_tensors({"layers.0.q_proj": (v, torch.ones(48, 1))})
    with pytest.raises(AdapterError, match="nothing is left"):
        dm.osrm_project(along, features)
