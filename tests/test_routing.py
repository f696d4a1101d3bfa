"""Clusters of queries, the merges that serve them, and where a query goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from support.make import random_factors, write_adapter
from torch import Tensor, nn

import domerge_fast as dm
from domerge_fast import DomergeError, OptionError, OutputError

NAN = float("nan")
D = 8
SHAPES = {"q_proj": (10, 12), "v_proj": (6, 12)}


def queries() -> Tensor:
    """Ten near one direction and six near another, which do not overlap; of any length."""
    generator = torch.Generator().manual_seed(0)
    near = 0.05 * torch.randn(16, D, generator=generator)
    near[:10, 0] += 1
    near[10:, 1] += 1
    return near * torch.linspace(0.5, 4, 16)[:, None]


def scores() -> Tensor:
    """Of four adapters: 0 and 2 are best on the first cluster, 3 and 1 on the second."""
    rows = torch.tensor([[0.8, 0.1, 0.6, 0.2], [0.1, 0.5, 0.0, 0.9]])
    return torch.cat([rows[:1].repeat(10, 1), rows[1:].repeat(6, 1)])


def fitted(**changed: object) -> dm.Router:
    return dm.Router.fit(queries(), **{"scores": scores(), "clusters": 2, **changed})


def cluster(router: dm.Router, axis: int) -> int:
    return int(router.centres[:, axis].argmax())


def adapters(folder: Path) -> list[Path]:
    return [
        write_adapter(folder / str(k), random_factors(SHAPES, 3, seed=k), lora_alpha=6)
        for k in range(4)
    ]


def test_two_separable_clusters_have_their_own_best_adapters():
    router = fitted()
    first, second = cluster(router, 0), cluster(router, 1)
    assert router.queries[first] == 10
    assert router.queries[second] == 6
    unit = torch.nn.functional.normalize(queries().double(), dim=1)
    expected = torch.nn.functional.normalize(unit[:10].mean(0), dim=0)
    torch.testing.assert_close(router.centres[first].double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(router.scores[first], scores()[0].double())
    kappa = router.coefficients(top=2)
    torch.testing.assert_close(kappa[first], torch.tensor([0.8, 0, 0.6, 0]).double() / 1.4)
    torch.testing.assert_close(kappa[second], torch.tensor([0, 0.5, 0, 0.9]).double() / 1.4)
    squared = router.coefficients(top=2, power=2.0)
    torch.testing.assert_close(squared[first], torch.tensor([0.64, 0, 0.36, 0]).double())
    places = router.coefficients(top=3, by="rank")
    expected = torch.tensor([1, 0, 1 / 2, 1 / 3]).double() * 6 / 11
    torch.testing.assert_close(places[first], expected)
    assert router.coefficients(top=1).tolist()[first] == [1, 0, 0, 0]


def test_merges_are_those_of_the_best_adapters_and_load_in_peft(tmp_path):
    folders = adapters(tmp_path)
    router, made = fitted().merge(folders, tmp_path / "served", method="tsvm", top=2)
    assert sorted(made) == ["cluster-00", "cluster-01"]
    for axis, best, weights in ((0, (0, 2), (0.8, 0.6)), (1, (1, 3), (0.5, 0.9))):
        name = router.names[cluster(router, axis)]
        share = [w / sum(weights) for w in weights]
        expected = dm.merge([folders[k] for k in best], "tsvm", weights=share)
        served = dm.load(tmp_path / "served" / name)
        for module in SHAPES:
            a, b = served.factors(module)
            torch.testing.assert_close(b @ a, expected.delta(module), atol=1e-5, rtol=1e-5)
        query = torch.zeros(D)
        query[axis] = 5.0
        [(found, chance)] = router.route(query)
        assert found == name
        assert 0.5 < chance < 1
        base = nn.ModuleDict({n: nn.Linear(k, m, bias=False) for n, (m, k) in SHAPES.items()})
        before = base["q_proj"].weight.clone()
        ready = peft.PeftModel.from_pretrained(base, tmp_path / "served" / name)
        moved = ready.merge_and_unload()["q_proj"].weight - before
        torch.testing.assert_close(moved, expected.delta("q_proj"), atol=1e-5, rtol=1e-5)


def test_clusters_with_the_same_adapters_share_a_folder(tmp_path):
    same = scores()
    same[10:] = same[0]
    router, made = fitted(scores=same).merge(adapters(tmp_path), tmp_path / "served", top=2)
    assert [*made] == ["cluster-00"]
    assert router.names == ("cluster-00", "cluster-00")
    [(name, chance)] = router.route(queries()[0], top=2)
    assert (name, chance) == ("cluster-00", pytest.approx(1.0))


def test_probabilities_are_a_softmax_over_cosines():
    router = fitted(beta=7.0)
    found = dict(router.route(queries()[3], top=2))
    unit = torch.nn.functional.normalize(queries()[3].double(), dim=0)
    chances = torch.softmax(7.0 * router.centres.double() @ unit, 0).tolist()
    assert list(found) == [router.names[cluster(router, 0)], router.names[cluster(router, 1)]]
    assert [found[name] for name in router.names] == pytest.approx(chances)
    assert router.route(7 * queries()[3], top=2) == [
        (name, pytest.approx(p)) for name, p in found.items()
    ]
    assert router.route(queries()[3].tolist()) == router.route(queries()[3].numpy())


def test_clusters_without_queries_are_left_out():
    """Four different points for six clusters."""
    points = torch.eye(4, D).repeat(3, 1)
    router = dm.Router.fit(points, torch.rand(12, 2), clusters=6, seed=1)
    assert router.queries == (3, 3, 3, 3)
    assert len(router.names) == len(router.coefficients(top=1)) == 4


def test_nan_is_not_run_and_no_score():
    table = scores()
    table[:5, 0] = NAN  # half of the first cluster: the mean is over the rest
    table[:5, 1] = 0.3
    table[5:10, 1] = NAN
    table[:10, 2] = NAN  # never there: not taken
    router = fitted(scores=table)
    first = cluster(router, 0)
    assert router.run[first].tolist() == [5, 5, 0, 10]
    torch.testing.assert_close(router.scores[first][:2], torch.tensor([0.8, 0.3]).double())
    kappa = router.coefficients(top=4)
    torch.testing.assert_close(kappa[first], torch.tensor([0.8, 0.3, 0, 0.2]).double() / 1.3)
    assert not kappa.isnan().any()


def test_a_cluster_where_none_was_run_goes_by_the_means_over_all():
    table = scores()
    table[:10] = NAN
    kappa = fitted(scores=table).coefficients(top=2)
    expected = torch.tensor([0, 0.5, 0, 0.9]).double() / 1.4
    torch.testing.assert_close(kappa, expected.repeat(2, 1))


def test_where_all_fail_all_that_were_run_count_the_same():
    table = scores()
    table[:10] = 0.0
    router = fitted(scores=table)
    assert router.coefficients(top=2)[cluster(router, 0)].tolist() == [0.5, 0.5, 0, 0]


def test_the_order_of_adapters_is_that_of_the_columns():
    turn = [2, 0, 3, 1]
    plain, turned = fitted(), fitted(scores=scores()[:, turn])
    torch.testing.assert_close(turned.coefficients(top=2), plain.coefficients(top=2)[:, turn])


@pytest.mark.parametrize("kind", [np.asarray, lambda x: x.tolist(), lambda x: x.half()])
def test_tables_may_be_arrays_lists_or_halves(kind):
    router = dm.Router.fit(kind(queries()), kind(scores()), clusters=2)
    assert router.queries == fitted().queries
    torch.testing.assert_close(router.centres, fitted().centres, atol=1e-3, rtol=0)


def test_the_same_seed_writes_the_same_files(tmp_path):
    generator = torch.Generator().manual_seed(1)
    points, table = torch.randn(200, 5, generator=generator), torch.rand(200, 3)
    table[table > 0.8] = NAN
    for name in "ab":
        dm.Router.fit(points, table, clusters=9, seed=4).save(tmp_path / name)
    for file in ("centres.safetensors", "router.json"):
        one, other = ((tmp_path / name / file).read_bytes() for name in "ab")
        assert one == other


def test_what_is_opened_is_what_was_saved(tmp_path):
    table = scores()
    table[:10, 2] = NAN
    router = fitted(scores=table, adapters=["maths", "código", "law", "x"], beta=5.0)
    router = router.serving(router.coefficients(top=2), names="served-{}")
    router.save(tmp_path / "router")
    again = dm.Router.open(tmp_path / "router")
    assert again.adapters == router.adapters
    assert again.names == router.names == ("served-0", "served-1")
    assert again.centres.equal(router.centres)
    assert again.coefficients(top=3).equal(router.coefficients(top=3))
    assert again.route(queries()[12], top=2) == router.route(queries()[12], top=2)
    with pytest.raises(OutputError, match="exists already"):
        router.save(tmp_path / "router")
    router.save(tmp_path / "router", overwrite=True)


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"clusters": 17}, "more than the 16 queries"),
        ({"clusters": 0}, "too small"),
        ({"seed": -1}, "too small"),
        ({"beta": 0}, "not positive"),
        ({"adapters": ["a", "b", "c", "a"]}, "are not 4 names"),
        ({"adapters": ["a"]}, "are not 4 names"),
        ({"scores": scores()[:5]}, "there are 16 queries"),
        ({"scores": scores()[:, 0]}, "there are 16 queries"),
        ({"scores": 2 * scores()}, "between 0 and 1"),
        ({"scores": -scores()}, "between 0 and 1"),
        ({"scores": torch.full((16, 2), NAN)}, "adapter 0 has none"),
        ({"scores": "good"}, "no table of numbers"),
    ],
)
def test_what_does_not_fit_is_refused(changed, part):
    with pytest.raises(OptionError, match=part):
        fitted(**changed)


@pytest.mark.parametrize("bad", [0.0, NAN, float("inf")])
def test_a_query_without_a_direction_is_refused(bad):
    points = queries()
    points[7] = bad
    with pytest.raises(OptionError, match="row 7"):
        dm.Router.fit(points, scores(), clusters=2)
    with pytest.raises(OptionError, match="embedding"):
        fitted().route(points[7])


def test_wrong_calls_of_a_router_are_refused(tmp_path):
    router = fitted()
    with pytest.raises(OptionError, match=r"give \[queries, 8\]"):
        router.route(torch.ones(9))
    with pytest.raises(OptionError, match="give one"):
        router.route(queries())
    with pytest.raises(OptionError, match="more than the 4 adapters"):
        router.coefficients(top=5)
    with pytest.raises(OptionError, match="in the order of the scores"):
        router.merge(adapters(tmp_path)[:3], tmp_path / "served")
    with pytest.raises(OptionError, match=r"give \[2, 4\]"):
        router.serving(torch.ones(2, 3))
    for names in ("cluster", "a/{}", "{x}", "{"):
        with pytest.raises(OptionError, match="names"):
            router.serving(router.coefficients(), names)
    assert not (tmp_path / "served").exists()


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    from domerge_fast.routing import clusters

    clusters._kmeans.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(DomergeError, match=r"pip install 'domerge-fast\[route\]'"):
        fitted()


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 2},
        {"names": ["a"]},
        {"names": [1, 2]},
        {"adapters": []},
        {"scores": [[1, 2, 3, 4]]},
        {"scores": [[1, 2, 3], [1, 2, 3]]},
        {"scores": [["1", 2, 3, 4], [1, 2, 3, 4]]},
        {"run": None},
        {"queries": [1]},
        {"overall": [None, 1, 1, 1]},
        {"beta": 0},
        {"beta": "3"},
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage):
    fitted().save(tmp_path / "router")
    file = tmp_path / "router" / "router.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **damage}))
    with pytest.raises(OptionError, match=r"router\.json"):
        dm.Router.open(tmp_path / "router")


def test_folders_that_are_no_router_are_refused(tmp_path):
    with pytest.raises(OptionError, match=r"router\.json"):
        dm.Router.open(tmp_path)
    fitted().save(tmp_path / "router")
    (tmp_path / "router" / "centres.safetensors").write_bytes(b"no")
    with pytest.raises(OptionError, match=r"centres\.safetensors"):
        dm.Router.open(tmp_path / "router")


@pytest.mark.parametrize("method", ["linear", "do"])
def test_coefficients_are_those_of_a_prepared_merge(tmp_path, method):
    """One pass over the factors for all clusters, of one rank; those that are alike once."""
    folders = adapters(tmp_path)
    points = torch.cat([queries(), torch.eye(D)[2:3].repeat(4, 1)])
    router = dm.Router.fit(points, torch.cat([scores(), scores()[:4]]), clusters=3)
    kappa = router.coefficients(top=2)
    router = router.serving(kappa)
    prepared = dm.prepare(folders, method, scale=1.0)
    names = [f"cluster-{k:02d}" for k in range(len(kappa))]
    prepared.save_many(kappa, tmp_path / "served", names=names, level="task", rank=8)
    assert {path.name for path in (tmp_path / "served").iterdir()} == set(router.names)
    assert len(set(router.names)) == 2
    for name, row in zip(router.names, kappa):
        served = dm.load(tmp_path / "served" / name)
        config = json.loads((tmp_path / "served" / name / "adapter_config.json").read_text())
        assert config["r"] == 8
        for module, (a, b) in prepared.merge(row).items():
            got_a, got_b = served.factors(module)
            left, right = got_b @ got_a, b @ a
            u, s, v = torch.linalg.svd(right.double(), full_matrices=False)
            best = (u[:, :8] * s[:8]) @ v[:8]
            assert (left - best).norm() < 1e-5 * best.norm()
        base = nn.ModuleDict({n: nn.Linear(k, m, bias=False) for n, (m, k) in SHAPES.items()})
        ready = peft.PeftModel.from_pretrained(base, tmp_path / "served" / name)
        assert ready.peft_config["default"].r == 8
