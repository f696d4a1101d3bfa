"""Which backend "auto" takes, and whether there is the evidence that its table claims."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.shapes import CASES

import domerge_fast as dm
from domerge_fast import ops
from domerge_fast.algebra.entry_rules import Draw, Election, Trim
from domerge_fast.backends import evidence, registry
from domerge_fast.backends.evidence import EVIDENCE, ROWS, Row
from domerge_fast.backends.gpu.entries import GpuEntries
from domerge_fast.backends.gpu.host import Gpu
from domerge_fast.backends.registry import DTYPES, OPS, choose
from domerge_fast.bench.workloads import WORKLOADS

ROOT = Path(dm.__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_model  # noqa: E402

CASE = CASES["usual"]


def page() -> str:
    """The table of docs/kernels.md."""
    cells = [("on", "`auto` may take", "for", "of", "evidence"), ("---",) * 5]
    for row in ROWS:
        of = [f"`{op}`" for op in row.ops] or ["all"]
        dtypes = [str(x).removeprefix("torch.") for x in row.dtypes] or ["any"]
        where = f"`{row.device}`" if row.device else "any"
        names = where, f"`{row.backend}`", ", ".join(of), ", ".join(dtypes), row.evidence
        cells.append(names)
    strengths = [f"- {word}: {meaning}." for word, meaning in EVIDENCE.items()]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in cells), "", *strengths])


def test_the_page_has_the_table():
    """Where it differs, what is printed goes between the marks."""
    text = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- evidence -->\n(.*)\n<!-- end evidence -->", text, re.S)
    print(page())
    assert shown
    assert shown[1] == page()


def test_every_row_is_of_what_there_is_and_is_needed():
    """The first row that is of them holds, so each has some that no row before it has."""
    pairs = {(device, op, dtype) for device in ("cpu", "cuda") for op in OPS for dtype in DTYPES}
    left = {name: set(pairs) for name in registry.TABLE.own}
    for row in ROWS:
        assert row.evidence in EVIDENCE
        assert set(row.ops) <= set(OPS)
        found = {x for x in left[row.backend] if row.is_of(*x)}
        assert found
        left[row.backend] -= found
    assert not left["torch"]
    assert left["reference"] == pairs


def test_what_is_measured_is_in_the_results():
    """Merges by both, and the seconds of the op in them."""
    (dtype,) = {x.dtype for x in WORKLOADS.values()}
    for row in (row for row in ROWS if row.evidence == "measured"):
        assert row.device == "cpu"
        assert row.dtypes == ((torch.float32 if "orthogonalize" in row.ops else dtype),)
        for name in gpu_model.CHOSEN:
            told = json.loads((ROOT / f"benchmarks/results/cpu/{name}.json").read_text())
            seconds = told["seconds"]
            assert max(seconds[row.backend]) < min(seconds["torch"])
            assert all(told["stages"]["main"][op] > 0 for op in row.ops)


def test_what_is_predicted_is_in_the_model():
    predicted = {
        (op, dtype)
        for row in ROWS
        if row.evidence == "predicted"
        for op in row.ops
        for dtype in row.dtypes
    }
    assert predicted == {(op, dtype) for op, dtype, _ in gpu_model.OPS}


class Asked(Exception):
    """Kernels were asked for."""


def asked():
    raise Asked


def calls(gpu: Gpu, entries: GpuEntries):
    """Every op on the host side of both GPU backends."""
    rows, columns = CASE.rows(torch.bfloat16), CASE.columns(torch.bfloat16)
    gram, omegas = torch.eye(rows.rank), [CASE.omegas]
    packed = [torch.zeros(sum(r * r for r in rows.ranks), dtype=torch.float64)]
    draw = Draw(1, 2, tuple(range(len(rows.ranks))))
    trims, weights = [Trim()] * len(rows.ranks), [1.0] * len(rows.ranks)
    rule = (weights, Election("none"), draw, 1.0)
    pair = [(torch.ones(2, 5), torch.ones(4, 2))]
    return {
        "gram": lambda: gpu.gram([rows]),
        "block_gram": lambda: gpu.block_gram([rows]),
        "block_products": lambda: gpu.block_products([gram], [gram], rows.ranks),
        "orthogonalize": lambda: gpu.orthogonalize([gram], [rows.ranks]),
        "orthogonalize_factors": lambda: gpu.orthogonalize_factors([rows], steps=1),
        "apply": lambda: gpu.apply([gram], [rows], torch.bfloat16),
        "apply_decouple": lambda: gpu.apply_decouple(
            [gram], [rows], packed, omegas, 1.0, torch.float32
        ),
        "truncate": lambda: gpu.truncate(pair, 1, None, torch.float32),
        "largest": lambda: gpu.largest([gram]),
        "block_largest": lambda: gpu.block_largest([rows]),
        "entry_counts": lambda: entries.entry_counts(rows, columns),
        "entry_sums": lambda: entries.entry_sums(rows, columns, trims, draw),
        "entry_merge": lambda: entries.entry_merge(rows, columns, trims, *rule),
    }


@pytest.mark.parametrize("op", OPS)
def test_library_calls_are_those_that_take_no_kernel(op):
    found = calls(Gpu(asked), GpuEntries(asked))
    assert set(found) == set(OPS)
    try:
        found[op]()
        library = True
    except Asked:
        library = False
    for backend in ("cuda", "triton"):
        rows = [r for r in ROWS if r.backend == backend and r.is_of("cuda", op, torch.bfloat16)]
        assert (rows[0].evidence == "library") == library


@pytest.fixture
def rows(monkeypatch):
    """Puts rows before those of the table."""

    def put(*more: Row) -> None:
        monkeypatch.setattr(evidence, "ROWS", (*more, *ROWS))
        evidence.ranked.cache_clear()

    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    yield put
    monkeypatch.undo()
    evidence.ranked.cache_clear()


def test_auto_takes_the_strongest_evidence_of_what_can_run(monkeypatch, rows):
    """As on a machine with a GPU, without one extension and then without both."""
    usual = registry.TABLE.own
    here = {name: replace(usual[name], why_not=lambda: None) for name in ("cuda", "triton")}
    for name, row in here.items():
        monkeypatch.setitem(usual, name, replace(row, devices=lambda: ("cuda",)))
    assert choose("auto", "cuda") == choose("auto", "cuda", "gram", torch.float32) == "cuda"
    rows(Row("cuda", "triton", ("apply",), (torch.float32,), "measured"))
    assert choose("auto", "cuda", "apply", torch.float32) == "triton"
    assert choose("auto", "cuda", "apply", torch.bfloat16) == "cuda"
    assert choose("auto", "cuda") == "auto"
    for name, then in (("cuda", "triton"), ("triton", "torch")):
        monkeypatch.setitem(usual, name, replace(usual[name], why_not=lambda: "none here"))
        assert choose("auto", "cuda") == then
    assert choose("auto", "mps") == "torch"


def test_a_merge_takes_a_backend_for_each_op(monkeypatch, rows):
    """Where the table has two, the ops of a merge find theirs by themselves."""
    rows(Row("cpu", "torch", ("apply",), (torch.bfloat16,), "measured"))
    adapters = [
        dm.from_tensors({"x": (x.bfloat16(), y.bfloat16())}, name=f"{k}")
        for k, (x, y) in enumerate(zip(CASE.a, CASE.b))
    ]
    taken = []
    for name in ("torch", "cpu"):
        module = registry.load(name)
        for op in ("gram", "apply"):
            call = getattr(module, op)

            def noted(*given, name=name, op=op, call=call):
                taken.append((name, op))
                return call(*given)

            monkeypatch.setattr(module, op, noted)
    merged = dm.merge(adapters, "do")
    told = merged.report.recipe.backend
    of_op = dict.fromkeys(OPS, "cpu") | {"apply": "torch"}
    assert told == " ".join(f"{op}={of_op[op]}" for op in OPS)
    assert {("cpu", "gram"), ("torch", "apply")} <= set(taken)
    assert ("cpu", "apply") not in taken
    del taken[:]
    rows()  # what the report says holds, whatever the table has by then
    again = dm.run(merged.report.recipe, adapters)
    assert {("cpu", "gram"), ("torch", "apply")} <= set(taken)
    assert ("cpu", "apply") not in taken
    assert again.report.recipe.backend == told
    assert all(map(torch.equal, again.factors("x"), merged.factors("x")))
    rows(Row("cpu", "torch", ("apply",), (torch.bfloat16,), "measured"))
    side = CASE.rows(torch.bfloat16)
    del taken[:]
    ops.apply([None], [side], torch.bfloat16)
    ops.apply([None], [CASE.rows()], torch.float32)
    assert taken == [("torch", "apply"), ("cpu", "apply")]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("apply=torch", "does not say one for every op"),
        (" ".join(f"{op}=torch" for op in (*OPS, "gram")), "does not say one for every op"),
        (" ".join(f"{op}=torch" for op in (*OPS, "sort")), "does not say one for every op"),
        (" ".join(f"{op}=tensor" for op in OPS), "'tensor'"),
        (" ".join(f"{op}=cuda" for op in OPS), "'cuda' runs on"),
    ],
)
def test_words_that_name_no_backend_for_every_op_are_refused(words, line):
    adapter = dm.from_tensors({"x": (CASE.a[0], CASE.b[0])})
    with pytest.raises(dm.OptionError, match=line):
        dm.merge([adapter, adapter], "do", backend=words)


def test_ops_are_by_what_they_read(rows):
    """A merge's by the dtype of its adapters; of what ops make by float32."""
    rows(
        Row("cpu", "torch", ("gram", "orthogonalize"), (torch.float16,), "measured"),
        Row("cpu", "torch", ("truncate",), (torch.float32,), "measured"),
    )
    found = registry.by_op(registry.choose_all("cpu", torch.float16))
    assert [op for op, name in found.items() if name == "torch"] == ["gram", "truncate"]
    assert {*found} == {*OPS}
    assert {*found.values()} == {"cpu", "torch"}
