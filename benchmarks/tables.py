"""Results as Markdown."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from files import FLOOR, SVD
from rivals import LITERAL, PEFT_SVD

Result = Mapping[str, Any]
HEADLINE = "llama3-8b-8"


class Row(NamedTuple):
    """A contender: its median, or what it is reckoned to take, and how that was found.

    seconds is None where it does not fit in memory.
    """

    name: str
    seconds: float | None
    spread: str
    how: str


def rows(result: Result) -> dict[str, Row]:
    """All contenders by key: the floor, backends, `svd`, rivals in memory, mergekit."""
    found = {}
    for key, times in result["seconds"].items():
        spread = f"{digits(min(times))} to {digits(max(times))}" if len(times) > 1 else ""
        count = f"{len(times)} runs" if len(times) > 1 else "one run"
        found[key] = Row(_label(key, result), statistics.median(times), spread, f"files, {count}")
    for key, e in result.get("extrapolated", {}).items():
        if e["needs"]:
            how = f"would take {e['needs'] / 2**30:.0f} GiB of memory"
            found[key] = Row(key, None, "", how)
            continue
        how = "in memory, extrapolated from one of each shape"
        if e["scaled"]:
            how += f"; shapes of {e['scaled']} modules scaled"
        found[key] = Row(key, e["seconds"], "", how)
    if "mergekit" in result:
        for method, total in result["mergekit"]["seconds"].items():
            how = f"files, extrapolated from 1 of {result['mergekit']['layers']} layers"
            name = f"mergekit {result['mergekit']['version']} {method}, extract-lora"
            found[f"mergekit {method}"] = Row(name, total, "", how)
    return found


def first_backend(result: Result) -> str:
    return next(key for key in result["seconds"] if key != FLOOR)


def one(name: str, result: Result) -> str:
    """The table of a workload's result, of the scaling or of `orthogonalize`."""
    special = {"scaling": growth, "orthogonalize": descent, "methods": methods}
    return special.get(name, workload)(result)


def workload(result: Result) -> str:
    """Every contender beside the copy floor and beside `do` on the first backend."""
    found = rows(result)
    first = first_backend(result)
    floor, best = found[FLOOR].seconds, found[first].seconds
    lines = [
        f"| | seconds | spread | how | × copy floor | × `do`, {first} |",
        "|---|---|---|---|---|---|",
    ]
    for row in (*_least(result, floor), *found.values()):
        ratios = ["", ""]
        if row.seconds is not None:
            ratios = [_ratio(row.seconds / floor), _ratio(row.seconds / best)]
        shown = "" if row.seconds is None else digits(row.seconds)
        lines.append(f"| {row.name} | {shown} | {row.spread} | {row.how} | {' | '.join(ratios)} |")
    return "\n".join([*lines, "", caption(result)])


def _least(result: Result, floor: float) -> list[Row]:
    """The bound of the arithmetic; where it is flops on a CPU, also that with the floor's work,
    which takes the same cores, shared out among them."""
    bound, machine = result["least"], result["machine"]
    how = f"{bound['limit']} at this machine's rate"
    found = [Row("least for `do`", bound["seconds"], "", how)]
    if bound["limit"] == "flops" and "gpu" not in machine:
        how = f"the same and the copy floor's work, on {machine['threads']} threads"
        both = bound["seconds"] + floor / machine["threads"]
        found.append(Row("least for `do` and its files", both, "", how))
    return found


def caption(result: Result) -> str:
    part, whole = result["modules"], result["modules_in_all"]
    of = "" if part == whole else f" of {whole} (so the whole takes {whole / part:g} times that)"
    peaks = result["peak_bytes"]
    over = ", ".join(
        f"{(peak - peaks['idle']) >> 20} MiB (`{method}`)"
        for method, peak in peaks.items()
        if method != "idle"
    )
    bound = result["least"]
    busy = ""
    if "core_seconds" in result:
        cores = result["core_seconds"] / sum(result["stages"]["main"].values())
        busy = f" Its last run kept {cores:.2f} of {result['machine']['threads']} cores busy."
    gemm = ", ".join(f"{rate / 1e9:.0f} ({name})" for name, rate in bound["gemm"].items())
    return (
        f"`{result['workload']}`: {result['adapters']} adapters of rank {result['rank']} at most, "
        f"{part}{of} modules, {result['factor_bytes'] / 1e9:.3g} GB of bfloat16 factors; "
        f"{where(result['machine'])}. Largest relative error of ΔW against the float64 reference: "
        f"{max(result['errors'].values()):.1e}. Peak memory over an idle process: "
        f"{over}, in groups of {result['group_bytes'] >> 20} MiB.{busy} `do` takes "
        f"{bound['flops'] / 1e9:.3g} GFLOP and {bound['bytes'] / 1e9:.3g} GB at least; measured in "
        f"the same run: copy {bound['copy'] / 1e9:.3g} GB/s; GEMM GFLOP/s: {gemm}."
        f"{' ' + result['note'] if 'note' in result else ''}"
    )


def where(machine: Mapping[str, Any]) -> str:
    isa = machine.get("instruction set")
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    cpu = f"{machine['cpu']}{f' ({isa})' if isa else ''}, {threads}"
    return f"{machine.get('gpu', cpu)}, torch {machine['torch']}, Python {machine['python']}"


