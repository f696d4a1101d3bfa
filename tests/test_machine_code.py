"""The CUDA kernels' machine code against what tests/data/machine_code.json has of it.

The quick tests read the record, which is of the sources there are; the slow one compiles them.
"""

from __future__ import annotations

import shutil

import machine_code
import pytest
from machine_code import ARCHS, fingerprint, read, record, sources

FEWER, MORE = 0.95, 1.05
"""How far another nvcc may be off in what it makes of a loop."""

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None or machine_code.disassembler() is None,
    reason="no nvcc, or no disassembler",
)
every_source = pytest.mark.parametrize("source", sources())


def rows(source: str) -> dict[tuple[int, str], dict]:
    kept = record()[source]
    return {(arch, name): row for arch in ARCHS for name, row in kept[str(arch)].items()}


def test_the_record_has_every_source():
    assert set(record()) == set(sources())


@every_source
def test_the_record_is_of_these_sources(source):
    """python tests/machine_code.py makes it anew, where there is an nvcc."""
    assert record()[source]["sources"] == fingerprint(source)


@every_source
def test_no_kernel_spills_registers(source):
    assert {key for key, row in rows(source).items() if row["spilled"]} == set()


MOST_OF_GRAMS = {"16": 13, "32": 9, "64": 5, "128": 4}
"""Instructions for each matrix product; what a warp loads and splits serves more in large tiles."""


def test_grams_are_made_on_tensor_cores():
    for (_, name), row in rows("gram").items():
        if not name.startswith("Gram"):
            continue
        assert row["loop"]["HMMA"] > 0, name
        assert "FFMA" not in row["loop"], name
        most = MOST_OF_GRAMS[name.split(", ")[1][:-1]]
        assert len(row["matrix"]) == (4 if name.endswith(" 128>") else 2), name
        for way in row["matrix"]:
            assert 0 < way.get("LDSM", 0) + way.get("LDS32", 0) <= way["HMMA"], name
            assert way["all"] <= most * way["HMMA"], name


def test_grams_of_float32_take_three_products_of_parts():
    """For every 16-bit product there are three of half its depth, in half as many columns."""
    found = rows("gram")
    for (arch, name), row in found.items():
        if not name.startswith("Gram<Float32"):
            continue
        halves = found[arch, name.replace("Float32", "BFloat16")]
        products = [way["HMMA"] for way in row["matrix"]]
        assert products == [3 * way["HMMA"] for way in halves["matrix"]], name
        for kind in ("LDSM", "LDS32"):  # X in rows, and in columns
            assert 2 * sum(kind in way for way in row["matrix"]) == len(products), name


def test_block_grams_are_made_on_tensor_cores_in_float64():
    """Two ways of every tile, beside the diagonal first: of 16 x 8 on sm_90, elsewhere of 8 x 8."""
    for (arch, name), row in rows("block_gram").items():
        of_tiles = (128, 80, 48, 32, 16) if arch == 90 else (256, 144, 80, 48, 16)
        wanted = [n // (2 if "Float32" in name else 1) for n in of_tiles for _ in range(2)]
        assert [way["DMMA"] for way in row["matrix"]] == wanted, name
        assert not any("DFMA" in way for way in row["matrix"]), name
        if arch != 120:  # whose float64 is slow: there each waits for the one before
            assert all(way["all"] <= 4 * way["DMMA"] + 24 for way in row["matrix"]), name


def test_descents_take_three_products_of_parts():
    """Operands along their rows, and down their columns: a number takes a load and three
    instructions that split it, a block of 16 x 8 three products."""
    for (_, name), row in rows("orthogonalize").items():
        blocks = {16: (1, 2), 32: (2, 2), 64: (2, 2), 96: (3, 3), 128: (4, 4), 192: (2, 6)}
        m, n = blocks.get(int(name[8:-1]), (2, 8))
        hmma, loads, every = (
            sum(part.get(kind, 0) for part in row["matrix"]) for kind in ("HMMA", "LDS32", "all")
        )
        ways, rest = divmod(hmma, 3 * m * n)  # a way may be in several stretches
        assert ways >= 2, name
        assert rest == 0, name
        assert loads == ways * (4 * m + 2 * n), name
        assert every <= 4 * loads + hmma + 60 * ways, name


def test_tiles_of_descents_take_three_products_of_parts():
    """Of 4 x 4 blocks of a warp, from panels either way."""
    for (_, name), row in rows("descent_tiles").items():
        if name not in ("Gradient", "Metric", "Changes"):
            continue
        hmma, loads, every = (
            sum(part.get(kind, 0) for part in row["matrix"]) for kind in ("HMMA", "LDS32", "all")
        )
        assert (hmma, loads) == (48, 24), name
        assert every <= 4 * hmma + 12, name
        assert row["stores"]["STG64"] >= 8, name


def test_products_of_16_bit_factors_are_made_on_tensor_cores_and_stored_in_whole_vectors():
    for (_, name), row in rows("apply").items():
        if not name.startswith("TensorApply"):
            continue
        loop = row["loop"]
        assert loop["HMMA"] > loop["LDSM"] > 0, name
        assert "FFMA" not in loop, name
        assert all(x["all"] <= 5 * x["HMMA"] for x in row["matrix"]), name
        assert row["stores"]["STG128"] >= 4, name


def test_c_is_split_once_and_its_parts_come_in_whole_vectors():
    """Two copies of eight numbers, in what blocks of products repeat."""
    for (_, name), row in rows("split").items():
        assert row["stores"]["STG128"] == 2, name
    for source in ("apply", "apply_decouple"):
        for (_, name), row in rows(source).items():
            if name.startswith("TensorApply") or name.endswith(" 512, true>"):
                assert row["loop"]["LDGSTS128"] > 2, name


def test_decoupled_products_are_made_on_tensor_cores_and_so_are_magnitudes_of_all_formats():
    for (_, name), row in rows("apply_decouple").items():
        products = [x for x in row["matrix"] if "LDSM" in x]
        magnitudes = [x for x in row["matrix"] if "LDSM" not in x]
        assert bool(products) == name.endswith("true>"), name
        assert all(x["HMMA"] > x["LDSM"] and x["all"] <= 5 * x["HMMA"] for x in products), name
        # Three of 16 x 8 x 8 for each of eight blocks, or four.
        assert [x["HMMA"] for x in magnitudes] == [24, 12], name
        assert [x["all"] <= most for x, most in zip(magnitudes, (180, 150))] == [True, True], name
        assert row["stores"]["STG128"] >= 2, name


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
@every_source
def test_the_machine_code_is_no_worse_than_recorded(source, arch):
    kept, found = record()[source][str(arch)], read(source, arch)
    assert set(found) == set(kept)
    for name, row in found.items():
        before, loop = kept[name]["loop"], row["loop"]
        assert row["spilled"] <= kept[name]["spilled"], name
        assert loop["all"] <= MORE * before["all"], name
        for kind in ("HMMA", "LDG128", "LDGSTS128", "LDSM", "LDS128"):
            assert loop.get(kind, 0) >= FEWER * before.get(kind, 0), (name, kind)
        wide = ("STG128", "STG64")
        stores, stored = (sum(r["stores"].get(k, 0) for k in wide) for r in (row, kept[name]))
        assert stores >= FEWER * stored, name
