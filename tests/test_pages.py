"""Reports as pages: what they show is what the report has, and names are only text."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.make import random_factors, write_pair

import domerge_fast as dm
from domerge_fast.cli.main import main
from domerge_fast.errors import printable
from domerge_fast.formats import from_tensors
from domerge_fast.pages import drawings, kinds, scales
from domerge_fast.pages.page import html as text_of
from domerge_fast.pages.page import page_of
from domerge_fast.results.details import Details, Overlap
from domerge_fast.results.report import Interference, OnInputs

SHAPES = {f"model.layers.{i}.{kind}": (24, 32) for i in range(3) for kind in ("q_proj", "mlp.up")}
HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "\"quoted\" 'twice' & {{ 7 * 7 }}",
    "\u202eright\u2067to left\u0007",
    "n" * 300,
    "W" * 300,
    "漢" * 300,
]


def adapters(names: list[str], shapes: dict[str, tuple[int, int]] = SHAPES) -> list[Any]:
    return [from_tensors(random_factors(shapes, 4, seed=i), name=x) for i, x in enumerate(names)]


class Parsed(html.parser.HTMLParser):
    """tags: all elements that begin. texts: by element the text right in it. tables: rows of cells,
    numbers as such, by the id of their figure."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[Any]]] = {}
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        given = dict(attributes)
        if tag not in ("meta", "link"):
            self._open.append(tag)
        if tag == "figure":
            self._rows = self.tables.setdefault(given["id"], [])
        if tag == "tr":
            self._rows.append([])
        if tag == "td":
            value = given.get("data-value")
            self._rows[-1].append("" if value is None else float(value))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self._open[-1], data.strip()))
            if self._open[-2:] == ["td", "bdi"]:
                self._rows[-1][-1] += data

    def rows(self, key: str) -> list[list[Any]]:
        """Of the figure's table, without its head."""
        return self.tables[key][1:]


def merged(method: str = "do", **options: Any) -> dm.Report:
    loaded = adapters(["one", "two", "three"])
    return dm.merge(loaded, method, report="details", **options).report


def test_numbers_are_those_of_the_report():
    report = merged()
    found = report.interference
    page = Parsed(text_of(page_of(report)))
    names = ["1 one", "2 two", "3 three"]
    sizes = [[name, norm, *own] for name, norm, own in zip(names, found.norms, found.spread)]
    assert page.rows("sizes") == sizes
    for key, table in zip(("rows", "columns", "cosine"), found.tables, strict=True):
        pairs = {f"{i + 1} and {j + 1}": table[i][j] for i in range(3) for j in range(i + 1, 3)}
        assert dict(page.rows(key)) == pairs
    modules = found.details.modules
    shown = {name: own for name, *own in page.rows("conflicts")}
    assert set(shown) == set(SHAPES)
    for name, x in modules.items():
        pair = f"{x.pair[0] + 1} and {x.pair[1] + 1}"
        assert shown[name] == [x.strongest, pair, x.cosine, x.rows, x.columns]
    shares = [[m.shares[name] for m in report.modules.values()] for name in report.adapters]
    for (_, least, median, most), own in zip(page.rows("shares"), shares, strict=True):
        assert (least, most) == (min(own), max(own))
        assert sorted(own)[2] <= median <= sorted(own)[3]
    for (name, before, after, *_), side in zip(page.rows("descent"), "ab", strict=True):
        assert name == side.upper()
        sides = [getattr(m, side) for m in report.modules.values()]
        assert before == pytest.approx(math.fsum(x.objective_before for x in sides))
        assert after == pytest.approx(math.fsum(x.objective_after for x in sides))