def stages(results: Mapping[str, Result]) -> str:
    """Seconds of the main thread by stage, and of the two that read and write beside it."""
    with_stages = {name: r["stages"] for name, r in results.items() if "stages" in r}
    names = list(
        dict.fromkeys(
            (thread, stage)
            for threads in with_stages.values()
            for thread, found in threads.items()
            for stage in found
        )
    )
    names.sort(key=lambda key: key[0] != "main")
    head = [f"{stage}" if thread == "main" else f"({stage})" for thread, stage in names]
    lines = ["| | " + " | ".join(head) + " |", "|---" * (len(names) + 1) + "|"]
    for name, threads in with_stages.items():
        cells = [threads.get(thread, {}).get(stage) for thread, stage in names]
        shown = ["" if x is None else digits(x) for x in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def growth(result: Result) -> str:
    """Milliseconds and descent steps of every point of the scaling."""
    lines = ["| grows | value | ms | spread | steps of the descent |", "|---|---|---|---|---|"]
    for name, points in result["series"].items():
        for value, point in points.items():
            times = [1000 * t for t in point["seconds"]]
            lines.append(
                f"| {name} | {value} | {statistics.median(times):.1f} "
                f"| {min(times):.1f} to {max(times):.1f} | {point['steps']:.1f} |"
            )
    u = result["usual"]
    usual = (
        f"Otherwise {u['modules']} modules of {u['width']} × {u['width']}, {u['adapters']} "
        f"adapters of rank {u['rank']}, backend `{result['backend']}`; {where(result['machine'])}."
    )
    return "\n".join([*lines, "", usual])


def descent(result: Result) -> str:
    """GFLOP/s of `orthogonalize` and of sgemm, taking turns."""
    size, flops = result["sgemm"]["size"], result["sgemm"]["flops"]
    lines = [
        f"| R | problems | steps | `orthogonalize` GFLOP/s | sgemm {size}³ GFLOP/s | share |",
        "|---|---|---|---|---|---|",
    ]
    for rank, row in result["ranks"].items():
        rate = row["flops"] / statistics.median(row["seconds"]) / 1e9
        sgemm = flops / statistics.median(row["sgemm"]) / 1e9
        lines.append(
            f"| {rank} | {row['problems']} | {row['steps']:.1f} | {rate:.0f} | {sgemm:.0f} "
            f"| {100 * rate / sgemm:.0f} % |"
        )
    return "\n".join([*lines, "", f"Backend `{result['backend']}`; {where(result['machine'])}."])


def methods(result: Result) -> str:
    """Seconds and peak memory of methods and of their dense forms."""
    lines = [
        "| method | seconds | dense form | ratio | peak MiB | dense form | ratio | of |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["methods"].items():
        # The largest module that both have run.
        shared = [m for m in row["dense_peak_bytes"] if m in row["peak_bytes"]][-1]
        mine, theirs = row["peak_bytes"][shared], row["dense_peak_bytes"][shared]
        scaled = f"; {row['scaled']} modules scaled" if row["scaled"] else ""
        less = _ratio(theirs / mine) if mine >= 1 << 20 else ""
        lines.append(
            f"| `{name}` | {digits(row['seconds'])} | {digits(row['dense'])}{scaled} "
            f"| {_ratio(row['dense'] / row['seconds'])} | {mine >> 20} | {theirs >> 20} "
            f"| {less} | {shared} |"
        )
    usual = (
        f"`{result['workload']}`, {result['modules']} modules, extrapolated from one of each "
        f"shape; backend `{result['backend']}`; {where(result['machine'])}."
    )
    return "\n".join([*lines, "", usual])


def headline(result: Result) -> str:
    """The few figures for README.md, in sentences, and the machine they come from."""
    first = first_backend(result)
    found = {key: row.seconds for key, row in rows(result).items() if row.seconds is not None}
    best = found[first]
    rivals = {
        "torch": "the same in plain PyTorch, in factor space",
        LITERAL: "the method as printed, with dense matrices",
        PEFT_SVD: f"PEFT's `svd` to rank {result['rank']}",
        "mergekit task_arithmetic": "mergekit's task arithmetic on full models",
    }
    others = [f"{what}: {_ratio(found[x] / best)}" for x, what in rivals.items() if x in found]
    peaks = result["peak_bytes"]
    text = (
        f"DO-Merging of {result['adapters']} rank-{result['rank']} adapters of a Llama-3-8B (all "
        f"projections of 32 layers, {result['factor_bytes'] / 1e9:.2f} GB of bfloat16 factors), "
        f"files to files, took {digits(best)} s and {(peaks['do'] - peaks['idle']) >> 20} MiB of "
        f"memory; reading and writing the same bytes took {digits(found[FLOOR])} s. So many times "
        f"as long took others (all but the first extrapolated), {'; '.join(others)}. "
        f"{where(result['machine'])}; medians of {len(result['seconds'][first])}."
    )
    return textwrap.fill(text, 100)


def _label(key: str, result: Result) -> str:
    if key == FLOOR:
        return key
    backend, _, method = key.partition(" ")
    what = f"`svd` to rank {result['rank']}" if method == SVD else "`do`"
    return f"{what}, {backend}"


def digits(x: float) -> str:
    """Three digits."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def _ratio(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.2g}" if x >= 10 else f"{x:.2f}"
