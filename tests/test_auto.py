"""What `auto` takes, what it says of it, and that this is what it does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.close import assert_close
from support.files import load_bytes
from support.make import Factors, random_factors, write_adapter
from support.merges import dense

import domerge_fast as dm
from domerge_fast import ops
from domerge_fast.adapters import Adapter
from domerge_fast.adapters.plan import Plan
from domerge_fast.cli import main as cli
from domerge_fast.formats import from_tensors
from domerge_fast.methods import auto

SHAPES = {f"layers.{i}.q_proj": (24, 40) for i in range(12)}
GENTLE, FAR = 0.002, 0.2
"""Of B: ρ is about .03 and 3."""


def drawn(
    count: int = 3, size: float = GENTLE, one_init: bool = False, ranks: tuple[int, ...] = (4, 2, 3)
) -> list[Factors]:
    """Factors of every adapter, whose A's are a little trained from one draw or from many."""
    found = []
    for k in range(count):
        factors = random_factors(SHAPES, ranks[k % len(ranks)], seed=k + 1)
        if one_init:
            start = random_factors(SHAPES, max(ranks), seed=0)
            factors = {n: (start[n][0][: len(a)] + 0.3 * a, b) for n, (a, b) in factors.items()}
        found.append({name: (a, size * b) for name, (a, b) in factors.items()})
    return found


def given(factors: list[Factors]) -> list[Adapter]:
    return [from_tensors(x, name=f"adapter-{k}") for k, x in enumerate(factors)]


GENTLY = (
    r"auto took tsvm with power=0\.5, then svc: the updates are about [\d.e-]+ times as large as "
    r"the weights, trained gently"
)
REGIMES: dict[str, tuple[Callable[[], list[Factors]], str, str, dict[str, Any]]] = {
    "apart": (drawn, GENTLY, "tsvm", {"power": 0.5, "post": ["svc"]}),
    "one init": (lambda: drawn(one_init=True), GENTLY, "tsvm", {"power": 0.5, "post": ["svc"]}),
    "far": (
        lambda: drawn(size=FAR),
        r"auto took do: the updates are about [\d.e+]+ times as large as the weights, trained far",
        "do",
        {},
    ),
}
every_regime = pytest.mark.parametrize("regime", REGIMES)


def same_bytes(one: dm.Merged, other: dm.Merged) -> bool:
    pairs = ((one.factors(name), other.factors(name)) for name in one.names)
    return all(torch.equal(x, y) for pair in pairs for x, y in zip(*pair, strict=True))


def note(merged: dm.Merged) -> str:
    (said,) = [note for note in merged.report.notes if note.startswith("auto took ")]
    return said


@every_regime
@pytest.mark.parametrize("options", [{}, {"scale": 2.0}, {"rank": 3}, {"energy": 0.7}], ids=str)
def test_what_is_taken_is_said_and_done(regime, options):
    make, words, method, theirs = REGIMES[regime]
    adapters = given(make())
    found = dm.merge(adapters, **options)
    assert re.fullmatch(words, note(found))
    expected = dm.merge(adapters, method, **{"scale": "auto", **options, **theirs})
    assert same_bytes(found, expected)
    assert (found.report.scale, found.report.scales) == (
        expected.report.scale,
        expected.report.scales,
    )
    assert (found.report.recipe.scale == "auto") == ("scale" not in options)
    assert found.report.recipe.method == "auto"


@every_regime
def test_weights_are_those_of_what_is_taken(regime):
    make, words, method, theirs = REGIMES[regime]
    adapters, weights = given(make()), [1.0, -0.5, 0.0]
    found = dm.merge(adapters, weights=weights)
    assert re.fullmatch(words, note(found))
    expected = dm.merge(adapters, method, weights=weights, scale="auto", **theirs)
    assert same_bytes(found, expected)


@every_regime
@pytest.mark.parametrize("scale", [None, 2.0, -1e12])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 3.0, -0.5], [1e20, 1e20, -1e20]])
def test_a_module_of_one_adapter_is_its_update(regime, scale, weights):
    make, words, *_ = REGIMES[regime]
    factors = make()
    a, b = factors[2].popitem()[1]
    factors[2]["own"] = a, b
    found = dm.merge(given(factors), weights=weights, scale=scale)
    assert re.fullmatch(words, note(found))
    expected = weights[2] * (scale or 1.0) * (b.double() @ a.double())
    assert_close(dense(found, "own"), expected, 1e-6)


@pytest.mark.parametrize("size", [GENTLE, FAR])
@pytest.mark.parametrize("weight", [1.0, -2.0])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_one_adapter_and_adapters_that_share_nothing_come_back(size, weight, scale):
    factors = drawn(2, size)
    for k, names in ((0, [*SHAPES][:5]), (1, [*SHAPES][5:])):
        factors[k] = {name: factors[k][name] for name in names}
    for chosen in ([factors[0]], factors):
        found = dm.merge(given(chosen), weights=[weight] * len(chosen), scale=scale)
        assert note(found) == "auto took the updates as they are: none share a module"
        assert found.report.scale == (scale or 1.0)
        for own in chosen:
            for name, (a, b) in own.items():
                expected = weight * (scale or 1.0) * (b.double() @ a.double())
                assert_close(dense(found, name), expected, 1e-6, name=name)


