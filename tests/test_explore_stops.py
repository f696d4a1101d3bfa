"""The page stops at once what is no longer wanted: on Ctrl-C, and when something newer is asked."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.make import random_factors, write_adapter

from domerge_fast.explore.worker import Superseded, Worker

MODULES = {f"layers.{k}.up": (4, 4) for k in range(300)}
SLOW = """
import signal, sys, threading, time
from domerge_fast.cli.main import main
from domerge_fast.sessions import measures

usual, in_main = measures._of_module, sys.argv[1] == "main"

def slow(*given):
    if (threading.current_thread() is threading.main_thread()) == in_main:
        print("working", file=sys.stderr, flush=True)
        time.sleep(0.2)
    return usual(*given)

measures._of_module = slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
sys.exit(main(sys.argv[2:]))
"""
"""The command, slow at what it prepares in its main thread, or elsewhere: a minute in all."""


@pytest.fixture
def started(tmp_path, request) -> Iterator[subprocess.Popen]:
    paths = [
        str(write_adapter(tmp_path / name, random_factors(MODULES, 1, seed=k)))
        for k, name in enumerate("ab")
    ]
    given = [request.param, "explore", *paths, "--folder", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-uc", SLOW, *given], **pipes)
    watch = threading.Timer(120, process.kill)
    watch.start()
    yield process
    watch.cancel()
    process.kill()
    process.communicate()


def until_it_works(process: subprocess.Popen) -> None:
    assert process.stderr
    while process.stderr.readline().strip() != "working":
        assert process.poll() is None


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Its exit code and what it said, soon after Ctrl-C: 60 s would be all its work."""
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=40)
    return process.returncode, said


@pytest.mark.parametrize("started", ["main"], indirect=True)
def test_ctrl_c_before_there_is_a_page(started):
    until_it_works(started)
    code, said = ended(started)
    assert code == 130
    assert said.splitlines()[-1] == "domerge-fast: interrupted; nothing was written"
    assert "Traceback" not in said


@pytest.mark.parametrize("started", ["elsewhere"], indirect=True)
def test_ctrl_c_while_a_method_is_prepared_that_a_request_waits_for(started, tmp_path):
    address = started.stdout.readline().strip()
    place, _, token = address.partition("/?token=")
    asked = {"method": "linear", "weights": [1, 1], "scale": None, "name": "x", "form": "recipe"}
    headers = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{place}/save", json.dumps(asked).encode(), headers)
    answers = []

    def ask() -> None:
        try:
            urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            answers.append((error.code, json.load(error)["error"]))

    waiting = threading.Thread(target=ask, daemon=True)
    waiting.start()
    until_it_works(started)
    code, said = ended(started)
    waiting.join()
    assert code == 0
    assert answers == [(422, "stopped: the page is closed")]
    assert "Traceback" not in said
    assert not Path(tmp_path, "x.yml").exists()


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = Worker("test")
    yield found
    found.close()


def begun(worker: Worker, kind: str, of: object):
    """A job that goes on until it is told to stop, and has begun."""
    begins = threading.Event()

    def work(check) -> None:
        begins.set()
        while True:
            check()
            time.sleep(0.001)

    found = worker.newest(kind, of, work)
    assert begins.wait(10)
    return found


@pytest.mark.parametrize(("kind", "of"), [("loss", 1), ("loss", 2), ("text", 2)])
def test_what_is_newer_takes_the_place_of_what_is_older(worker, kind, of):
    old = begun(worker, "loss", 1)
    assert worker.newest(kind, of, lambda check: "new").result(10) == "new"
    with pytest.raises(Superseded, match="something else was asked for"):
        old.result(10)


def test_what_waits_is_dropped_too(worker):
    first = begun(worker, "loss", 1)
    ran = []
    second = worker.newest("loss", 1, lambda check: ran.append(2))
    assert worker.newest("loss", 1, lambda check: ran.append(3)) is not second
    for old in (first, second):
        with pytest.raises(Superseded):
            old.result(10)
    worker.lasting(lambda check: None).result(10)
    assert ran == [3]


def test_another_kind_about_the_same_and_what_lasts_wait_their_turn(worker):
    goes_on, ends = threading.Event(), threading.Event()

    def lasting(check) -> str:
        goes_on.set()
        ends.wait(10)
        check()
        return "whole"

    whole = worker.lasting(lasting)
    assert goes_on.wait(10)
    loss = worker.newest("loss", 1, lambda check: "loss")
    text = worker.newest("text", 1, lambda check: "text")
    ends.set()
    assert [x.result(10) for x in (whole, loss, text)] == ["whole", "loss", "text"]


def test_closing_ends_what_lasts():
    worker = Worker("test")
    begins = threading.Event()

    def work(check) -> None:
        begins.set()
        while True:
            check()

    lasting = worker.lasting(work)
    waiting = worker.lasting(lambda check: None)
    assert begins.wait(10)
    worker.close()
    for job in (lasting, waiting):
        with pytest.raises(Superseded, match="the page is closed"):
            job.result(10)
