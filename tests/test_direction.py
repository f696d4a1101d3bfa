"""Adapters held against another one's update, and what is left of them without it."""

from __future__ import annotations

import json

import pytest
import torch
from support.close import distance
from support.make import random_factors, write_adapter

import domerge_fast as dm
from domerge_fast.cli import main as cli

SHAPES = {"layers.0.q": (24, 32), "layers.1.q": (24, 32), "layers.0.up[x]": (40, 24)}


def written(folder, name, seed, rank=4, shapes=SHAPES, **config):
    return write_adapter(folder / name, random_factors(shapes, rank, seed=seed), **config)


def delta(path, name):
    adapter = dm.load(path)
    if name not in adapter.modules:
        return None
    a, b = adapter.factors(name)
    return adapter.modules[name].scaling * b.double() @ a.double()


def cosine(x, y):
    return float((x * y).sum() / (x.norm() * y.norm()))


@pytest.fixture
def adapters(tmp_path):
    few = {n: s for n, s in SHAPES.items() if n != "layers.1.q"}
    paths = [
        written(tmp_path, "a", 1, lora_alpha=9),
        written(tmp_path, "b", 2, rank=3, shapes=few),
    ]
    # Along "a" in part, so that there is something to find.
    a, other = random_factors(SHAPES, 4, seed=1), random_factors(SHAPES, 2, seed=3)
    both = {
        n: (torch.cat([a[n][0], other[n][0]]), torch.cat([0.5 * a[n][1], other[n][1]], 1))
        for n in few
    }
    return paths, write_adapter(tmp_path / "direction", both, lora_alpha=3)


def test_cosines_are_those_of_the_dense_updates(adapters):
    paths, direction = adapters
    found = dm.inspect(paths, against=direction).direction
    assert list(found.modules) == sorted(n for n in SHAPES if n != "layers.1.q")
    for name, row in found.modules.items():
        wanted = [cosine(delta(p, name), delta(direction, name)) for p in paths]
        assert row == pytest.approx(wanted, abs=1e-12)
    whole = [
        torch.cat([delta(p, n).flatten() if delta(p, n) is not None else torch.zeros(
            SHAPES[n][0] * SHAPES[n][1]) for n in SHAPES])
        for p in (*paths, direction)
    ]  # fmt: skip
    assert found.cosine == pytest.approx([cosine(x, whole[-1]) for x in whole[:-1]], abs=1e-12)
    assert found.cosine[0] > 0.2
    plain = dm.inspect(paths)
    assert plain.direction is None
    assert plain.cosine == dm.inspect(paths, against=direction).cosine


def test_what_is_projected_out_leaves_the_rest(adapters, tmp_path):
    paths, direction = adapters
    dm.project_out(paths[0], direction, output=tmp_path / "out")
    for name in SHAPES:
        was, along, now = (delta(p, name) for p in (paths[0], direction, tmp_path / "out"))
        wanted = was if along is None else was - (was * along).sum() / along.square().sum() * along
        assert distance(now, wanted) < 1e-6
    left = dm.inspect([tmp_path / "out"], against=direction).direction
    assert all(abs(x) < 1e-6 for row in left.modules.values() for x in row)


def test_modules_of_the_direction_alone_are_none_of_the_adapter_s(adapters, tmp_path):
    paths, _ = adapters
    dm.project_out(paths[1], paths[0], output=tmp_path / "out")
    assert sorted(dm.load(tmp_path / "out").modules) == sorted(dm.load(paths[1]).modules)


@pytest.mark.parametrize("name", ["scale", "weights", "method", "rules"])
def test_what_follows_from_the_direction_cannot_be_said(adapters, name):
    paths, direction = adapters
    with pytest.raises(dm.OptionError, match="follows from the direction"):
        dm.project_out(paths[0], direction, **{name: 1})


def test_a_direction_of_another_model_is_refused(adapters, tmp_path):
    paths, _ = adapters
    other = written(tmp_path, "other", 5, shapes={"visual.0.k": (8, 8)})
    with pytest.raises(dm.DomergeError, match="no module that one of the adapters has"):
        dm.inspect(paths, against=other)


def test_the_command_shows_them(adapters, capsys):
    paths, direction = adapters
    asked = ["inspect", *map(str, paths), "--against", str(direction)]
    assert cli.main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["direction"]
    assert found["modules"]["layers.0.q"][0] > 0.2
    assert cli.main(asked) == 0
    shown = capsys.readouterr().out
    assert "cosine with" in shown
    assert "layers.0.up[x]" in shown