@every_regime
def test_the_order_of_modules_does_not_matter(regime):
    make, *_ = REGIMES[regime]
    factors = make()
    for name in [*SHAPES][::3]:  # modules that are not like the others
        a, b = factors[0][name]
        factors[1][name] = a.clone(), 3 * b
    turned = [{name: x[name] for name in reversed(x)} for x in factors]
    one, other = (dm.merge(given(x)) for x in (factors, turned))
    assert note(one) == note(other)
    assert one.report.scale == other.report.scale
    for name in SHAPES:
        assert_close(dense(other, name), dense(one, name), 1e-5, name=name)


def test_eight_modules_of_64_adapters_are_looked_at(monkeypatch):
    seen = []

    def counted(sides: list, **options: Any) -> list:
        seen.append([len(side.blocks) for side in sides])
        return ops.block_gram(sides, **options)

    class Counted:
        block_gram = staticmethod(counted)

    monkeypatch.setitem(auto.norms.__globals__, "ops", Counted)
    plan = Plan.make(given(drawn(70, ranks=(1,))), [1.0] * 70)
    assert auto.taken(plan).what.startswith("auto took tsvm with power=0.5")
    assert seen == [[64] * 8] * 2


def test_adapters_of_zeros_are_no_reason():
    factors = drawn()
    zeros = [{name: (a, 0 * b) for name, (a, b) in x.items()} for x in factors]
    found = dm.merge(given(zeros))
    assert not any(dense(found, name).any() for name in SHAPES)
    with_nothing = [*factors, {name: (0 * a, 0 * b) for name, (a, b) in factors[0].items()}]
    assert "power=0.5" in note(dm.merge(given(with_nothing)))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_sizes_are_told_apart(size):
    factors = [{name: (size * a, b) for name, (a, b) in x.items()} for x in drawn()]
    expected = "auto took do" if size > 1 else "auto took tsvm with power=0.5"
    assert note(dm.merge(given(factors))).startswith(expected)


# What it is not


@pytest.mark.parametrize(
    "options",
    [{"method": "do", "directions": "auto"}, {"method": "knots", "inner": "auto"}],
    ids=str,
)
def test_it_does_not_work_inside_another(options):
    line = r"^option '(directions|inner)': 'auto' is not known; use one of: do, .*$"
    with pytest.raises(dm.OptionError, match=line):
        dm.merge(given(drawn()), **options)


def test_its_options_are_those_of_a_method_that_is_named():
    line = r"^option 'gamma': 'auto' takes a method as it is; name a method that has it, as 'do'$"
    with pytest.raises(dm.OptionError, match=line):
        dm.merge(given(drawn()), gamma=0.5)
    with pytest.raises(dm.OptionError, match=r"^option 'zzz': method 'auto' has no such option; "):
        dm.merge(given(drawn()), zzz=0.5)


# What is written


@every_regime
@pytest.mark.parametrize(
    "options", [{}, {"scale": 0.5}, {"rank": 2, "weights": [1, 2, 3]}], ids=str
)
def test_the_card_says_it_and_its_recipe_repeats_the_merge(regime, options, tmp_path, monkeypatch):
    make, words, *_ = REGIMES[regime]
    monkeypatch.chdir(tmp_path)
    folders = [write_adapter(tmp_path / f"{k}", x) for k, x in enumerate(make())]
    names = [folder.name for folder in folders]
    report = dm.merge(names, output="out", **options).report
    text = (tmp_path / "out/README.md").read_text()
    assert re.search(f"note .*{words}", text)
    if "scale" not in options:
        assert f"{report.scale:g}, found from the adapters" in text
    recipe = json.loads(re.search(r"```json\n(.*?)\n```", text, re.DOTALL).group(1))
    assert (recipe["method"], recipe["scale"]) == ("auto", options.get("scale", "auto"))
    dm.run(dm.Recipe.read("out", under="."), output="again")
    assert load_bytes(tmp_path / "again") == load_bytes(tmp_path / "out")


def test_the_command_line_takes_it_by_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for k, factors in enumerate(drawn(2)):
        write_adapter(tmp_path / f"{k}", factors)
    assert cli.main(["merge", "0", "1", "-o", "out"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    report = dm.merge(["0", "1"]).report
    assert f"scale {report.scale:g}, found from the adapters" in said
    assert "note auto took tsvm with power=0.5, then svc: the updates are about" in said
    assert cli.main(["merge", "0", "1", "-o", "out", "--overwrite", "--gamma", "0.5"]) == 2
    assert capsys.readouterr().err == (
        "domerge-fast: error: option 'gamma': 'auto' takes a method as it is; "
        "name a method that has it, as 'do'\n"
    )
