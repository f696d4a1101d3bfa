"""Merges by CUDA graphs, without a GPU: what is copied in, what is repeated, what is freed when.

`support/recorded.py` stands in for the device: it repeats the very calls that were recorded.
"""

from __future__ import annotations

import logging
import weakref

import pytest
import torch
from support.recorded import NotRecorded, Recorder, memory, tensors
from test_prepared import KIND, WEIGHTS, adapters, inputs

import domerge_fast as dm
from domerge_fast import _C
from domerge_fast.backends.gpu import tables
from domerge_fast.backends.gpu.graph import Graph
from domerge_fast.sessions import replays
from domerge_fast.sessions.replays import Replays

HERE = torch.device("cpu")
OTHERS = [0.3, 0.7, 1.1]
EVENTS = ["warm", "capture", "replay", "mark"]


@pytest.fixture
def recorded(monkeypatch):
    """The devices on which graphs were captured, of merges that are made on the CPU."""
    monkeypatch.setitem(replays.DEVICES, "cpu", Recorder)
    monkeypatch.setattr(Recorder, "of", [])
    return Recorder.of


def same(found, expected) -> bool:
    """Bit by bit, in all modules."""
    return found.names == expected.names and all(
        torch.equal(x, y) for name in found.names for x, y in zip(found[name], expected[name])
    )


def plain(p: dm.Prepared, kappa, dtype: str = "float32"):
    """Without a graph."""
    return p._merge(p.expand(kappa), getattr(torch, dtype))


CASES = [
    *((method, {}) for method in KIND),
    ("do", {"renormalize": True}),
    ("do", {"decouple": False}),
    ("core", {"inner": "ties", "density": 0.4}),
    ("knots", {"inner": "linear"}),
    ("tsvm", {"post": ["svc"]}),
]


@pytest.mark.parametrize(("method", "given"), CASES)
def test_one_capture_serves_merges_with_all_coefficients(recorded, method, given):
    sources, weights = inputs(method)
    p = dm.prepare(sources, method, **given)
    merges = [(k, p.merge(k)) for k in (weights, OTHERS[: len(weights)], weights)]
    assert [x.events[:4] for x in recorded] == [EVENTS]
    for kappa, found in merges:
        assert same(found, plain(p, kappa))
    assert recorded[0].events.count("replay") == 3


