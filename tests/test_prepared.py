"""Merges that are prepared once: at any coefficients they are what `merge` makes with weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.close import assert_close
from support.make import write_adapter
from torch import Tensor

import domerge_fast as dm
from domerge_fast.methods import TABLE

SHAPES = {"q": (40, 48), "v": (24, 48), "down": (48, 64)}
MODULES = {f"layers.{k}.{name}": shape for k in range(2) for name, shape in SHAPES.items()}
LACKED = "layers.1.v"
WEIGHTS = [0.9, -0.4, 0.6]
METHODS = [name for name in TABLE if name != "auto"]
KINDS = {
    "gains": ("linear", "cat", "tsvm", "pico", "slerp", "multislerp", "core"),
    "rotated": ("ctm",),
    "scaled": ("do",),
}
IN_R_BY_R = {name: "rotated" for name, row in TABLE.items() if row.coefficients and not row.reduce}
KIND = IN_R_BY_R | {name: kind for kind, names in KINDS.items() for name in names}
"""By method what is prepared of it; of others the merge is made anew."""


def factors(rank: int, seed: int, names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, MODULES[name][1], generator=g) / 8,
            torch.randn(MODULES[name][0], rank, generator=g) / rank,
        )
        for name in names
    }


def adapters(count: int = 3, ranks: tuple[int, ...] = (4, 3, 4)) -> list[dm.Adapter]:
    """The last of three lacks a module."""
    found = []
    for k in range(count):
        names = [name for name in MODULES if k < 2 or name != LACKED]
        scales = dict.fromkeys(names, 0.7 + 0.3 * k)
        found.append(dm.from_tensors(factors(ranks[k], k, names), scales, name=f"a{k}"))
    return found


def inputs(method: str) -> tuple[list[dm.Adapter], list[float]]:
    if method == "slerp":
        return adapters(2), [0.3, 0.5]
    return adapters(ranks=(4, 4, 4) if method == "robust" else (4, 3, 4)), WEIGHTS


def merged(sources: list[dm.Adapter], method: str, **given: object) -> dm.Merged:
    dense = TABLE[method].dense and not TABLE[method].truncates
    return dm.merge(
        sources, method, **{"scale": 1.0, **given}, form="deltas" if dense else "adapter"
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_what_merge_makes_with_weights(method):
    sources, weights = inputs(method)
    p = dm.prepare(sources, method)
    assert p.kind == KIND.get(method, "tiles")
    found, expected = p.merge(weights), merged(sources, method, weights=weights)
    assert found.names == expected.names == p.modules
    for name in p.modules:
        assert_close(found.delta(name), expected.delta(name), 1e-6, name=name)


OPTIONS = [
    ("do", {"decouple": False}),
    ("do", {"renormalize": True}),
    ("do", {"orthogonalize": False}),
    ("do", {"sides": "A", "penalty": "frobenius"}),
    ("do", {"directions": "tsvm"}),
    ("tsvm", {"power": 0.5}),
    ("linear", {"power": 0.3}),
    ("svd", {"rank": 2}),
    ("wudi", {"ridge": 0.0}),
    ("core", {"inner": "iso_c"}),
    ("core", {"inner": "do"}),
    ("core", {"inner": "svd", "rank": 2}),
    ("core", {"inner": "ties", "density": 0.4}),
    ("core", {"inner": "ties", "conventions": "paper"}),
    ("core", {"inner": "dare", "seed": 3}),
    ("core", {"inner": "lego"}),
    ("core", {"inner": "robust"}),
    ("knots", {"inner": "tsvm"}),
    ("knots", {"inner": "linear"}),
    ("knots", {"inner": "linear", "pre": ["canonicalize"], "scale": 0.7}),
    ("ctm", {"inner": "linear", "rank": 3}),
    ("lego", {"clusters": 3}),
    ("iso_c", {"pre": ["canonicalize"]}),
    ("tsvm", {"pre": ["equalize"], "scale": -0.8}),
    ("do", {"scale": 0.3, "pre": ["smooth"]}),
    ("multislerp", {"scale": 2.0}),
    ("auto", {}),
    ("tsvm", {"post": ["svc"]}),
    ("iso_c", {"post": ["svc"], "scale": 0.7}),
    ("linear", {"post": ["svc"], "power": 0.5}),
]


@pytest.mark.parametrize(("method", "given"), OPTIONS)
def test_options_are_those_of_merge(method, given):
    sources, weights = inputs("robust" if given.get("inner") == "robust" else method)
    found = dm.prepare(sources, method, **given).merge(weights)
    expected = merged(sources, method, weights=weights, **given)
    for name in expected.names:
        assert_close(found.delta(name), expected.delta(name), 2e-6, name=name)


def test_coefficients_by_module_are_rules_with_weights():
    sources = adapters()
    kappa = torch.linspace(0.2, 1.5, 3 * len(MODULES)).view(-1, 3)
    for method in ("tsvm", "do", "iso_c", "ties"):
        p = dm.prepare(sources, method)
        rules = [{"modules": name, "weights": row} for name, row in zip(p.modules, kappa.tolist())]
        expected = merged(sources, method, rules=rules)
        found = p.merge(kappa)
        for name in p.modules:
            assert_close(found.delta(name), expected.delta(name), 1e-6, name=f"{method} {name}")


@pytest.mark.parametrize("method", ["linear", "tsvm", "do", "iso_c", "lego", "ties"])
def test_many_merges_are_each_what_one_is(method):
    p = dm.prepare(adapters(), method)
    kappas = torch.randn(3, len(MODULES), 3, generator=torch.Generator().manual_seed(4))
    for kappa, found in zip(kappas, p.merge_many(kappas)):
        one = p.merge(kappa)
        for name in p.modules:
            assert_close(found.delta(name), one.delta(name), 1e-6)


def test_a_scale_is_found_once_at_weights_of_one():
    sources = adapters()
    p = dm.prepare(sources, "tsvm", scale="auto")
    report = dm.merge(sources, "tsvm").report
    assert p.scale == report.scale
    assert p.scales == report.scales
    found = p.merge([1.0, 1.0, 1.0])
    expected = dm.merge(sources, "tsvm")
    for name in p.modules:
        assert_close(found.delta(name), expected.delta(name))


def test_auto_takes_what_merge_takes_and_leaves_single_updates_as_they_are():
    pairs = factors(3, 0, list(MODULES)), factors(3, 1, [n for n in MODULES if n != LACKED])
    for size in (0.02, 5.0):  # trained gently and far: calibrated tsvm, and do
        given = [
            dm.from_tensors({n: (a, size * b) for n, (a, b) in x.items()}, name=f"a{k}")
            for k, x in enumerate(pairs)
        ]
        p = dm.prepare(given, "auto")
        assert p.kind == ("rotated" if size < 1 else "scaled")
        for weights in ([0.5, 0.7], [2.0, 1.0]):
            expected = merged(given, "auto", weights=weights)
            found = p.merge(weights)
            for name in p.modules:
                assert_close(found.delta(name), expected.delta(name), 2e-6, name=name)


def test_gradients_go_through_a_calibration():
    p = dm.prepare(adapters(), "tsvm", post=["svc"], power=0.5)
    kappa = torch.tensor([0.9, 0.4, 0.6], dtype=torch.float64, requires_grad=True)

    def merge(kappa: Tensor) -> tuple[Tensor, ...]:
        found = p.merge(kappa, dtype="float64")
        return tuple(found.delta(name)[:2, :3] for name in ("layers.0.q", LACKED))

    assert torch.autograd.gradcheck(merge, (kappa,), atol=1e-6)


def test_what_is_not_prepared_is_refused():
    for method, given in (
        ("ties", {"post": ["svc"]}),
        ("linear", {"post": ["svc"]}),
        ("tsvm", {"post": ["norm_match"]}),
        ("tsvm", {"rank": 3}),
        ("tsvm", {"weights": [1, 1, 1]}),
        ("tsvms", {}),
    ):
        with pytest.raises(dm.OptionError) as error:
            dm.prepare(adapters(), method, **given)
        assert "\n" not in str(error.value)
    with pytest.raises(dm.OptionError, match="not a list"):
        dm.prepare("folder", "linear")


LAYERS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def test_coefficients_have_levels():
    p = dm.prepare(adapters(), "linear")
    assert p.layers == ("layers.0", "layers.1")
    task = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(p.expand(task), task.expand(6, 3))
    assert torch.equal(p.expand(LAYERS), LAYERS.repeat_interleave(3, 0))
    of_patterns = dict(zip(p.modules, p.expand({"*.q": [0, 0, 1.0], "*": [1, 2, 3]}).tolist()))
    assert of_patterns["layers.1.q"] == [0, 0, 1]
    assert of_patterns["layers.1.v"] == [1, 2, 3]
    assert p.expand(torch.ones(6, 11)).shape == (6, 11)
    assert p.expand(torch.ones(5, 3), "task").shape == (5, 6, 3)
    assert p.expand(torch.ones(5, 2, 3)).shape == (5, 6, 3)
    assert p.expand([[1, 2, 3]] * 6).dtype == torch.float64


def test_layers_are_in_the_order_of_their_numbers():
    names = [f"{stem}.{k}.q" for stem in ("b.layers", "a.layers") for k in (0, 10, 2)] + ["head"]
    f = {name: (torch.ones(1, 4), torch.ones(4, 1)) for name in names}
    p = dm.prepare([dm.from_tensors(f)], "linear")
    numbered = [f"{stem}.{k}" for stem in ("a.layers", "b.layers") for k in (0, 2, 10)]
    assert p.layers == (*numbered, "head")
    rows = p.expand(torch.arange(7.0)[:, None], "layer")[:, 0].tolist()
    assert [p.layers[int(k)] for k in rows] == [name.removesuffix(".q") for name in p.modules]


def test_directions_have_coefficients_of_their_own():
    sources = adapters()
    p = dm.prepare(sources, "linear")
    own = torch.rand(6, 11)
    for name, rows in zip(p.modules, own):
        a, b, at = [], [], 0
        for k, adapter in enumerate(sources):
            if name in adapter.modules:
                x, y = adapter.factors(name)
                a.append(x)
                b.append(y * (0.7 + 0.3 * k) * rows[at : at + len(x)])
                at += len(x)
        assert_close(p.merge(own).delta(name), torch.cat(b, 1) @ torch.cat(a))
    for method in ("tsvm", "iso_c", "pico"):
        p = dm.prepare(sources, method)
        of_rows = torch.tensor(WEIGHTS).repeat_interleave(torch.tensor([4, 3, 4]))
        short = torch.tensor([*WEIGHTS[:2], 0]).repeat_interleave(torch.tensor([4, 3, 4]))
        given = torch.stack([short if name == LACKED else of_rows for name in p.modules])
        if method == "pico":
            with pytest.raises(dm.OptionError, match="one coefficient an adapter"):
                p.merge(given)
            continue
        found, expected = p.merge(given), p.merge(WEIGHTS)
        for name in p.modules:
            assert_close(found.delta(name), expected.delta(name))


def test_joint_directions_have_coefficients_of_every_adapter(tmp_path):
    """Σ_i U diag(φ_i) S V_iᵀ of the joint singular vectors, dense; the same in a state."""
    sources = adapters(ranks=(2, 2, 2))
    p = dm.prepare(sources, "knots", inner="linear", scale=0.5)
    own = torch.rand(6, 18, generator=torch.Generator().manual_seed(0)) - 0.3
    p.state(tmp_path / "state")
    found, opened = p.merge(own), dm.Prepared.open(tmp_path / "state").merge(own)
    for name, row in zip(p.modules, own):
        taus = [
            a.modules[name].scaling * a.factors(name)[1] @ a.factors(name)[0]
            for a in sources
            if name in a.modules
        ]
        k = 2 * len(taus)
        u, s, vh = torch.linalg.svd(torch.cat(taus, 1).double(), full_matrices=False)
        parts = (s[:k, None] * vh[:k]).chunk(len(taus), 1)
        phi = row[: k * len(taus)].double().view(len(taus), k, 1)
        expected = sum(u[:, :k] @ (f * x) for f, x in zip(phi, parts))
        assert_close(found.delta(name), 0.5 * expected.float(), 1e-5, name=name)
        assert torch.equal(opened.delta(name), found.delta(name))
    report = p.save(own, tmp_path / "out").report
    assert any("single directions" in note for note in report.notes)
    kappa = own[:, :18].double().requires_grad_()
    merge = p.merge(kappa, dtype="float64")
    sum(merge.delta(name).square().sum() for name in p.modules).backward()
    assert kappa.grad.isfinite().all()
    assert (kappa.grad[0] != 0).all()


REFUSED = [
    ([1.0, 2.0], "give"),
    (torch.ones(5, 3), "give"),
    ([1.0, float("nan"), 1.0], "NaN"),
    ("abc", "no tensor of numbers"),
    ({"*.q": [1, 1, 1]}, "no pattern matches"),
    ({"*.x": [1, 1, 1]}, "matches no module"),
    ({"*": [1, 1]}, "give it 3 numbers"),
    (torch.ones(2, 6, 3), "merge_many"),
]


@pytest.mark.parametrize(("kappa", "words"), REFUSED)
def test_other_coefficients_are_refused(kappa, words):
    p = dm.prepare(adapters(), "linear")
    with pytest.raises(dm.OptionError, match=words) as error:
        p.merge(kappa)
    assert "\n" not in str(error.value)


COUNTED = ("tsvm", "core", "do", "iso_cts", "pico", "lego", "ctm")
"""Methods to whose merges an adapter with the coefficient 0 makes a difference."""


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_zero_is_as_absent_unless_the_method_counts_it(method):
    sources, weights = inputs(method)[0], [1.0, 0.0, 0.5]
    weights = weights[: len(sources)]
    found = dm.prepare(sources, method).merge(weights)
    without = merged(sources, method, weights=weights)
    for name in without.names:
        delta, other = found.delta(name), without.delta(name)
        if method in COUNTED and name != LACKED:
            assert float((delta - other).norm() / other.norm()) > 1e-3
        elif method not in COUNTED:
            assert_close(delta, other, name=f"{method}, which is not in COUNTED")


@pytest.mark.parametrize("method", ["linear", "tsvm", "do"])
def test_nearly_zero_is_nearly_what_zero_is(method):
    p = dm.prepare(adapters(), method)
    zero, nearly = (p.merge([1.0, x, 0.5]) for x in (0.0, 1e-6))
    for name in p.modules:
        assert_close(nearly.delta(name), zero.delta(name), 1e-4)


GRADIENTS = ["linear", "tsvm", "pico", "multislerp", "do", "iso_c", "wudi", "svd", "subspace_boost"]


@pytest.mark.parametrize("method", GRADIENTS)
def test_gradients_reach_coefficients(method):
    p = dm.prepare(adapters(), method)
    kappa = torch.tensor([0.9, 0.4, 0.6], dtype=torch.float64, requires_grad=True)

    def merge(kappa: Tensor) -> tuple[Tensor, ...]:
        found = p.merge(kappa, dtype="float64")
        return tuple(found.delta(name)[:2, :3] for name in ("layers.0.q", LACKED))

    assert torch.autograd.gradcheck(merge, (kappa,), atol=1e-6)


ALIKE = ("one A", "twice", "zeros")
"""Adapters with one initialization, two that are the same, and one without any update."""


def dependent(kind: str) -> list[dm.Adapter]:
    first, second, third = (factors(3, k, ["layers.0.q"]) for k in range(3))
    if kind == "one A":
        pairs = [{n: (first[n][0], b) for n, (_, b) in x.items()} for x in (first, second, third)]
    elif kind == "twice":
        pairs = [first, second, first]
    else:
        pairs = [first, second, {n: (a, 0 * b) for n, (a, b) in third.items()}]
    return [dm.from_tensors(x, name=f"a{k}") for k, x in enumerate(pairs)]


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("method", [*GRADIENTS, "iso_cts", "dc_merge"])
def test_gradients_are_finite_where_directions_are_missing(method, kind):
    given = {"pre": []} if method != "svd" else {"rank": 3}
    p = dm.prepare(dependent(kind), method, **given)
    kappa = torch.tensor([0.9, 0.4, 0.6], dtype=torch.float64, requires_grad=True)

    def merge(kappa: Tensor) -> Tensor:
        return p.merge(kappa, dtype="float64").delta("layers.0.q")[:2, :3]

    if method == "svd" and kind != "twice":
        assert torch.autograd.gradcheck(merge, (kappa,), atol=1e-6)
        return
    if method in ("iso_cts", "dc_merge", "svd"):  # which count directions
        assert bool(torch.autograd.grad(merge(kappa).sum(), kappa)[0].isfinite().all())
        return
    assert torch.autograd.gradcheck(merge, (kappa,), atol=1e-6)


@pytest.mark.parametrize("method", GRADIENTS)
def test_gradients_at_zero_are_finite(method):
    p = dm.prepare(adapters(), method)
    kappa = torch.tensor([0.9, 0.0, 0.6], dtype=torch.float64, requires_grad=True)
    sum(p.merge(kappa, dtype="float64").delta(name).sum() for name in p.modules).backward()
    assert bool(kappa.grad.isfinite().all())


@pytest.mark.parametrize("method", ["lego", "ties"])
def test_no_gradient_is_promised_where_there_is_none(method):
    p = dm.prepare(adapters(), method)
    with pytest.raises(dm.OptionError, match="no gradient goes through"):
        p.merge(torch.ones(3, requires_grad=True))


def folders(tmp_path: Path) -> list[Path]:
    return [
        write_adapter(tmp_path / f"in{k}", factors(4, k, list(MODULES)), lora_alpha=8)
        for k in range(3)
    ]


@pytest.mark.parametrize("method", ["linear", "tsvm", "svd", "iso_c", "do", "ties"])
@pytest.mark.parametrize("given", [{}, {"rank": 2}, {"dtype": "bfloat16"}], ids=str)
def test_what_is_saved_is_what_merge_writes(tmp_path, method, given):
    sources = folders(tmp_path)
    p = dm.prepare(sources, method)
    if method == "iso_c" and "rank" in given:
        with pytest.raises(dm.FlatCut):
            p.save(WEIGHTS, tmp_path / "found", **given)
        assert not (tmp_path / "found").exists()
        return
    share = 1e-2 if "dtype" in given else 2e-6
    found = p.save(WEIGHTS, tmp_path / "found", **given)
    expected = dm.merge(
        sources, method, weights=WEIGHTS, scale=1.0, output=tmp_path / "expected", **given
    )
    one, two = dm.load(tmp_path / "found"), dm.load(tmp_path / "expected")
    assert one.modules.keys() == two.modules.keys()
    for name in p.modules:
        (a, b), (x, y) = one.factors(name), two.factors(name)
        assert_close(b.float() @ a.float(), y.float() @ x.float(), share, name=name)
    assert found.report.recipe.weights == expected.report.recipe.weights
    assert found.report.recipe.adapters == expected.report.recipe.adapters
    assert [*found.report.modules] == [*expected.report.modules]
    again = dm.run(dm.Recipe.read(tmp_path / "found", tmp_path), sources)
    for name in p.modules:
        (a, b), (x, y) = again.factors(name), two.factors(name)
        assert_close(b.float() @ a.float(), y.float() @ x.float(), share)


def test_many_are_saved_in_one_pass_with_one_rank(tmp_path):
    sources = folders(tmp_path)
    p = dm.prepare(sources, "tsvm")
    kappas = torch.rand(3, 2, 3)
    kappas[2] = kappas[0]
    found = p.save_many(kappas, tmp_path / "out", names=["x", "y", "z"], rank=3)
    assert [*found] == ["x", "y"]
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == ["x", "y"]
    for kappa, name in zip(kappas, ("x", "y")):
        p.save(kappa, tmp_path / "one", rank=3, overwrite=True)
        one, other = dm.load(tmp_path / "one"), dm.load(tmp_path / "out" / name)
        for module in p.modules:
            assert torch.equal(one.factors(module)[0], other.factors(module)[0])
            assert one.modules[module].rank == 3
    card = (tmp_path / "out/x/README.md").read_text()
    assert "layers.0.q" in card


def test_a_zero_is_told_in_the_report(tmp_path):
    p = dm.prepare(folders(tmp_path), "tsvm")
    report = p.save([1.0, 0.0, 1.0], tmp_path / "out").report
    assert any("are 0" in note for note in report.notes)
    assert report.recipe.weights == (1.0, 0.0, 1.0)
    report = p.save(torch.ones(6, 12), tmp_path / "rows").report
    assert any("single directions" in note for note in report.notes)


def test_what_cannot_be_saved_is_refused_and_nothing_written(tmp_path):
    p = dm.prepare(folders(tmp_path), "linear")
    for given in ({"ranks": 3}, {"rank": 0}, {"form": "models"}, {"method": "do"}):
        with pytest.raises(dm.OptionError):
            p.save([1, 1, 1], tmp_path / "out", **given)
    with pytest.raises(dm.OptionError, match="names"):
        p.save_many(torch.ones(2, 6, 3), tmp_path / "out", names=["a", "../b"])
    with pytest.raises(dm.OptionError, match="names"):
        p.save_many(torch.ones(2, 6, 3), tmp_path / "out", names=["a", "a"])
    with pytest.raises(dm.DomergeError, match="does not fit"):
        p.save([1e39, 1, 1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_a_dtype_does_not_hold_is_refused():
    p = dm.prepare(adapters(), "linear")
    assert p.merge(WEIGHTS, dtype="float16")["layers.0.q"][0].dtype == torch.float16
    for kappa, dtype in ((1e14, "float16"), (1e39, "float32"), (1e39, "bfloat16")):
        with pytest.raises(dm.DomergeError, match="does not fit"):
            p.merge([kappa, 1, 1], dtype=dtype)["layers.0.q"]


def test_one_adapter_and_wide_stacks_are_merged():
    p = dm.prepare(adapters(1), "iso_c")
    for name in p.modules:
        assert_close(p.merge([2.0]).delta(name), merged(adapters(1), "iso_c").delta(name) * 2)
    g = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(4, 5, generator=g), torch.randn(6, 4, generator=g)) for _ in range(3)]
    wide = [dm.from_tensors({"x": pair}) for pair in pairs]
    for method in ("linear", "do", "tsvm", "iso_c", "svd", "lego"):
        found = dm.prepare(wide, method).merge(WEIGHTS).delta("x")
        expected = merged(wide, method, weights=WEIGHTS).delta("x")
        assert_close(found, expected, 2e-6, name=method)


KEPT = ["linear", "tsvm", "slerp", "pico", "iso_c", "svd", "lego", "do", "core", "ctm"]


@pytest.mark.parametrize("method", KEPT)
def test_what_was_prepared_is_opened_again(tmp_path, method):
    sources = folders(tmp_path)[: 2 if method == "slerp" else 3]
    p = dm.prepare(sources, method)
    p.state(tmp_path / "state")
    q = dm.Prepared.open(tmp_path / "state")
    assert (q.kind, q.adapters, q.modules, q.scale) == (p.kind, p.adapters, p.modules, p.scale)
    assert q.interference == p.interference
    kappa = torch.rand(len(sources)) + 0.1
    for name in p.modules:
        for x, y in zip(p.merge(kappa)[name], q.merge(kappa)[name]):
            assert torch.equal(x, y)
    p.save(kappa, tmp_path / "one")
    q.save(kappa, tmp_path / "two")
    one, two = (tmp_path / n / "adapter_model.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_options_and_scales_are_opened_again(tmp_path):
    sources = folders(tmp_path)
    for given in ({"renormalize": True, "scale": "auto"}, {"decouple": False, "scale": 0.5}):
        p = dm.prepare(sources, "do", **given)
        p.state(tmp_path / "state", overwrite=True)
        q = dm.Prepared.open(tmp_path / "state")
        assert q.recipe.options == p.recipe.options
        for name in p.modules:
            assert torch.equal(p.merge(WEIGHTS).delta(name), q.merge(WEIGHTS).delta(name))


def test_states_are_refused_where_they_are_damaged(tmp_path):
    state = tmp_path / "state"
    p = dm.prepare(folders(tmp_path), "tsvm")
    p.state(state)
    with pytest.raises(dm.OutputError, match="exists already"):
        p.state(state)
    with pytest.raises(dm.OptionError, match="made anew from the adapters"):
        dm.prepare(adapters(), "ties").state(tmp_path / "other")
    with pytest.raises(dm.OptionError, match="check the path"):
        dm.Prepared.open(tmp_path / "other")
    text, data = (
        (state / "session.json").read_text(),
        (state / "session.safetensors").read_bytes(),
    )
    for damaged in (
        text[:-9],
        text.replace('"rank"', '"ranks"'),
        text.replace("Rows", "Row"),
        "{}",
    ):
        (state / "session.json").write_text(damaged)
        with pytest.raises(dm.OptionError) as error:
            dm.Prepared.open(state)
        assert "\n" not in str(error.value)
    (state / "session.json").write_text(text)
    for other in (data[:-8], data[:-1] + b"x"):
        (state / "session.safetensors").write_bytes(other)
        with pytest.raises(dm.OptionError, match=r"truncated|not what|file"):
            dm.Prepared.open(state)


def test_saving_from_a_state_needs_the_adapters_as_they_were(tmp_path):
    dm.prepare(adapters(), "linear").state(tmp_path / "memory")
    with pytest.raises(dm.AdapterError, match="was in memory"):
        dm.Prepared.open(tmp_path / "memory").save(WEIGHTS, tmp_path / "out")
    sources = folders(tmp_path)
    dm.prepare(sources, "linear").state(tmp_path / "state")
    write_adapter(tmp_path / "in0", factors(4, 9, list(MODULES)), lora_alpha=8)
    q = dm.Prepared.open(tmp_path / "state")
    assert_close(q.merge(WEIGHTS).delta("layers.0.q"), q.merge(WEIGHTS).delta("layers.0.q"))
    with pytest.raises(dm.AdapterError, match="not what was prepared"):
        q.save(WEIGHTS, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("scale", "passes"), [(1.0, 1), ("auto", 3)])
def test_progress_is_told_module_by_module(scale, passes):
    seen = []
    given = {"scale": scale, "progress": lambda *done: seen.append(done)}
    dm.prepare(inputs("tsvm")[0], "tsvm", **given)
    total = passes * len(MODULES)
    assert seen == [(k + 1, total) for k in range(total)]


def test_an_error_that_progress_raises_stops_it():
    def stop(done: int, total: int) -> None:
        raise InterruptedError(done)

    with pytest.raises(InterruptedError, match="1"):
        dm.prepare(inputs("tsvm")[0], "tsvm", progress=stop)