def test_ranks_for_an_energy_are_what_a_cut_keeps():
    loaded = adapters(["one", "two", "three"])
    report = dm.merge(loaded, "linear", report="details").report
    rows = {row[0]: row[1:] for row in Parsed(text_of(page_of(report))).rows("energy")}
    rank = int(rows["the merge"][1])
    kept = [dm.merge(loaded, "linear", rank=r).report.energy_kept for r in (rank - 1, rank)]
    assert kept[0] < 0.9 <= kept[1]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text(name):
    shapes = {name: (24, 32), f"layers.0.{name}": (24, 32), "plain": (24, 32)}
    plain = Parsed(text_of(page_of(dm.inspect(adapters(["a", "b"]), report="details"))))
    found = dm.inspect(adapters([name, "b"], shapes), report="details")
    text = text_of(page_of(found))
    page = Parsed(text)
    assert set(page.tags) <= {*plain.tags}
    assert page.tags.count("script") == plain.tags.count("script") == 1
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert all(line.isprintable() for line in text.split("\n"))
    assert printable(name) in [row[0] for row in page.rows("conflicts")]
    assert any(printable(name.split("/")[-1])[:20] in data for _, data in page.texts)


def test_it_needs_nothing_else():
    text = text_of(page_of(merged()))
    page = Parsed(text)
    assert not {"iframe", "img", "object", "embed"} & set(page.tags)
    assert [v for key, v in page.attributes if key in ("src", "href")] == ["data:,"]
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert "default-src 'none'" in text


def test_every_figure_says_its_unit_and_how_to_read_it():
    for figure in page_of(merged()).figures:
        assert figure.unit
        assert figure.reading.endswith(".")
        assert figure.drawings or figure.shown


def large(adapters: int = 64, modules: int = 18_000) -> Interference:
    table = tuple(
        tuple(1.0 if i == j else math.sin(i * j + 1) for j in range(adapters))
        for i in range(adapters)
    )
    names = [f"model.layers.{k % 100}.mlp.experts.{k // 100}.up_proj" for k in range(modules)]
    overlaps = {n: Overlap(0.1, 0.2, 0.3, math.cos(k), (0, 1)) for k, n in enumerate(names)}
    details = Details(overlaps, ((4.0, 2.0, 1.0),) * adapters, 256)
    called = tuple(f"adapter {i}" for i in range(adapters))
    sizes = (1.0,) * adapters, ((0.5, 1.0, 2.0),) * adapters
    return Interference(called, table, table, table, *sizes, details=details)


def test_a_large_model_gives_a_small_page():
    text = text_of(page_of(large()))
    assert len(text) < 3_000_000
    assert len(Parsed(text).tags) < 25_000
    assert "The 200 that conflict most of 18000 modules are shown" in text
    assert "The first 200 of 2016 pairs are shown" in text


def test_many_adapters_are_capped():
    found = large(3, 10)
    count = 1000
    names, norms = tuple(map(str, range(count))), (1.0,) * count
    spread = ((0.5, 1.0, 2.0),) * count
    text = text_of(page_of(Interference(names, None, None, None, norms, spread)))
    assert "and 936 more adapters" in text
    assert "The first 64 of 1000 adapters are drawn" in text
    assert found.details


@pytest.mark.parametrize("method", ["linear", "tsvm", "ties"])
@pytest.mark.parametrize("report", ["details", "full", "norms", "none"])
def test_it_shows_what_there_is(method, report):
    page = page_of(dm.merge(adapters(["one", "two"]), method, report=report).report)
    keys = {figure.key for figure in page.figures}
    assert ("sizes" in keys) == (report != "none")
    assert ("cosine" in keys) == (report in ("details", "full"))
    assert ("shares" in keys) == ("conflicts" in keys) == (report == "details")
    Parsed(text_of(page))


def test_one_adapter_and_updates_that_are_zero():
    shapes = {"x": (6, 8)}
    factors = {"x": tuple(0 * t for t in random_factors(shapes, 2)["x"])}
    for loaded in (
        [from_tensors(factors, name="0")],
        [*adapters(["a"], shapes), from_tensors(factors)],
    ):
        Parsed(text_of(page_of(dm.inspect(loaded, report="details"))))
        Parsed(text_of(page_of(dm.merge(loaded, "linear", report="details").report)))


def test_a_direction_has_its_table():
    *loaded, other = adapters(["one", "two", "other"])
    found = dm.inspect(loaded, against=other, report="details")
    rows = Parsed(text_of(page_of(found))).rows("direction")
    assert rows[0] == ["all modules", *found.direction.cosine]
    assert {row[0]: tuple(row[1:]) for row in rows[1:]} == dict(found.direction.modules)


