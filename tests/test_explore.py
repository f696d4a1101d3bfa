"""The page with sliders: its numbers are the API's, it saves what it shows, and it answers nobody
but the page itself."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
import torch
from starlette.testclient import TestClient
from support.make import random_factors, write_adapter, write_pair
from test_pages import HOSTILE, SHAPES

import domerge_fast as dm
from domerge_fast.cli.main import main
from domerge_fast.explore.app import app
from domerge_fast.explore.explorer import Asked, Explorer, offered
from domerge_fast.formats import from_tensors

TOKEN, PORT = "a-token", 8123
ADDRESS = f"http://127.0.0.1:{PORT}"
WEIGHTS = [1.0, 0.25]
PROMPT = {"prompt": "w1 w2", "tokens": 12, "of": "merge"}


@pytest.fixture(scope="module")
def explorer(tmp_path_factory) -> Iterator[Explorer]:
    folder = tmp_path_factory.mktemp("explored")
    found = Explorer([*write_pair(folder)], folder)
    yield found
    found.close()


def client(explorer: Explorer, token: str = TOKEN) -> TestClient:
    headers = {"Authorization": f"Bearer {token}"}
    return TestClient(app(explorer, TOKEN, PORT), base_url=ADDRESS, headers=headers)


def asked(method: str = "linear", **given: object) -> dict[str, object]:
    return {"method": method, "weights": WEIGHTS, "scale": 0.7, **given}


def answered(explorer: Explorer, path: str, plain: dict[str, object]) -> dict:
    """Asked again until it is prepared."""
    for _ in range(3000):
        answer = client(explorer).post(path, json=plain)
        assert answer.status_code == 200, answer.text
        if not answer.json().get("preparing"):
            return answer.json()
        time.sleep(0.02)
    raise AssertionError("never prepared")


@pytest.mark.parametrize("method", ["linear", "tsvm", "do", "iso_c"])
def test_the_figures_are_those_of_a_merge(explorer, method):
    found = answered(explorer, "/figures", asked(method))
    sources = [dm.load(x) for x in explorer.paths]
    report = dm.merge(sources, method, weights=WEIGHTS, scale=0.7, report="details").report
    for k, source in enumerate(sources):
        squares = {name: float(update(source, name).square().sum()) for name in source.modules}
        shares = {n: x.shares[source.name] for n, x in report.modules.items() if n in squares}
        own = sum(shares[name] * x for name, x in squares.items()) / sum(squares.values())
        assert found["shares"][k] == pytest.approx(own, abs=1e-4)
    assert found["norm"] > 0
    assert 'id="shares"' in found["html"]


def update(source: dm.Adapter, name: str) -> torch.Tensor:
    a, b = source.factors(name)
    return source.modules[name].scaling * b.float() @ a.float()


def test_without_a_scale_it_is_the_one_that_is_found(explorer):
    found = answered(explorer, "/figures", asked("do", scale=None))
    assert found["scale"] == dm.prepare([*explorer.paths], "do", scale="auto").scale
    assert (
        found["norm"] == answered(explorer, "/figures", asked("do", scale=found["scale"]))["norm"]
    )


@pytest.mark.parametrize("method", ["auto", "do"])
def test_a_saved_recipe_makes_the_saved_adapter_again_bitwise(explorer, method, tmp_path):
    for form in ("adapter", "recipe"):
        given = asked(method, name=f"of-{method}", form=form)
        assert answered(explorer, "/save", given)["written"].startswith(str(explorer.output))
    saved = explorer.output / f"of-{method}"
    recipe = explorer.output / f"of-{method}.yml"
    assert main(["run", str(recipe), "-o", str(tmp_path / "again"), "-q"]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_nothing_is_written_over(explorer):
    for form, file in (("adapter", "twice"), ("recipe", "twice.yml")):
        given = asked(name="twice", form=form)
        answered(explorer, "/save", given)
        before = (explorer.output / file).stat()
        answer = client(explorer).post("/save", json=given)
        assert answer.status_code == 422
        assert "there already" in answer.json()["error"] or "exists" in answer.json()["error"]
        assert (explorer.output / file).stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "/tmp/x", "a\0b", None, 3, ["x"]])
@pytest.mark.parametrize("form", ["adapter", "recipe"])
def test_names_of_other_places_are_refused(explorer, name, form):
    before = sorted(explorer.output.iterdir())
    answer = client(explorer).post("/save", json=asked(name=name, form=form))
    assert answer.status_code == 422
    assert "\n" not in answer.json()["error"]
    assert sorted(explorer.output.iterdir()) == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weights": [1.0]}, "weights"),
        ({"weights": "11"}, "weights"),
        ({"weights": [1.0, "x"]}, "weights"),
        ({"scale": 0}, "scale"),
        ({"scale": "1"}, "scale"),
        ({"method": "ties"}, "method"),
        ({"method": "<script>"}, "method"),
        ({"method": None}, "method"),
        ({"scale": True}, "scale"),
    ],
)
def test_what_is_no_merge_is_refused_in_one_line(explorer, given, said):
    answer = client(explorer).post("/figures", json=asked(**given))
    assert answer.status_code == 422
    assert said in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_what_is_no_json_is_refused(explorer):
    assert client(explorer).post("/figures", content=b"{").status_code == 400
    assert client(explorer).post("/figures", json=[1]).status_code == 422


@pytest.mark.parametrize("path", ["/figures", "/loss", "/text", "/save"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer another"},
        {"Authorization": ""},
        {"Authorization": "Bearer \u00e9".encode("latin-1")},
        {"Host": "example.org"},
        {"Host": f"127.0.0.1:{PORT + 1}"},
        {"Origin": "http://example.org"},
        {"Origin": "null"},
    ],
)
def test_others_are_refused(explorer, path, headers):
    answer = client(explorer).post(path, json=asked(name="x", form="recipe"), headers=headers)
    assert answer.status_code == 403
    assert not (explorer.output / "x.yml").exists()


def test_the_page_needs_the_token(explorer):
    assert client(explorer).get("/").status_code == 403
    assert client(explorer).get(f"/?token={TOKEN}x").status_code == 403
    page = client(explorer).get(f"/?token={TOKEN}")
    assert page.status_code == 200
    assert page.headers["Cache-Control"] == "no-store"
    assert page.text.count('<input type="range"') == 3
    assert all(f"<option>{name}</option>" in page.text for name in offered())
    assert client(explorer).get(f"/figures?token={TOKEN}").status_code == 405


def test_hostile_names_are_text(tmp_path):
    loaded = [
        from_tensors(random_factors(SHAPES, 4, seed=i), name=x) for i, x in enumerate(HOSTILE)
    ]
    explorer = Explorer(loaded, tmp_path)
    page = client(explorer).get(f"/?token={TOKEN}").text
    page += answered(explorer, "/figures", asked(weights=[1.0] * len(HOSTILE)))["html"]
    explorer.close()
    assert "<script>alert" not in page
    assert "<img" not in page
    assert "49" not in [x.strip() for x in page.split("&#39;twice&#39; &amp; ")[1:2]]


@pytest.mark.parametrize(("path", "more"), [("/loss", {}), ("/text", PROMPT)])
def test_what_a_model_does_needs_one(explorer, path, more):
    answer = client(explorer).post(path, json=asked(**more))
    for _ in range(500):
        if answer.status_code == 422:
            break
        time.sleep(0.02)
        answer = client(explorer).post(path, json=asked(**more))
    assert "--model" in answer.json()["error"]


def test_answers_stay_small(tmp_path):
    """Of 64 adapters: bytes, not seconds, which depend on the machine."""
    shapes = {f"layers.{i}.experts.{j}.up": (4, 4) for i in range(8) for j in range(16)}
    loaded = [from_tensors(random_factors(shapes, 1, seed=i), name=f"a{i}") for i in range(64)]
    explorer = Explorer(loaded, tmp_path)
    found = answered(explorer, "/figures", asked(weights=[1.0] * 64))
    explorer.close()
    assert len(found["html"]) < 200_000


def test_the_command_checks_first(tmp_path, capsys):
    a, b = map(str, write_pair(tmp_path))
    assert main(["explore", a, b, "--text", "t"]) == 2
    assert main(["explore", a, b, "--folder", str(tmp_path / "none")]) == 2
    assert main(["explore", a, str(tmp_path / "none"), "-q"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert "option 'model': is not given" in said[0]


def test_a_taken_port_is_refused(tmp_path, capsys):
    a, b = map(str, write_pair(tmp_path))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert main(["explore", a, b, "--port", port]) == 2
    assert f"{port} cannot be had" in capsys.readouterr().err


def test_what_auto_takes_of_small_updates_is_saved_as_it_is_shown(tmp_path):
    """A flatter spectrum, brought to the adapters' sizes (svc), which the recipe has to say."""
    small = {name: (a / 100, b / 100) for name, (a, b) in random_factors(SHAPES, 4, seed=1).items()}
    other = {name: (a / 100, b / 100) for name, (a, b) in random_factors(SHAPES, 4, seed=2).items()}
    paths = [write_adapter(tmp_path / name, x) for name, x in (("a", small), ("b", other))]
    explorer = Explorer(paths, tmp_path)
    shown = answered(explorer, "/figures", asked("auto"))
    answered(explorer, "/save", asked("auto", name="saved", form="adapter"))
    recipe = explorer.recipe(Asked.of(asked("auto"), 2))
    explorer.close()
    assert (recipe.method, recipe.post) == ("tsvm", ("svc",))
    square = sum(float(update(dm.load(tmp_path / "saved"), n).square().sum()) for n in SHAPES)
    assert square**0.5 == pytest.approx(shown["norm"], rel=1e-3)
