"""PEFT's patterns of module names: the answers of `re`, in linear time."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import time
import warnings

import pytest
from support.make import random_factors, write_adapter

from domerge_fast.errors import AdapterError
from domerge_fast.formats import load
from domerge_fast.formats.peft.patterns import BadPattern, Patterns

NAMES = [
    *("a", "b", "ab", "aab", "a.b", "b.a", "a-b", "a1", "1", "12", ".", "..", "{", "a{", "]", "-"),
    *("layers.1.q_proj", "layers.12.q_proj", "model.layers.2.a", "q_proj", "x.q_proj", "q-proj"),
    *("model.layers.0.mlp.experts.11.up", "aa.bb.a", "model.ab", "Ä.é", "٣", "a b", "q_projx"),
]
REAL = [
    *("q_proj", "layers.1.q_proj", r"layers\.1\.q_proj", r"^layers\.1\.q_proj", "^(?:a|b|q_proj)"),
    *(r".*\.q_proj", r"layers\.\d+\.q_proj", r"layers\.(0|1|12)\..*", r"[a-z]+\.[0-9]{1,2}\..+"),
    *("(?:model.)?layers.2.a", r"a\-b", "a|b", "^a|b", "(a|b)", "q_proj$", "q.proj", "", ".", ".*"),
    *(r"\w+", r"\W", r"[^.]+", r"[\w-]+", r"\d", r"[\d]{2}", "a*?b", "(a+)+b", "[]]", "[^]a]", "{"),
    *("(((a)))", "a{2}b", "a{,2}b", "a{1,}b", "(|a)b", r"\{", "a.b", "^model", "x{a}", "{}", "é"),
]
PARTS = [
    *("a", "b", "q_proj", "layers", ".", r"\.", r"\d", r"\w", r"\W", r"\s", "[ab]", "[^a]", "1"),
    *("[0-9_]", "(", "(?:", ")", "|", "*", "+", "?", "{2}", "{1,2}", "{,1}", "{0}", "^", "$", "-"),
    *("]", "[", "*?", r"\-", "{", "}"),
]


def first(keys: list[str], name: str) -> int | None:
    """PEFT's `get_pattern_key`."""
    found = (i for i, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", name))
    return next(found, None)


def is_expression(key: str) -> bool:
    try:
        re.compile(key)
    except re.error:
        return False
    return True


@pytest.mark.parametrize("key", REAL)
def test_real_keys_match_as_in_peft(key):
    patterns = Patterns([key])
    assert [patterns.first(name) for name in NAMES] == [first([key], name) for name in NAMES]


def test_the_first_of_many_holds():
    rng = random.Random(0)
    for _ in range(300):
        keys = rng.choices(REAL, k=rng.randint(2, 8))
        patterns = Patterns(keys)
        assert [patterns.first(name) for name in NAMES] == [first(keys, name) for name in NAMES]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_made_up_keys_match_as_in_re_or_are_refused():
    rng, counts = random.Random(0), [0, 0]
    for _ in range(6000):
        key = "".join(rng.choices(PARTS, k=rng.randint(1, 6)))
        try:
            patterns = Patterns([key])
        except BadPattern:
            # Those with "+" after a repetition never go back, from Python 3.11 on.
            assert not is_expression(key) or re.search(r"[*+?}]\+", key), key
            counts[0] += 1
            continue
        assert is_expression(key), key
        counts[1] += 1
        for name in NAMES:
            assert patterns.first(name) == first([key], name), (key, name)
    assert min(counts) > 1000


@pytest.mark.parametrize(
    "key",
    [
        *(r"(a)\1", "(?=a)b", "(?!a)", "(?<=a)b", "(?P<x>a)", "(?i)a", r"\ba", r"\Aa", r"a\Z"),
        *("a**", "a*+", "(", ")", "a)|(b", "[", "[b-a]", r"[a-\d]", "*a", "a{2,1}", "^*", "\\"),
        *("a{99999}", "(" * 100 + ")" * 100, "((a{99}){99}){99}", "(?:){9999}" * 3),
    ],
)
def test_what_is_not_understood_is_refused_by_its_key(key, tmp_path):
    with pytest.raises(BadPattern):
        Patterns(["a", key])
    factors = random_factors({"q": (4, 6)}, 2)
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(AdapterError) as caught:
            load(write_adapter(tmp_path, factors, **{field: {key: 2}}))
        assert f"{field} has {key!r}, which " in str(caught.value) or len(key) > 80
        assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    "key",
    [
        r"([a-z0-9_.]+)*X",
        "(a+)+$",
        "(a|a)*b",
        "(a|aa)+c",
        "(.*)*(.*)*x",
        "(a?){200}a{200}",
        "a.{900}x",
    ],
)
def test_no_key_takes_long(key):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started = time.perf_counter()
        with contextlib.suppress(BadPattern):  # as too large, or too long to match
            patterns = Patterns([key])
            for name in ("a" * 400, "a." * 200, "model.layers.0.self_attn.q_proj"):
                patterns.first(name)
        assert time.perf_counter() - started < 10


def test_a_library_of_experts_is_matched_in_seconds():
    parts = "gate_proj", "up_proj", "down_proj"
    grid = itertools.product(range(48), range(128), parts)
    names = [f"model.layers.{layer}.mlp.experts.{e}.{part}" for layer, e, part in grid]
    started = time.perf_counter()
    plain = Patterns(names)
    assert [plain.first(name) for name in names] == list(range(len(names)))
    grouped = Patterns([f"^(?:{'|'.join(map(re.escape, names[::2]))})", r".*experts\.\d+\..*"])
    assert [grouped.first(name) for name in names] == [0, 1] * (len(names) // 2)
    assert time.perf_counter() - started < 20


def test_dots_in_a_name_stand_for_any_character():
    patterns = Patterns([r"q\.proj", "x.y.z", "q.proj"])
    found = [patterns.first(name) for name in ("q.proj", "q_proj", "m.q-proj", "xayaz", "m.x.y.z")]
    assert found == [0, 2, 2, 1, 1]


def test_no_name_has_a_line_break(tmp_path):
    with pytest.raises(AdapterError, match="unknown tensor"):
        load(write_adapter(tmp_path, random_factors({"a\nq": (4, 6)}, 2)))


def test_expressions_that_are_only_carried_are_never_run(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an expression was compiled")

    bomb = r"([a-z0-9_.]+)*X"
    folder = write_adapter(
        tmp_path, random_factors({"q": (4, 6)}, 2), target_modules=bomb, exclude_modules=bomb
    )
    monkeypatch.setattr(re, "compile", refuse)
    monkeypatch.setattr(re, "match", refuse)
    monkeypatch.setattr(re, "fullmatch", refuse)
    adapter = load(folder)
    assert adapter.config.target_modules == adapter.config.exclude_modules == bomb