def test_what_moves_outputs_has_its_table():
    modules = {"x": (0.5, None), "y": (0.1, 2.0)}
    told = OnInputs(("math", "<b>code"), ("math", None), (0.4, 1.5), modules)
    found = dataclasses.replace(large(2, 3), on_inputs=told)
    rows = Parsed(text_of(page_of(found))).rows("on_inputs")
    assert rows == [["all modules", 0.4, 1.5], ["y", 0.1, 2.0], ["x", 0.5, "–"]]


def test_the_command_line(tmp_path, capsys):
    paths = [str(path) for path in write_pair(tmp_path)]
    page, folder = tmp_path / "page.html", tmp_path / "plots"
    assert main(["inspect", *paths, "--html", str(page), "--plots", str(folder), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    shown = Parsed(page.read_text(encoding="utf-8")).rows("conflicts")
    assert {row[0] for row in shown} == set(plain["details"]["modules"])
    first = sorted(path.name for path in folder.iterdir())
    names = ("columns", "cosine", "depth", "energy", "rows", "sizes", "spectra")
    assert first == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.iterdir())
    out = ["-o", str(tmp_path / "out"), "--html", str(page), "--plots", str(folder)]
    assert main(["merge", *paths, *out]) == 0
    assert "What the merge kept" in page.read_text(encoding="utf-8")
    assert {"shares.png", *first} <= {path.name for path in folder.iterdir()}


def test_a_recipe_that_is_run_has_them_too(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pair(tmp_path)
    Path("r.yml").write_text("adapters: [a, b]\nmethod: linear\nreport: norms\n")
    flags = ["--html", "page.html", "--plots", "plots", "--save-recipe", "saved.yml"]
    assert main(["run", "r.yml", "-o", "one", "-q", *flags]) == 0
    merged = ["merge", "a", "b", "--method", "linear", "-o", "two", "-q"]
    assert main([*merged, "--html", "other.html"]) == 0
    rows = [Parsed(Path(x).read_text()).rows("shares") for x in ("page.html", "other.html")]
    assert rows[0] == rows[1] != []
    assert Path("plots/shares.png").read_bytes().startswith(b"\x89PNG")
    assert main(["run", "saved.yml", "-o", "three", "-q"]) == 0
    factors = [Path(x, "adapter_model.safetensors").read_bytes() for x in ("one", "two", "three")]
    assert len(set(factors)) == 1
    for given, kept in ((["--report", "none"], "none"), ([], "norms")):
        assert main(["run", "r.yml", "-o", "four", "--overwrite", "--json", *given]) == 0
        assert json.loads(capsys.readouterr().out)["recipe"]["report"] == kept
    assert main(["run", "r.yml", "-o", "five", "--report", "al"]) == 2
    assert "option 'report': 'al' is not known" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--html", "none/page.html"], "its folder does not exist"),
        (["--html", "."], "is a folder"),
        (["--html", "mine.html"], "is there already, and not ours"),
        (["--plots", "mine.html"], "is no folder"),
        (["--plots", "mine"], "is there already, and not ours"),
        (["--plots", "none/plots"], "the folder that it is in does not exist"),
        (["--html", "page.html", "--dry-run"], "a dry run writes nothing"),
        (["--plots", "plots", "--dry-run"], "a dry run writes nothing"),
    ],
)
def test_what_cannot_be_written_is_refused_before(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paths = [str(path) for path in write_pair(tmp_path)]
    Path("mine.html").write_text("<p>mine")
    Path("mine").mkdir()
    Path("mine/rows.png").write_bytes(b"\x89PNG mine")
    Path("r.yml").write_text("adapters: [a, b]\n")
    before = sorted(tmp_path.rglob("*"))
    for command in (["merge", *paths], ["run", "r.yml"]):
        assert main([*command, "-o", "out", *flags]) == 2
        assert said in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_that_fails_after_the_merge_does_not_hide_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paths = [str(path) for path in write_pair(tmp_path)]
    usual = dm.Report.summary
    monkeypatch.setattr(dm.Report, "summary", lambda self: Path("pages").rmdir() or usual(self))
    Path("pages").mkdir()
    assert main(["merge", *paths, "-o", "out", "--html", "pages/page.html", "-q"]) == 1
    said = capsys.readouterr().err
    assert re.match(r"domerge-fast: error: '.*out' was written, but output 'pages/page.html'", said)
    assert Path("out").is_dir()


@pytest.mark.parametrize(
    ("module", "need", "write"),
    [("jinja2", "a page needs jinja2", "html"), ("matplotlib.figure", "pictures need", "plots")],
)
def test_what_is_not_installed_is_told(module, need, write, tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "domerge_fast.pages.render", raising=False)
    paths = [str(path) for path in write_pair(tmp_path)]
    assert main(["inspect", *paths, f"--{write}", str(tmp_path / "out")]) == 2
    assert need in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", ("self_attn.q_proj", ("model.layers", 3))),
        ("layers.3.experts.17.up", ("experts.*.up", ("layers", 3))),
        ("lora_unet_input_blocks_4_1_to_k", ("*_to_k", ("lora_unet_input_blocks", 4))),
        ("conv1d", ("conv1d", None)),
        ("blocks.7", ("blocks", ("blocks", 7))),
        ("lm_head", ("lm_head", None)),
        ("x." + "9" * 400, ("x", ("x", int("9" * 18)))),
    ],
)
def test_kinds_and_layers_of_names(name, expected):
    assert kinds.place_of(name) == expected


