"""The format of a merge: what is asked for, or the adapters' own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.make import PAIR, random_factors, write_pair

import domerge_fast as dm
from domerge_fast.adapters import Style
from domerge_fast.errors import AdapterError, OptionError
from domerge_fast.formats import FORMATS
from domerge_fast.formats.format import Format, Holds
from domerge_fast.formats.peft.write import PEFT, PeftFolder


def styled(seed: int, **style: str) -> dm.Adapter:
    made = dm.from_tensors(random_factors(PAIR, 4, seed=seed), name=f"x{seed}")
    return dataclasses.replace(made, style=Style(**style))


@pytest.fixture
def rows(monkeypatch):
    """Formats "other" (one rank, nothing but linear layers), "strange" (own names), "old" (only
    read)."""
    for row in (
        Format("other", "as PEFT", write=PeftFolder),
        Format("strange", "as PEFT", write=PeftFolder, names="strange", holds=Holds(alphas=True)),
        Format("old", "only read", read=PEFT.read),
    ):
        monkeypatch.setitem(FORMATS.own, row.name, row)


def test_it_is_that_of_the_adapters(rows, tmp_path):
    merged = dm.merge([styled(k, format="other") for k in range(2)], "linear")
    assert merged.report.recipe.format == "other"
    assert merged.target.styles == (Style("other"),) * 2
    peft = dm.merge(write_pair(tmp_path), "linear")
    assert peft.report.recipe.format == "peft"
    plain = dm.merge([dm.from_tensors(random_factors(PAIR, 4))], "linear")
    assert plain.report.recipe.format == "peft"
    assert plain.target.styles == ()
    assert not [note for note in plain.report.notes if "format" in note]


def test_it_is_peft_s_where_the_adapters_have_several_or_theirs_is_only_read(rows):
    several = dm.merge([styled(1, format="other"), styled(2, format="peft")], "linear")
    assert several.report.recipe.format == "peft"
    assert any("'other' and 'peft' are the adapters' formats" in x for x in several.report.notes)
    old = dm.merge([styled(1, format="old")], "linear")
    assert old.report.recipe.format == "peft"
    assert any("'old' is only read: written in 'peft'" in x for x in old.report.notes)


def test_what_is_asked_for_is_kept_in_the_recipe(rows, tmp_path):
    pair = write_pair(tmp_path)
    dm.merge(pair, "linear", format="other", output=tmp_path / "out")
    recipe = dm.Recipe.read(tmp_path / "out", tmp_path)
    assert recipe.format == "other"
    dm.run(recipe, output=tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"format": "old"}, "'old' is only read; use one of: peft, "),
        (
            {"format": "deltas"},
            "'deltas' is of the form 'deltas', not 'adapter'; say form='deltas'",
        ),
        ({"format": "peft", "form": "deltas"}, "'peft' is of the form 'adapter', not 'deltas'"),
        ({"format": "pfet"}, "did you mean 'peft'?"),
        ({"form": "peft"}, "'peft' is not known"),
        ({"format": "strange"}, "'strange' is not written with the names of modules that 'peft'"),
        ({"format": "other", "ragged": True}, "'other' has one rank for all modules; leave it out"),
        ({"format": 3}, "3 is no text"),
    ],
)
def test_what_cannot_be_written_is_told(rows, tmp_path, asked, said):
    with pytest.raises(OptionError) as caught:
        dm.merge(write_pair(tmp_path), "linear", **asked)
    assert said in str(caught.value)


def test_energy_is_cut_by_module_and_written_with_one_rank_where_a_format_has_one(rows, tmp_path):
    pair = write_pair(tmp_path)
    dm.merge(pair, "linear", energy=0.9, format="other", output=tmp_path / "out")
    ranks = {a.shape[0] for a, _ in dm.load(tmp_path / "out").stored.values()}
    assert len(ranks) == 1


def test_a_format_with_an_alpha_a_module_is_not_padded(rows):
    assert dm.merge([styled(1, format="strange", names="strange")], "linear").target.rank is None


@pytest.mark.parametrize("what", ["embeddings", "convolutions"])
def test_a_merge_that_a_format_cannot_hold_is_refused(rows, what):
    a, b = random_factors({"x": (8, 6)}, 2)["x"]
    factors = {"x": (a, b)} if what == "embeddings" else {"x": (a[:, :, None], b[:, :, None])}
    adapter = dm.from_tensors(factors, embeddings=["x"] if what == "embeddings" else [])
    with pytest.raises(OptionError, match=f"'other' holds no {what}, as 'x' is"):
        dm.merge([adapter], "linear", format="other")


def test_adapters_with_names_of_different_kinds_are_refused(rows):
    pair = [styled(1, format="strange", names="strange"), styled(2, format="peft")]
    with pytest.raises(AdapterError, match="'x2': has the format 'peft', adapter 'x1' 'strange'"):
        dm.merge(pair, "linear")
    with pytest.raises(AdapterError, match="merge adapters of one format"):
        dm.inspect(pair)
    plain = dm.from_tensors(random_factors(PAIR, 4), name="plain")
    assert dm.merge([pair[0], plain], "linear").report.recipe.format == "strange"


def test_a_sequential_merge_keeps_the_model_s_names(rows, tmp_path):
    state = dm.Sequential.start(tmp_path / "state")
    with pytest.raises(AdapterError, match="'strange', which cannot grow one by one"):
        state.add(styled(1, format="strange", names="strange"))


def test_who_knows_a_file_better_is_asked_before_those_that_take_any(monkeypatch, tmp_path):
    """Also of another package; one that fails at it is passed over."""

    def failing(path: Path) -> bool:
        raise NotADirectoryError(path)

    def read(path: Path, name: str) -> dm.Adapter:
        return dm.from_tensors(random_factors(PAIR, 4), name=name)

    rows = (
        Format("failing", "none", failing, read),
        Format("named", "one file", lambda path: path.name == "named.safetensors", read),
    )
    monkeypatch.setitem(vars(FORMATS), "_outside", ({row.name: row for row in rows}, {}))
    for name in ("named", "other"):
        save_file({"x::down": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    style = dm.load(tmp_path / "named.safetensors").style
    assert style
    assert style.format == "named"
    with pytest.raises(AdapterError, match="is no part of a LoRA that is known here"):
        dm.load(tmp_path / "other.safetensors")
