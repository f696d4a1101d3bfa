"""Initial adapters of OSRM, against their definitions in float64."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from support.tasks import (
    TARGETS,
    TOKENS,
    N,
    Small,
    batches,
    energy,
    inputs,
    moments,
    rows,
    small,
    texts,
    without,
)
from torch import Tensor

import domerge_fast as dm
from domerge_fast import DomergeError, OptionError, OutputError


@pytest.fixture(scope="module")
def model() -> Small:
    return small()


def names() -> list[str]:
    return [f"layers.{k}.{last}" for k in range(2) for last in TARGETS]


def test_the_smallest_eigenvectors_see_least_of_the_others(model, tmp_path):
    given = {"task": "a", "target_modules": TARGETS, "rank": 4, "avoid": "smallest"}
    made = dm.osrm_init(model, batches(), output=tmp_path / "init", **given)
    assert list(made.modules) == names()
    assert made.tokens == {"b": 7 * TOKENS, "c": 7 * TOKENS}
    for name in names():
        c, a = moments(model, name, without("a")), rows(made.path, name)
        least = torch.linalg.eigvalsh(c)[:4].sum() / c.trace()
        assert energy(a, c) <= least + 4e-6
        torch.testing.assert_close(a @ a.T, torch.eye(4).double(), atol=1e-6, rtol=0)
        n, module = len(c), made.modules[name]
        assert module.others == pytest.approx(float(energy(a, c)) * n / 4, abs=1e-4)
        own = moments(model, name, {"a": batches()["a"]})
        assert module.own == pytest.approx(float(energy(a, own)) * n / 4, rel=1e-3, abs=1e-4)
        assert module.others < (0.1 if n == N else 0.3)
    b = load_file(made.path / "adapter_model.safetensors")
    assert not any(x.any() for key, x in b.items() if "lora_B" in key)


def test_project_is_orthogonal_to_the_fewest_that_hold_the_energy(model, tmp_path):
    made = dm.osrm_init(
        model,
        without("b"),
        task="b",
        target_modules=["layers.0.q_proj"],
        rank=4,
        energy=0.9,
        output=tmp_path / "init",
    )
    c, a = moments(model, "layers.0.q_proj", without("b")), rows(made.path, "layers.0.q_proj")
    values, vectors = torch.linalg.eigh(c)
    k = int((values.flip(0).cumsum(0) / c.trace() < 0.9).sum()) + 1
    assert made.modules["layers.0.q_proj"].off == k
    assert made.modules["layers.0.q_proj"].own is None
    assert (a @ vectors[:, -k:]).norm() < 1e-5
    assert energy(a, c) < 0.1
    torch.testing.assert_close(a @ a.T, torch.eye(4).double(), atol=1e-6, rtol=0)


def test_means_are_those_of_the_authors(model, tmp_path):
    made = dm.osrm_init(
        model,
        batches(),
        task="c",
        target_modules=["layers.1.q_proj"],
        rank=4,
        statistic="mean",
        output=tmp_path / "init",
    )
    means = [inputs(model, "layers.1.q_proj", own).mean(0) for own in without("c").values()]
    a = rows(made.path, "layers.1.q_proj")
    assert (a @ torch.stack(means).T).norm() < 1e-5 * torch.stack(means).norm()
    assert made.modules["layers.1.q_proj"].off == 2
    assert made.others is None
    c = moments(model, "layers.1.q_proj", without("c"))
    assert energy(a, c) > 1e-3  # what is not the mean is let through


def test_all_tasks_in_one_are_those_one_by_one(model, tmp_path):
    given = {"target_modules": TARGETS, "rank": 4, "seed": 3, "energy": 0.8}
    made = dm.osrm_init_all(model, batches(), output=tmp_path / "all", **given)
    assert list(made) == ["a", "b", "c"]
    for task, found in made.items():
        one = dm.osrm_init(model, batches(), task=task, output=tmp_path / task, **given)
        assert found.path == tmp_path / "all" / task
        assert found.modules == one.modules
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (found.path / file).read_bytes() == (one.path / file).read_bytes()


@pytest.mark.parametrize("avoid", ["smallest", "project"])
def test_one_pass_an_input_is_as_good_as_one_for_all(model, tmp_path, avoid):
    given = {"task": "a", "target_modules": TARGETS, "rank": 4, "avoid": avoid, "energy": 0.8}
    whole = dm.osrm_init(model, batches(), output=tmp_path / "whole", **given)
    parts = dm.osrm_init(model, batches(), output=tmp_path / "parts", max_memory=1, **given)
    assert whole.modules == parts.modules
    file = "adapter_model.safetensors"
    assert (whole.path / file).read_bytes() == (parts.path / file).read_bytes()


def test_a_seed_decides_what_is_left_open(model, tmp_path):
    """A few tokens leave most directions without energy."""
    few = {"a": [texts(0)], "b": [texts(1, 1, 6)]}
    given = {"task": "a", "target_modules": ["q_proj"], "rank": 4}
    folders = [tmp_path / str(k) for k in range(3)]
    for folder, seed in zip(folders, (0, 0, 1)):
        dm.osrm_init(model, few, output=folder, seed=seed, **given)
    one, other = (rows(folders[k], "layers.0.q_proj") for k in (0, 2))
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert files[0] == files[1]
    assert (one @ other.T).norm() < 0.8 * 2
    c = moments(model, "layers.0.q_proj", {"b": few["b"]})
    for a in (one, other):
        assert energy(a, c) < 1e-6
    assert (one @ rows(folders[0], "layers.1.q_proj").T).norm() < 0.8 * 2


def test_tasks_do_not_start_alike_where_there_is_a_choice(model, tmp_path):
    """Adapters whose A's are nearly one another's are hard to merge."""
    few = {task: [texts(k, 1, 6)] for k, task in enumerate("abc")}
    given = {"target_modules": ["q_proj"], "rank": 4}
    made = dm.osrm_init_all(model, few, output=tmp_path / "all", **given)
    a, b = (rows(made[task].path, "layers.0.q_proj") for task in "ab")
    assert (a @ b.T).square().sum() / 4 < 0.4


def test_padding_makes_no_difference(model, tmp_path):
    plain = {"a": [texts(0)], "b": [texts(1, 4, 6), texts(1, 4, 9)]}
    padded = torch.zeros(8, 14, dtype=torch.long)
    mask = torch.zeros(8, 14, dtype=torch.long)
    for k, own in enumerate(plain["b"]):
        padded[4 * k : 4 * k + 4, : own.shape[1]] = own
        mask[4 * k : 4 * k + 4, : own.shape[1]] = 1
    with_padding = {"a": [texts(0)], "b": [{"input_ids": padded, "attention_mask": mask}]}
    given = {"task": "a", "target_modules": ["q_proj"], "rank": 4}
    found = []
    for folder, own in (("plain", plain), ("padded", with_padding)):
        found.append(dm.osrm_init(model, own, output=tmp_path / folder, energy=0.9, **given))
    assert found[0].tokens == found[1].tokens == {"b": 60}
    for name in found[0].modules:
        a, b = (rows(made.path, name) for made in found)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_every_task_counts_the_same(model, tmp_path):
    """However many tokens it has, and however large its inputs are."""
    given = {"task": "a", "target_modules": ["q_proj"], "rank": 4}
    found = []
    for folder, times in (("one", 1), ("many", 6)):
        own = {"b": batches()["b"], "c": times * batches()["c"]}
        found.append(dm.osrm_init(model, own, output=tmp_path / folder, energy=0.9, **given))
    for name in found[0].modules:
        a, b = (rows(made.path, name) for made in found)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_peft_loads_it_and_trains_from_it(model, tmp_path):
    given = {"rank": 4, "alpha": 6, "norm": "kaiming", "energy": 0.8}
    made = dm.osrm_init(
        model, batches(), task="a", target_modules=TARGETS, output=tmp_path / "init", **given
    )
    base = Small()
    base.load_state_dict(model.state_dict())
    before = base(texts(0))
    ready = peft.PeftModel.from_pretrained(base, made.path, is_trainable=True)
    trained = {name: x for name, x in ready.named_parameters() if x.requires_grad}
    assert len(trained) == 2 * len(names())
    layer = ready.get_submodule("base_model.model.layers.0.q_proj")
    a = layer.lora_A["default"].weight
    torch.testing.assert_close(a.double(), rows(made.path, "layers.0.q_proj"), atol=0, rtol=0)
    torch.testing.assert_close(a.norm(dim=1), torch.full((4,), 3**-0.5))
    assert layer.scaling["default"] == 1.5
    torch.testing.assert_close(ready(texts(0)), before)
    ready(texts(0)).square().sum().backward()
    assert all(x.grad.any() for name, x in trained.items() if "lora_B" in name)
    assert dm.load(made.path).modules["layers.0.q_proj"].scaling == 1.5


def test_the_model_is_as_it_was(model, tmp_path):
    model.layers[0].q_proj.eval()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    given = {"task": "a", "target_modules": TARGETS, "rank": 4, "energy": 0.8}
    dm.osrm_init(model, batches(), output=tmp_path / "init", **given)
    assert [m for m in model.modules() if not m.training] == [model.layers[0].q_proj]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(x.equal(model.state_dict()[name]) for name, x in state.items())
    assert torch.is_grad_enabled()
    model.train()


CALL = {"task": "a", "target_modules": ["q_proj"], "rank": 4}


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"target_modules": ["experts.1"]}, "no token of task 'a' reaches 1 layers"),
        ({"target_modules": ["experts.1", "q_proj"]}, "no token of task 'a' reaches 1 layers"),
        ({"target_modules": ["q_proj", "w_proj"]}, "no layers called w_proj"),
        ({"target_modules": ["embed"]}, "no linear layer"),
        ({"target_modules": "all-linear"}, "name them"),
        ({"target_modules": "("}, "no regular expression"),
        ({"target_modules": []}, "no list of names"),
        ({"target_modules": "nothing"}, "names none of its layers"),
        ({"rank": 49}, "more than the 48 inputs"),
        ({"rank": 0}, "too small"),
        ({"alpha": 0}, "leaves nothing"),
        ({"avoid": "largest"}, "not known"),
        ({"energy": 1.0}, "no share"),
        ({"energy": 0.9999999, "rank": 48}, "leaves less than 48"),
        ({"statistic": "median"}, "not known"),
        ({"norm": "none"}, "not known"),
    ],
)
def test_what_does_not_fit_is_refused(model, tmp_path, changed, part):
    with pytest.raises(DomergeError, match=part.replace("(", r"\(")):
        dm.osrm_init(model, batches(), output=tmp_path / "out", **{**CALL, **changed})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({}, "name no task"),
        ({"a": [texts(0)]}, "of 'a' alone"),
        ({"a": [texts(0)], "b": []}, "'b' has none"),
        ({"a": [texts(0)], "b": texts(1)}, "are no list"),
        ({"a": [texts(0)], "b": ["a text"]}, "a batch is a str"),
        (
            {"b": [{"input_ids": texts(0), "attention_mask": torch.ones(4, 1, 12, 12)}]},
            "the attention mask",
        ),
    ],
)
def test_batches_that_are_none_are_refused(model, tmp_path, given, part):
    with pytest.raises(OptionError, match=part):
        dm.osrm_init(model, given, output=tmp_path / "out", **CALL)
    assert not any(tmp_path.iterdir())


def test_padding_that_cannot_be_told_is_refused(model, tmp_path):
    class Packed(Small):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids[attention_mask.bool()][None])

    mask = torch.ones(4, 12, dtype=torch.long)
    mask[0, 5:] = 0
    given = {"b": [{"input_ids": texts(1), "attention_mask": mask}]}
    with pytest.raises(DomergeError, match="are padding cannot be told"):
        dm.osrm_init(Packed(), given, output=tmp_path / "out", **CALL)
    assert not any(tmp_path.iterdir())


def test_damaged_and_odd_models_are_refused(tmp_path):
    made = Small()
    with torch.no_grad():
        made.layers[1].up.weight[0] = torch.nan
    call = {**CALL, "target_modules": ["down"]}
    with pytest.raises(DomergeError, match=r"layers.1.down.*NaN"):
        dm.osrm_init(made, batches(), output=tmp_path / "out", **call)
    made = Small()
    made.layers[1].q_proj = made.layers[0].q_proj
    with pytest.raises(OptionError, match="are one layer"):
        dm.osrm_init(made, batches(), output=tmp_path / "out", **CALL)
    ready = peft.get_peft_model(Small(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(OptionError, match="has adapters already"):
        dm.osrm_init(ready, batches(), output=tmp_path / "out", **CALL)
    made = Small()
    with torch.no_grad():
        made.embed.weight.zero_()
    with pytest.raises(DomergeError, match="always zero on task"):
        dm.osrm_init(
            made,
            batches(),
            output=tmp_path / "out",
            **{**CALL, "target_modules": r"layers\.0\.q_proj"},
        )
    assert not any(tmp_path.iterdir())


def test_layers_that_share_an_input_on_some_batches_alone_are_refused(tmp_path):
    class Odd(Small):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            other = x if len(x) == 4 else 2 * x
            return self.layers[0].q_proj(x)[..., :20] + self.layers[0].v_proj(other)

    call = {**CALL, "target_modules": ["layers.0.q_proj", "layers.0.v_proj"]}
    with pytest.raises(DomergeError, match="something else on others"):
        dm.osrm_init(Odd(), batches(), output=tmp_path / "out", **call)
    dm.osrm_init(Odd(), {"b": [texts(1)]}, output=tmp_path / "out", **call)


def test_what_is_there_stays_unless_it_is_to_be_replaced(model, tmp_path):
    out = tmp_path / "out"
    dm.osrm_init(model, batches(), output=out, **CALL)
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        dm.osrm_init(model, batches(), output=out, seed=1, **CALL)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    dm.osrm_init(model, batches(), output=out, seed=1, overwrite=True, **CALL)
    assert (out / "adapter_model.safetensors").read_bytes() != before
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None


@pytest.mark.parametrize("task", ["a/b", "..", "a\\b", "a\0"])
def test_a_task_that_cannot_name_a_folder_is_refused(model, tmp_path, task):
    given = {task: [texts(0)], "c": [texts(1)]}
    with pytest.raises(OptionError, match="cannot name a folder"):
        dm.osrm_init_all(model, given, target_modules=["q_proj"], output=tmp_path / "all")
    assert not any(tmp_path.iterdir())