def test_layers_are_in_the_order_of_numbers():
    found = kinds.by_kind({f"layers.{k}.q": (float(k),) for k in (10, 2, 1)})
    assert found == {"q": [(1.0, (1.0,)), (2.0, (2.0,)), (3.0, (10.0,))]}


def test_many_layers_are_drawn_as_means():
    (curve,) = kinds.by_kind({f"layers.{k}.q": (float(k),) for k in range(250)}).values()
    assert len(curve) == 84
    assert curve[0] == (2.0, (1.0,))


def test_numbers_of_a_column_are_aligned():
    values = (0.23, 1.0, 17.0, 250.0, 0.0)
    assert [scales.number(x, aligned=True) for x in values] == ["0.230", "1.00", "17.0", "250", "0"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.0, "0"), (0.12345, "0.123"), (-1234.5, "-1234"), (1e-7, "1.0e-7"), (3e9, "3.0e9")],
)
def test_numbers_have_the_digits_that_a_reader_can_use(value, text):
    assert scales.number(value) == text


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0], [1e-30, 1e30], [], [math.nan], [-2.0, 5.0]])
@pytest.mark.parametrize("log", [False, True])
def test_axes_hold_whatever_there_is(values, log):
    axis = scales.axis_of(values, 0.0, 100.0, log)
    assert axis.low < axis.high
    assert 1 <= len(axis.ticks) <= 9
    assert all(0.0 <= axis(x) <= 100.0 for x in [*axis.ticks, *values] if x == x)


def every_drawing() -> list[Callable[[], drawings.Drawing]]:
    series = drawings.Series("s", [(1.0, 0.5)])
    return [
        drawings.Matrix(["1", "2"], [[1.0, -0.5], [-0.5, 1.0]]),
        drawings.Ranges(["<b>"], [(1.0, 2.0, 3.0)], "x", log=True),
        drawings.Lines("<b>", [series, drawings.Series("t", [], strong=True)], "x", "y"),
        drawings.Bars(["1"], [("<b>", [2.0]), ("B", [1.0])], "steps"),
    ]


@pytest.mark.parametrize("drawing", every_drawing(), ids=lambda x: type(x).__name__)
def test_drawings_are_told_apart_without_colour(drawing):
    from domerge_fast.pages import svg

    text = svg.draw(drawing, '<b>"')
    page = Parsed(text)
    assert "b" not in page.tags
    told = {"Matrix": 'class="hollow"', "Lines": "stroke-dasharray", "Bars": 'class="hatched"'}
    assert told.get(type(drawing).__name__, "<text") in text
