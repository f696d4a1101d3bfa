"""The page with sliders as people use it: started by its command, in Chromium."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import WHY_NOT, Browser
from support.causal import WORDS, causal
from support.trained import trained
from test_pages_browser import CONTRASTS, CUT_OFF, WIDTHS

from domerge_fast.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

STARTED = [sys.executable, "-m", "domerge_fast", "explore"]
NORM = "document.querySelectorAll('#figures dd')[1]?.textContent"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, two adapters and a text."""
    place = tmp_path_factory.mktemp("explore")
    model = causal(place / "model")
    for k, name in enumerate("ab"):
        trained(model, k, place / name, target_modules=["q_proj", "down_proj"])
    (place / "text.txt").write_text(" ".join(WORDS * 10))
    return place


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    """Of the page, whose process Ctrl-C ends without a complaint."""
    given = [str(folder / "a"), str(folder / "b"), "--folder", str(folder)]
    given += ["--model", str(folder / "model"), "--text", str(folder / "text.txt")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*STARTED, *given], text=True, env=environment, **pipes)
    assert process.stdout
    yield process.stdout.readline().strip()
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in complaints


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def until(browser: Browser, code: str) -> None:
    for _ in range(600):
        if browser.run(code):
            return
        time.sleep(0.1)
    raise AssertionError(f"{code}: never; {browser.run('document.body.innerText')}")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_and_can_be_read(address, browser, width, dark, tmp_path):
    browser.complaints.clear()
    browser.open(address, width, dark)
    until(browser, "document.querySelector('#losses table') !== null")
    assert browser.run("document.documentElement.scrollWidth") <= width
    contrasts = browser.run(CONTRASTS)
    assert min(contrasts.values()) >= 4.5, contrasts
    assert browser.run(CUT_OFF) == []
    browser.picture(tmp_path / "page.png")
    own = address.split("?")[0]
    assert [x for x in browser.complaints if not x.startswith(own)] == []


def test_a_slider_is_moved_by_the_keyboard_and_the_figures_follow(address, browser):
    browser.open(address, 1280)
    until(browser, f"{NORM} !== undefined")
    before = browser.run(NORM)
    browser.run("document.getElementById('weight-0').focus()")
    for _ in range(40):
        browser.press("ArrowRight")
    until(browser, f"{NORM} !== {before!r}")
    assert float(browser.run("document.querySelector('[data-of=weight-0]').value")) > 1


TEXTS = "[...document.querySelectorAll('#texts dd')].map(x => x.textContent)"


def generated(browser: Browser, prompt: str) -> list[str]:
    """What stands there once all is written: of the merge, the base and the two adapters."""
    browser.run(f"document.getElementById('prompt').value = {prompt!r}")
    browser.run("document.querySelector('#write button').click()")
    until(browser, f"{TEXTS}.every(Boolean) && !document.getElementById('wrote').textContent")
    return browser.run(TEXTS)


def test_the_merge_writes_beside_each_adapter(address, browser):
    browser.open(address, 1280)
    until(browser, "document.querySelector('#losses table') !== null")
    first = generated(browser, "w1 w2")
    assert len(first) == 4
    assert all(text.split()[0] in [*WORDS, "<unk>"] for text in first)
    for name, value in (("weight-0", 0), ("weight-1", 0)):
        browser.run(f"document.querySelector('[data-of={name}]').value = {value}")
    browser.run("document.querySelector('[data-of=weight-0]').dispatchEvent(new Event('change'))")
    said = browser.run("document.getElementById('wrote').textContent")
    assert said == "The merge was another one: generate again."
    merge, base, *adapters = generated(browser, "w1 w2")
    assert merge == base == first[1]
    assert adapters == first[2:]


def test_what_is_written_is_text(address, browser):
    browser.open(address, 1280)
    hostile = "<img src=x onerror=document.title='hit'> </dd><b>bold</b>"
    answer = f"new Response(JSON.stringify({{ text: {json.dumps(hostile)}, html: '' }}))"
    browser.run(f"window.fetch = async () => {answer}; 0")
    assert generated(browser, "w1") == [hostile] * 4
    assert browser.run("document.querySelectorAll('#texts dd *').length") == 0
    assert browser.run("document.title") != "hit"


def test_a_prompt_that_is_refused_is_told(address, browser):
    browser.open(address, 1280)
    browser.run("document.getElementById('prompt').value = ' '")
    browser.run("document.querySelector('#write button').click()")
    until(browser, "document.getElementById('wrote').textContent.includes('has no tokens')")


def test_what_is_saved_is_a_recipe_that_runs(address, browser, folder, tmp_path):
    browser.open(address, 768)
    until(browser, f"{NORM} !== undefined")
    browser.run("document.getElementById('name').value = 'mine'")
    browser.run("document.querySelector('#save [value=recipe]').click()")
    until(browser, "document.getElementById('saved').textContent.startsWith('written')")
    assert main(["run", str(folder / "mine.yml"), "-o", str(tmp_path / "out"), "-q"]) == 0
    browser.run("document.querySelector('#save [value=recipe]').click()")
    until(browser, "document.getElementById('saved').textContent.includes('there already')")
