"""domerge-fast bench: the bounds by hand, the checks, the workloads, and the command itself."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from torch import Tensor

import domerge_fast as dm
from domerge_fast import ops
from domerge_fast.adapters.plan import Plan, Stack
from domerge_fast.algebra.side import Side
from domerge_fast.backends import cpu
from domerge_fast.bench import bounds, cases, checks, measure, timing
from domerge_fast.bench.bounds import Rates, Work
from domerge_fast.bench.command import bench
from domerge_fast.bench.workloads import WORKLOADS, Member, Shape, Workload
from domerge_fast.cli import main as cli
from domerge_fast.cli import streams
from domerge_fast.methods import TABLE
from domerge_fast.methods.base import Chosen, Settings
from domerge_fast.methods.do import DoOptions
from domerge_fast.methods.running import prepared

CPU = torch.device("cpu")
SMALL = Workload(
    "small",
    "ragged, with a convolution, and a module that is wider than long",
    (
        Member(3, (Shape("q", 12, 40), Shape("conv", 8, 27, (3, 3)))),
        Member(5, (Shape("q", 12, 40), Shape("k", 6, 7))),
        Member(2, (Shape("conv", 8, 27, (3, 3)), Shape("k", 6, 7))),
    ),
)


@pytest.fixture(autouse=True)
def _quick_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(bounds, "GEMM_SIZE", {"cpu": 64})


def plan_of(workload: Workload) -> Plan:
    adapters = workload.adapters(CPU)
    return Plan.make(adapters, [1.0] * len(adapters))


def stacks_of(plan: Plan) -> list[Stack]:
    return [cases.stack(plan, name, CPU) for name in plan.names]


def problem(ranks: tuple[int, ...], d: int, dtype: torch.dtype) -> Side:
    return Side(tuple(torch.zeros(r, d, dtype=dtype) for r in ranks), (1.0,) * len(ranks))


# Bounds


def test_gram_counts_a_triangle_and_every_byte_once():
    work = bounds.gram([problem((2, 3), 10, torch.bfloat16), problem((1,), 4, torch.float32)])
    # 15 inner products of 10 multiply-adds; 1 of 4
    assert work.flops_in == {"16-bit": 15 * 20, "float32": 8}
    assert work.bytes == (5 * 10 * 2 + 5 * 5 * 4) + (4 * 4 + 4)


def test_block_gram_counts_each_adapters_triangle_in_float64():
    work = bounds.block_gram([problem((2, 3), 10, torch.float32)])
    assert work == Work(5 * 10 * 4 + 8 * (4 + 9), {"float64": (3 + 6) * 20})


def test_the_descent_counts_seven_cubes_a_step_after_the_first():
    assert bounds.orthogonalize([4, 2], [3.0, 0.0]) == Work(
        2 * 4 * (16 + 4), {"float32": 64 * (3 + 7 + 7)}
    )
    work = bounds.orthogonalize_factors([problem((4, 6), 3, torch.bfloat16)], [2.0])
    assert work == Work(10 * 3 * (2 + 4), {"16-bit": 10 * 9 * 3 * 2})


def test_apply_counts_the_product_or_nothing():
    p, c = problem((2, 3), 10, torch.bfloat16), torch.zeros(4, 5)
    assert bounds.apply([c], [p], torch.bfloat16) == Work(
        5 * 10 * 2 + 4 * 5 * 4 + 4 * 10 * 2, {"mixed": 2 * 4 * 5 * 10}
    )
    assert bounds.apply([None], [p], torch.float32) == Work(5 * 10 * 2 + 5 * 10 * 4, {})


def test_apply_decouple_adds_triangular_norms():
    p, c = problem((2, 3), 10, torch.float32), torch.zeros(5, 5)
    work = bounds.apply_decouple([c], [p], torch.float32)
    assert work == Work(
        2 * 5 * 10 * 4 + 25 * 4 + 8 * (4 + 9), {"float32": 2 * 25 * 10 + (2 * 3 + 3 * 4) * 10}
    )


def test_block_products_read_both_grams():
    work = bounds.block_products([torch.zeros(5, 5)] * 3, [torch.zeros(5, 5)] * 3, (2, 3))
    assert work == Work(2 * 3 * 25 * 4 + 3 * 4 * 8, {"float64": 2 * 75})


def test_truncate_and_largest():
    pair = (torch.zeros(5, 30), torch.zeros(20, 5))
    work = bounds.truncate([pair], 2, torch.float32)
    assert work == Work(5 * 50 * 4 + 2 * 50 * 4, {"float64": 5 * 6 * 50, "float32": 2 * 5 * 2 * 50})
    assert bounds.largest([pair[0], pair[1].bfloat16()]) == Work(600 + 200 + 2 * 8, {})


def test_the_slower_of_bytes_and_flops_is_the_bound():
    rates = Rates(100.0, {"float32": 10.0, "bfloat16": 60.0, "tf32": 24.0, "float64": 5.0})
    assert rates.seconds(Work(1000, {"float64": 20.0})) == (10.0, "bytes")
    assert rates.seconds(Work(1000, {"float64": 60.0})) == (12.0, "flops")
    assert rates.seconds(Work(0, {"float32": 10.0})) == (1.0, "flops")  # tf32 would take 3 passes
    assert rates.seconds(Work(0, {"mixed": 30.0})) == (1.0, "flops")  # 2 passes of bfloat16
    assert rates.seconds(Work(0, {"16-bit": 60.0})) == (1.0, "flops")
    slow = Rates(100.0, {"float32": 10.0, "bfloat16": 1.0, "float64": 5.0})
    assert slow.seconds(Work(0, {"16-bit": 10.0})) == (1.0, "flops")


def test_rates_are_positive_and_the_copy_counts_both_ways(monkeypatch):
    def instant(calls, device, repeat):
        for call in calls.values():
            call()
        return {name: [0.5, 0.25] for name in calls}

    monkeypatch.setattr(timing, "take_turns", instant)
    monkeypatch.setattr(bounds, "GEMM_SECONDS", 0.25 * 4**3)
    rates = bounds.measure(CPU)
    assert rates.copy == 2 * (1 << 20) / 0.25
    assert rates.gemm == {
        "float32": 2 * 64**3 / 0.25,
        "bfloat16": 2 * 64**3 / 0.25,
        "float64": 2 * 32**3 / 0.25,
    }


# The ops of a merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_what_is_timed_is_the_do_method(backend, dtype):
    stacks = stacks_of(plan_of(SMALL))
    assert any(s.rank > min(s.a.d, s.b.d) for s in stacks)
    found = cases.merge(stacks, dtype, cases.runner(backend), DoOptions(), backend)
    grams_a = ops.gram([s.a for s in stacks], backend=backend)
    grams_b = ops.gram([s.b for s in stacks], backend=backend)
    settings = Settings(1.0, dtype, backend)
    run = prepared(Chosen(TABLE["do"], DoOptions()), (), settings)
    expected = run(stacks, settings, (grams_a, grams_b))
    for (a, bt), factors in zip(found, expected, strict=True):
        assert torch.equal(a, factors.a)
        assert torch.equal(bt.T, factors.b)


def test_a_merge_reads_its_factors_once_and_writes_its_results_once():
    stacks = stacks_of(plan_of(SMALL))
    recorded = cases.record(stacks, torch.bfloat16, "torch", DoOptions())
    work = measure.merge_work(stacks, torch.bfloat16, recorded)
    assert work.bytes == 2 * SMALL.factor_bytes
    timed = [c.work.flops for c in recorded if c.op not in cases.BESIDE]
    assert work.flops == pytest.approx(sum(timed))


# The checks


def test_the_checks_pass_what_is_right_and_covers_every_op():
    checker = checks.Checks(plan_of(SMALL), torch.bfloat16)
    assert {case.op for case in checker.cases} == set(checks.CHECKED)
    assert set(ops.__all__) - set(checks.CHECKED) == {"entry_counts", "entry_merge", "entry_sums"}
    for backend in ("cpu", "torch"):
        verdict = checker.check(backend, CPU)
        assert verdict.refused is None
        assert max(verdict.errors.values()) < 1e-3


def _scaled(factor: float):
    def wrong(x: object) -> object:
        if isinstance(x, Tensor):
            return x * factor if x.is_floating_point() else x
        if isinstance(x, (list, tuple)):
            return type(x)(map(wrong, x))
        return not x if isinstance(x, bool) else x * factor

    return wrong


@pytest.mark.parametrize("op", checks.CHECKED)
def test_the_checks_refuse_a_wrong_result_of_any_op(op, monkeypatch):
    checker = checks.Checks(plan_of(SMALL), torch.float32)
    right = getattr(cpu, op)
    monkeypatch.setattr(cpu, op, lambda *given: _scaled(1 + 3e-5)(right(*given)))
    verdict = checker.check("cpu", CPU)
    assert verdict.refused is not None
    assert verdict.refused.startswith(f"{op} is off by ")
    monkeypatch.undo()
    assert checker.check("cpu", CPU).refused is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_checks_refuse_what_is_not_finite(bad, monkeypatch):
    checker = checks.Checks(plan_of(SMALL), torch.bfloat16)
    right = cpu.apply

    def poisoned(*given):
        results = right(*given)
        results[-1][-1, -1] = bad
        return results

    monkeypatch.setattr(cpu, "apply", poisoned)
    refused = checker.check("cpu", CPU).refused
    assert refused is not None
    assert "apply is off by inf" in refused


def test_the_gate_takes_few_adapters_of_a_large_set():
    member = Member(1, (Shape("q", 10, 12),))
    checker = checks.Checks(plan_of(Workload("many", "", (member,) * 50)), torch.bfloat16)
    assert len(checker.stacks[0].adapters) == checks.MOST_ADAPTERS
    assert any(case.op == "orthogonalize_factors" for case in checker.cases)


# Workloads

COUNTS = {  # modules, adapters, bytes of the factors
    "llama3-8b-8": (224, 8, 671_088_640),
    "llama3-8b-64": (64, 64, 436_207_616),
    "llama3-70b-8": (560, 8, 3_313_500_160),
    "moe-30b-4": (18_624, 4, 48 * 4 * 8 * 2 * (384 * 2816 + 2 * 6144 + 2 * 2560)),
    "library-1000": (64, 1000, 6_815_744_000),
    "llama-tiny": (14, 4, 606_208),
}


@pytest.mark.parametrize("name", COUNTS)
def test_workloads_have_the_shapes_of_their_models(name):
    w = WORKLOADS[name]
    assert (len(w.modules), len(w.members), w.factor_bytes) == COUNTS[name]


def test_sdxl_is_ragged():
    w = WORKLOADS["sdxl-mixed"]
    assert [m.rank for m in w.members] == [4, 8, 16, 32, 64, 128]
    assert len({len(m.modules) for m in w.members}) == 6
    assert len([s for s in w.modules if ".transformer_blocks." in s.name]) == 70 * 10
    assert {len(s.kernel) for s in w.modules} == {0, 2}
    assert Shape("up_blocks.0.resnets.0.conv1", 1280, 9 * 2560, (3, 3)) in w.modules


def test_a_workload_is_made_again_from_its_seed_and_grows_over_its_adapters():
    w = WORKLOADS["llama-tiny"]
    once, again = w.adapters(CPU), w.adapters(CPU)
    other = w.adapters(CPU, seed=1)
    name = w.modules[-1].name
    norms = []
    for x, y, z in zip(once, again, other, strict=True):
        a, b = x.factors(name)
        assert torch.equal(a, y.factors(name)[0])
        assert not torch.equal(a, z.factors(name)[0])
        assert a.abs().max() <= w.modules[-1].n ** -0.5
        norms.append(float(b.float().norm()))
    assert norms[-1] / norms[0] == pytest.approx(6, rel=0.1)


def test_what_is_written_is_what_is_made_in_memory(tmp_path):
    paths = SMALL.write(tmp_path)
    before = [p.stat().st_mtime_ns for path in paths for p in path.iterdir()]
    assert SMALL.write(tmp_path) == paths
    assert [p.stat().st_mtime_ns for path in paths for p in path.iterdir()] == before
    for path, made, member in zip(paths, SMALL.adapters(CPU), SMALL.members, strict=True):
        loaded = dm.load(path)
        assert set(loaded.modules) == {s.name for s in member.modules}
        for s in member.modules:
            assert loaded.modules[s.name] == made.modules[s.name]
            for x, y in zip(loaded.factors(s.name), made.factors(s.name), strict=True):
                assert torch.equal(x, y)


def test_convolutions_are_stored_as_peft_stores_them(tmp_path):
    path = SMALL.write(tmp_path)[0]
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        a = file.get_slice("base_model.model.conv.lora_A.weight").get_shape()
        b = file.get_slice("base_model.model.conv.lora_B.weight").get_shape()
    assert (a, b) == ([3, 3, 3, 3], [8, 3, 1, 1])


def test_peft_loads_a_written_adapter(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = torch.nn.Linear(40, 12), torch.nn.Linear(7, 6)
            self.conv = torch.nn.Conv2d(3, 8, 3)

    for path, member in zip(SMALL.write(tmp_path), SMALL.members, strict=True):
        assert LoraConfig.from_pretrained(path).r == member.rank
        model = PeftModel.from_pretrained(Model(), path)
        for s, (a, _) in ((s, dm.load(path).factors(s.name)) for s in member.modules):
            layer = model.get_submodule(f"base_model.model.{s.name}")
            assert torch.equal(layer.lora_A["default"].weight.flatten(1), a.float())


def test_endings_name_modules_only_where_they_select_just_those(tmp_path):
    w = WORKLOADS["sdxl-mixed"]
    attention, upper = (w._targets(w.members[i]) for i in (0, 1))
    assert attention == ["to_k", "to_out.0", "to_q", "to_v"]
    assert set(upper) == {s.name for s in w.members[1].modules}


def test_a_part_of_sdxl_loads_and_merges(tmp_path):
    block = "up_blocks.1.attentions.0.transformer_blocks.0."
    names = [f"{block}attn1.to_q", f"{block}attn2.to_k", "up_blocks.2.resnets.1.conv_shortcut"]
    names += ["down_blocks.0.resnets.0.conv1"]
    part = WORKLOADS["sdxl-mixed"].only(names)
    adapters = [dm.load(path) for path in part.write(tmp_path)]
    merged = dm.merge(adapters, output=tmp_path / "merged")
    ranks = {name: report.rank for name, report in merged.report.modules.items()}
    assert ranks == dict(zip(names, (4 + 8 + 16 + 32 + 64, 252, 8 + 64, 64)))
    again = dm.load(tmp_path / "merged")
    a, b = again.stored[names[2]]
    assert (a.shape, b.shape) == ((252, 640, 1, 1), (320, 252, 1, 1))
    module = again.modules[names[2]]
    assert (module.a_shape, module.b_shape) == ((72, 640, 1, 1), (320, 72, 1, 1))


# The command


def test_bench_measures_and_writes_every_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streams, "width", lambda: 200)  # no name is wrapped, whatever took long
    line = (
        "bench --workload llama-tiny --modules 3 --save-json f.json --plot f.png --profile f.trace"
    )
    assert cli.main(line.split()) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("llama-tiny: 4 adapters, 3 of 14 modules, ")
    found = json.loads(Path("f.json").read_text())
    expected = {"gram", "orthogonalize", "apply", "block_gram", "apply_decouple"}
    expected |= {"block_products", "largest", "block_largest", "truncate", "merge"}
    backends = set(measure.usable(CPU))
    assert {"cpu", "torch"} <= backends
    assert {(r["op"], r["backend"]) for r in found["rows"]} == {
        (op, backend) for op in expected for backend in backends
    }
    for row in found["rows"]:
        assert len(row["seconds"]) == 5
        assert min(row["seconds"]) > 0
        assert 0 < row["bound"] < 1
        assert re.search(rf"^{row['op']} +{row['backend']} +\d+ ", printed.out, re.MULTILINE)
    assert set(found["errors"]) == backends
    assert max(max(e.values()) for e in found["errors"].values()) < 1e-3
    assert Path("f.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads(Path("f.trace").read_text())["traceEvents"]
    assert any("domerge_fast::gram" in str(event.get("name")) for event in events)


def test_bench_measures_the_users_adapters(tmp_path, capsys):
    paths = [str(path) for path in SMALL.write(tmp_path)]
    report = tmp_path / "f.json"
    line = ["bench", *paths, "--backend", "cpu", "--repeat", "7", "--save-json", str(report)]
    assert cli.main(line) == 0
    found = json.loads(report.read_text())
    assert {row["backend"] for row in found["rows"]} == {"cpu"}
    assert {len(row["seconds"]) for row in found["rows"]} == {7}
    assert "orthogonalize_factors" in {row["op"] for row in found["rows"]}
    assert (found["source"], found["adapters"], found["modules"]) == ("adapters", 3, 3)
    assert found["factor_bytes"] == SMALL.factor_bytes


def test_bench_measures_the_first_modules_alone(tmp_path):
    """Of adapters that all have the same modules."""
    shapes = (Shape("q", 12, 40), Shape("k", 6, 7))
    paths = Workload("alike", "", (Member(3, shapes), Member(5, shapes))).write(tmp_path)
    found = bench([str(path) for path in paths], modules=1, backends=["cpu"])
    assert (found.adapters, found.modules) == (2, 1)
    assert found.rows


def test_a_wrong_backend_gets_no_figures_and_exit_code_1(tmp_path, monkeypatch, capsys):
    right = cpu.block_gram
    monkeypatch.setattr(cpu, "block_gram", lambda p: [1.01 * k for k in right(p)])
    report = tmp_path / "f.json"
    line = f"bench --workload llama-tiny --modules 2 --save-json {report}"
    assert cli.main(line.split()) == 1
    printed = capsys.readouterr()
    (error,) = printed.err.splitlines()
    assert error.startswith("domerge-fast: error: backend 'cpu' disagrees with the reference (")
    assert "block_gram is off by 1.0e-02" in error
    found = json.loads(report.read_text())
    assert "cpu" not in {row["backend"] for row in found["rows"]}
    assert found["errors"]["cpu"]["block_gram"] == pytest.approx(0.01)
    assert "torch" in {row["backend"] for row in found["rows"]}


def test_only_what_waits_for_nothing_becomes_a_graph():
    def captured(device: str, own: int = 256) -> set[tuple[str, str]]:
        pairs = ((op, b) for op in ops.__all__ for b in ("cuda", "triton", "torch"))
        rest = torch.device(device), own
        return {(op, b) for op, b in pairs if measure._captures({op}, b, *rest)}

    usual = {(op, b) for op in measure.CAPTURED for b in ("cuda", "triton")}
    assert captured("cuda") == usual
    assert captured("cpu") == set()
    decoupled = {("apply_decouple", b) for b in ("cuda", "triton")}
    assert captured("cuda", own=257) == usual - decoupled
    gpu, merge = torch.device("cuda"), {*measure.CAPTURED}
    assert measure._captures(merge, "cuda", gpu, 256)
    assert not measure._captures(merge, "cuda", gpu, 257)
    assert not measure._captures(merge | {"orthogonalize_factors"}, "triton", gpu, 64)


def test_modules_that_do_not_fit_are_left_out(monkeypatch):
    monkeypatch.setattr(measure.machine, "free_bytes", lambda device: 60 * measure.ROOM)
    assert measure.modules_that_fit({"a": 30, "b": 30, "c": 1}, None, CPU) == ["a", "b"]
    assert measure.modules_that_fit({"a": 30, "b": 30, "c": 1}, 1, CPU) == ["a"]
    with pytest.raises(dm.DomergeError, match="no module fits"):
        measure.modules_that_fit({"a": 61}, None, CPU)


WRONG = {
    "--workload lama-tiny": "'lama-tiny' is not known; did you mean 'llama-tiny'?",
    "--workload llama-tiny --modules 0": "option 'modules': 0 is too small; use at least 1",
    "--workload llama-tiny --repeat 4": "option 'repeat': 4 is too small; use at least 5",
    "--workload llama-tiny --backend gpu": "option 'backend': 'gpu' is not known",
    "--workload llama-tiny --device tpu": "option 'device': torch cannot use 'tpu' here",
    "a --workload llama-tiny": "option 'workload': adapters are given too; give one or the other",
    "a b": "adapter 'a': no such folder; check the path",
    "--workload llama-tiny --save-json none/f": "output 'none/f': its folder does not exist",
    "--workload llama-tiny --plot .": "output '.': is a folder; give the name of a file",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_not_understood_is_one_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *line.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (error,) = printed.err.splitlines()
    assert WRONG[line] in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_call_is_repeated_by_its_replay():
    x = torch.zeros(1000, device="cuda")
    y = torch.empty_like(x)
    replay = timing.captured(lambda: y.copy_(2 * x + 1), x.device)
    x.fill_(3)
    replay()
    assert bool((y == 7).all())
    assert timing.seconds(replay, x.device) > 0


@pytest.mark.parametrize(("seconds", "sizes"), [(0.9, [16, 64]), (1.1, [16])])
def test_a_gemm_that_would_take_long_is_a_small_one(seconds, sizes, monkeypatch):
    """As one of bfloat16 where the processor has no instructions for it."""
    asked = []

    def rate(size: int, name: str, device: torch.device) -> float:
        asked.append(size)
        return 2 * 64**3 / (seconds * bounds.GEMM_SECONDS)

    monkeypatch.setattr(bounds, "_gemm_of", rate)
    assert bounds._gemm("bfloat16", CPU) == rate(0, "", CPU)
    assert asked[:-1] == sizes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_own_kernels_are_timed_as_graphs_too(monkeypatch):
    monkeypatch.setattr(bounds, "COPY_BYTES", {"cuda": 1 << 28})
    monkeypatch.setattr(bounds, "GEMM_SIZE", {"cuda": 1024})
    result = bench(workload="llama-tiny", device="cuda")
    assert result.refused == {}
    assert "tf32" in result.rates.gemm
    own = {"cuda", "triton"} & set(measure.usable(torch.device("cuda")))
    assert {(r.op, r.backend) for r in result.rows if r.graph} == {
        (op, backend) for op in (*measure.CAPTURED, measure.MERGE) for backend in own
    }


def test_without_matplotlib_there_is_no_plot_and_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(measure, "run", lambda *given: pytest.fail("measured"))
    assert cli.main(["bench", "--workload", "llama-tiny", "--plot", "f.png"]) == 2
    assert "--plot needs matplotlib; pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--save-json", "--plot"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_told_in_one_line(flag, capsys):
    command = ["bench", "--workload", "llama-tiny", "--modules", "1", "--backend", "cpu"]
    assert cli.main([*command, flag, "/dev/full"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "/dev/full" in line
    assert "cannot be written" in line
