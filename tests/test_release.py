"""What a release is made of: its metadata, and the files that programs and people read it from."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cffconvert import Citation
from validate_pyproject import api, errors

from domerge_fast import __version__

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture
def project() -> dict[str, Any]:
    """pyproject.toml, whole."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib is new in Python 3.11")
    return tomllib.loads(read("pyproject.toml"))


def test_pyproject_follows_the_schemas_of_its_tables(project, monkeypatch):
    pytest.importorskip("cibuildwheel", reason="cibuildwheel needs Python 3.11")
    monkeypatch.setenv("VALIDATE_PYPROJECT_NO_NETWORK", "1")
    validate = api.Validator()
    validate(project)
    project["tool"]["cibuildwheel"]["test-comand"] = "pytest"
    with pytest.raises(errors.ValidationError, match="cibuildwheel"):
        validate(project)


def test_classifiers_name_the_pythons_that_wheels_are_built_for(project):
    pytest.importorskip("cibuildwheel", reason="cibuildwheel needs Python 3.11")
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform"]
    command += ["linux", "--archs", "x86_64,aarch64", str(ROOT)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [
        f"cp{version.replace('.', '')}-manylinux_{machine}"
        for machine in ("x86_64", "aarch64")
        for version in PYTHONS
    ]
    start = "Programming Language :: Python :: 3."
    listed = [c for c in project["project"]["classifiers"] if c.startswith(start)]
    assert [c.rpartition(" ")[2] for c in listed] == [*PYTHONS]
    assert project["project"]["requires-python"] == f">={PYTHONS[0]}"


def test_the_citation_follows_its_schema_and_names_this_version():
    text = read("CITATION.cff")
    Citation(text).validate()
    assert yaml.safe_load(text)["version"] == __version__
    with pytest.raises(Exception, match="cff-version"):
        Citation(text.replace("cff-version", "cff"))


def test_the_changelog_is_in_the_form_that_it_names():
    text = read("CHANGELOG.md")
    heads = re.findall(r"^## (.*)$", text, re.M)
    assert heads[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", head) for head in heads[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for part in text.split("\n## ")[1:]:
        found = re.findall(r"^### (.*)$", part, re.M)
        assert found
        assert set(found) <= kinds
        assert len(found) == len(set(found))
