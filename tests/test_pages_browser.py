"""Pages as people see them: in Chromium, at three widths, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import WHY_NOT, Browser
from test_pages import HOSTILE, adapters, large

import domerge_fast as dm

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

WIDTHS = (360, 768, 1280)

CONTRASTS = """(() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(Number).map((x) => x / 255)
      .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const least = {};
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((x) => x.nodeType === 3 && x.data.trim());
    const hidden = ["SCRIPT", "STYLE", "title"].includes(node.tagName);
    if (!own || hidden || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const ink = light(node.closest("svg") ? style.fill : style.color);
    const [high, low] = ink > paper ? [ink, paper] : [paper, ink];
    const ratio = (high + 0.05) / (low + 0.05);
    const key = node.tagName + "." + (node.getAttribute("class") || "");
    least[key] = Math.min(least[key] || 99, ratio);
  }
  return least;
})()"""

CUT_OFF = """[...document.querySelectorAll("svg[role=img]")].filter((svg) => {
  const box = svg.viewBox.baseVal;
  return [...svg.querySelectorAll("text")].some((text) => {
    const own = text.getBBox();
    return own.x < -1 || own.x + own.width > box.width + 1 || own.y + own.height > box.height + 1;
  });
}).map((svg) => svg.textContent.slice(0, 200))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module", params=["merge", "hostile", "large"])
def page(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pages") / f"{request.param}.html"
    if request.param == "large":
        dm.write_html(large(), path)
        return path
    names = HOSTILE if request.param == "hostile" else ["math", "code", "prose"]
    shapes = {
        f"layers.{i // len(names)}.{names[i % len(names)]}": (24, 32) for i in range(3 * len(names))
    }
    loaded = adapters(names, shapes)
    dm.write_html(dm.merge(loaded, "do", report="details").report, path)
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_can_be_read(page, browser, width, dark, tmp_path):
    browser.complaints.clear()
    browser.open(page, width, dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    contrasts = browser.run(CONTRASTS)
    assert {"TD.number", "text.", "SUMMARY.", "P.unit"} - set(contrasts) <= {"TD.number"}
    assert min(contrasts.values()) >= 4.5, contrasts
    assert browser.run(CUT_OFF) == []
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    assert browser.complaints == []


def test_dark_is_dark(page, browser):
    colours = []
    for dark in (False, True):
        browser.open(page, 768, dark)
        colours.append(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] != colours[1]


def test_a_table_is_sorted_by_the_keyboard(page, browser):
    browser.open(page, 1280)
    rows = "[...document.querySelectorAll('#conflicts tbody tr')]"
    values_of = f"{rows}.map((row) => Number(row.cells[1].dataset.value))"
    browser.run("document.querySelector('#conflicts .scroll').focus()")
    for _ in range(2):  # the first column's button, then the second's
        browser.press("Tab")
    orders = []
    for key in ("Enter", "Space"):
        browser.press(key)
        values = browser.run(values_of)
        orders.append(values == sorted(values, reverse=key == "Enter"))
        focused = "document.activeElement.closest('th').getAttribute('aria-sort')"
        assert browser.run(focused) == ("descending" if key == "Enter" else "ascending")
    assert orders == [True, True]
    assert len(set(browser.run(values_of))) > 1


def test_a_large_page_opens_without_lag(browser, tmp_path):
    """Nodes, not seconds, which depend on the machine."""
    dm.write_html(large(), tmp_path / "page.html")
    browser.open(tmp_path / "page.html", 1280)
    assert browser.run("document.querySelectorAll('*').length") < 25_000
