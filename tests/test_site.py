"""The pages as a site: what they show is what commands print, and every link leads somewhere."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import domerge_fast as dm

ROOT = Path(__file__).parents[1]
for folder in ("docs", "tools"):
    sys.path.insert(0, str(ROOT / folder))
import transcripts  # noqa: E402
from docstrings import restructured  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINS = "$ python examples/"
"""What takes minutes, and may choose otherwise on another processor: it is not run again."""
SHOWING = [
    page
    for page in PAGES
    if "\n```console\n" in (text := page.read_text(encoding="utf-8")) and TRAINS not in text
]
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def alike(shown: str, printed: str) -> bool:
    """The same words, and numbers that rounding on another processor may change; times are any."""
    texts = [re.sub(r"^(seconds +).*", r"\1", text, flags=re.M) for text in (shown, printed)]
    texts = [re.sub(r"\d+ s left", "s left", text) for text in texts]
    words = [NUMBER.sub("#", text) for text in texts]
    numbers = [[float(x) for x in NUMBER.findall(text)] for text in texts]
    return words[0] == words[1] and all(
        math.isclose(a, b, rel_tol=1e-2, abs_tol=2e-3) for a, b in zip(*numbers)
    )


def test_outputs_are_alike_where_words_and_numbers_are():
    assert alike("rank 8\nseconds  1.2", "rank 8\nseconds  99")
    assert alike("scale 1.2158", "scale 1.2160")
    assert alike("loss 0.5, 3 s left", "loss 0.5, 12 s left")
    assert not alike("rank 8", "rank 9")
    assert not alike("rank 8", "ranks 8")


@pytest.mark.parametrize("page", SHOWING, ids=lambda page: page.stem)
def test_a_page_shows_what_its_commands_print(page, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", transcripts.WIDTH)
    shown = page.read_text(encoding="utf-8")
    printed = transcripts.run(shown, tmp_path)
    assert "Traceback" not in printed
    told = f"python tools/transcripts.py {page.relative_to(ROOT)} puts in what is printed now"
    assert alike(shown, printed), told


def test_the_page_of_examples_runs_each_that_there_is():
    text = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    shown = re.findall(rf"^{re.escape(TRAINS)}(\w+\.py) ", text, re.M)
    assert sorted(shown) == sorted({Path(x).name for x in transcripts.EXAMPLES} - {"demo.py"})


def test_a_page_shows_no_other_programs():
    with pytest.raises(ValueError, match="a page shows commands of domerge-fast, examples, and ls"):
        transcripts.answer("rm -rf adapters")


def test_the_reference_has_every_public_name_once():
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    named = re.findall(r"^\.\. auto(?:function|class|exception):: (\w+)$", text, re.M)
    named += re.findall(r"^\.\. automodule:: domerge_fast\.(\w+)$", text, re.M)
    assert sorted(named) == sorted(dm.__all__)


def test_the_index_has_every_page():
    text = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    listed = {x for part in text.split("```{toctree}")[1:] for x in part.split("```")[0].split()}
    assert {x.stem for x in (ROOT / "docs").glob("*.md")} - listed == {"index"}


def test_every_example_is_on_its_page_and_run_by_a_test():
    text = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    tests = "".join(x.read_text(encoding="utf-8") for x in (ROOT / "tests").glob("test_*.py"))
    for example in (ROOT / "examples").glob("*.py"):
        assert f"(../examples/{example.name})" in text
        shown = re.search(rf"^\$ python examples/{example.name} \w+\n[^$`]", text, re.M)
        assert shown or example.stem == "demo", "that fetches what it needs"
        assert re.search(rf'(examples/|"){example.stem}\b', tests)


def test_docstrings_become_definitions_and_code():
    given = [
        "Do |x|*.",
        "",
        "a, b: what `c` is",
        "    and more",
        "d: 1",
        "",
        "    dm.f(*x)",
        "End.",
    ]
    expected = ["Do \\|x\\|\\*.", "", "**a, b**", "    what ``c`` is", "    and more"]
    expected += ["**d**", "    1", "", "::", "", "    dm.f(*x)", "", "End."]
    assert restructured(given) == expected


class Targets(HTMLParser):
    """What a page of the site refers to, and the places in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name == "srcset" and value:
                self.links.update(x.split()[0] for x in value.split(","))
            elif name == "id" and value:
                self.places.add(value)


def dead_links(site: Path) -> list[str]:
    """Links within the site that lead to no file, or to no place in it."""
    pages = {path: Targets(path) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages[target].places if target in pages else None
            lost = known is not None and parts.fragment and parts.fragment not in known
            if not target.is_file() or lost:
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_all_its_links_lead_somewhere(tmp_path):
    site = tmp_path.resolve() / "site"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "doctrees"), ".", str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (site / "index.html").is_file()
    assert dead_links(site) == []
    (site / "docs/index.html").write_text('<a href="gone.html"></a><a href="api.html#gone"></a>')
    assert dead_links(site) == ["docs/index.html: api.html#gone", "docs/index.html: gone.html"]