@pytest.mark.parametrize("method", ["linear", "do", "iso_c"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_every_dtype_has_a_graph(recorded, method, dtype):
    p = dm.prepare(adapters(), method)
    for kappa in (WEIGHTS, OTHERS):
        assert same(p.merge(kappa, dtype=dtype), plain(p, kappa, dtype))
    assert len(recorded) == 1
    p.merge(WEIGHTS)
    assert len(recorded) == (2 if dtype == "float64" else 1)  # rounding to 16 bits comes after it


def test_merges_that_are_held_together_are_each_their_own(recorded):
    """The one that is read has its numbers copied in again, and what was read before stays."""
    p = dm.prepare(adapters(), "do")
    one, other = p.merge(WEIGHTS), p.merge(OTHERS)
    expected = [plain(p, kappa) for kappa in (WEIGHTS, OTHERS)]
    first = one["layers.0.q"]
    for name in p.modules:
        for found, own in zip((other, one), expected[::-1]):
            assert all(map(torch.equal, found[name], own[name]))
    assert all(map(torch.equal, first, expected[0]["layers.0.q"]))
    kappas = p.addresses.expand_many([OTHERS, WEIGHTS], None)
    many = zip(p.merge_many([OTHERS, WEIGHTS]), p._many(kappas, torch.float32))
    assert all(same(*pair) for pair in many)
    assert len(recorded) == 1


def test_a_graph_reads_its_own_inputs_and_what_was_prepared_alone(recorded):
    p = dm.prepare(adapters(), "do")
    p.merge(WEIGHTS)
    (graph,) = p._replays.graphs.values()
    known = {memory(x) for x in (*tensors([*p.bases.values()]), *graph._inputs)}
    assert recorded[0].recording.read <= known
    assert {memory(x) for x in graph._inputs} <= recorded[0].recording.read


def test_streams_wait_for_what_still_reads_the_results(recorded):
    p = dm.prepare(adapters(), "linear")
    found = p.merge(WEIGHTS)
    found["layers.0.q"]
    assert recorded[0].events == [*EVENTS, "after 4", "mark"]
    p.merge(OTHERS)["layers.0.q"]
    assert recorded[0].events[6:] == ["after 6", "replay", "mark"]


def test_graphs_are_freed_with_what_was_prepared_or_when_there_are_many(recorded):
    p = dm.prepare(adapters(), "linear")
    p.merge(WEIGHTS)
    (graph,) = p._replays.graphs.values()
    results = weakref.ref(graph._results.finite)
    recorder, gone = recorded[0], weakref.ref(graph)
    recorded.clear()
    recorder.recording = None  # what was recorded is not the graph's
    for key in range(replays.MOST - 1):
        p._replays.graphs[key] = graph
    del graph
    p.merge(WEIGHTS, dtype="float64")
    assert len(p._replays.graphs) == replays.MOST
    assert gone()
    del p
    assert gone() is None
    assert results() is None
    assert recorder.events[-1] == "wait 4"


@pytest.mark.parametrize("why", ["gradients are to reach", "its factors take"])
def test_what_cannot_be_captured_is_known_before_and_told(recorded, why, caplog, monkeypatch):
    p = dm.prepare(adapters(), "tsvm")
    kappa = torch.tensor(WEIGHTS, requires_grad=why.startswith("gradients"))
    if not kappa.requires_grad:
        monkeypatch.setattr(Recorder, "free", 1 << 10)
    with caplog.at_level(logging.INFO, "domerge_fast"):
        found = p.merge(kappa)
    assert f"the merge is launched plainly, without a CUDA graph: {why}" in caplog.text
    assert not any("capture" in x.events for x in recorded)
    assert same(found, plain(p, kappa))
    assert found["layers.0.q"][1].requires_grad == kappa.requires_grad


def test_without_a_gpu_nothing_is_said_of_graphs(caplog):
    with caplog.at_level(logging.INFO, "domerge_fast"):
        dm.prepare(adapters(), "tsvm").merge(WEIGHTS)
    assert "graph" not in caplog.text


def test_factors_that_are_not_finite_are_refused(recorded):
    p = dm.prepare(adapters(), "linear")
    good, bad = p.merge(WEIGHTS), p.merge([1e300, 1.0, 1.0])
    with pytest.raises(dm.DomergeError, match=r"module 'layers.0.q': .* does not fit in float32"):
        bad["layers.0.q"]
    assert same(good, plain(p, WEIGHTS))


SPOILED = {
    "baked": lambda x: float(x.double().numpy()[0]) * torch.ones(3),
    "waiting": lambda x: torch.ones(3) * x[0].item(),
    "of the host": lambda x: x * torch.tensor([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_the_stand_in_finds_what_a_gpu_would_not_repeat(spoiled):
    """A weight that is taken to Python, a call that waits, and numbers of the host."""
    make = SPOILED[spoiled]
    first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    if spoiled != "baked":
        with pytest.raises(NotRecorded):
            Graph(lambda given: make(given[0]), [first], Recorder(HERE))
        return
    graph = Graph(lambda given: make(given[0]), [first], Recorder(HERE))
    with graph.results([first]) as found:
        assert torch.equal(found, make(first))
    with graph.results([second]) as found:
        assert not torch.equal(found, make(second))


def test_tables_of_a_capture_are_freed_with_the_graph(monkeypatch):
    """`upload` on a device that takes no time, "meta", while it captures."""
    pinned: list[weakref.ref] = []

    def pin(x):
        copy = x.clone()
        pinned.append(weakref.ref(copy))
        return copy

    class Capturing(Recorder):
        def capture(self, run):
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            found = run()
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
            return lambda: None, found

    def make(given):
        host = _C.LaunchTables()
        for values in (range(3), range(4)):
            host.add(list(values), 0)
        return tables.upload(torch.device("meta"), host)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    graph = Graph(make, [], Capturing(HERE))
    with graph.results([]) as found:
        assert [x.shape for x in found] == [(3,), (4,)]
    del found
    warm, captured = pinned
    assert warm() is None
    assert torch.equal(captured(), torch.tensor([0, 1, 2, 0, 0, 1, 2, 3]))
    del graph
    assert captured() is None


def test_replays_are_of_their_shapes(recorded):
    """Coefficients of directions make as many numbers as those of adapters."""
    p = dm.prepare(adapters(), "tsvm")
    p.merge(WEIGHTS)
    rank = max(p.ranks.values())
    kappa = torch.linspace(-1, 1, len(p.modules) * rank).view(len(p.modules), rank)
    assert same(p.merge(kappa), plain(p, kappa))
    assert len(recorded) == 1
    assert isinstance(p._replays, Replays)
