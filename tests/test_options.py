"""What a user can get wrong in the arguments of a merge, and what they are told."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re

import pytest
from support.shapes import CASES

import domerge_fast as dm
from domerge_fast import aliases, options
from domerge_fast.formats import from_tensors
from domerge_fast.methods import TABLE
from domerge_fast.methods.do import DoOptions

CASE = CASES["odd d"]
ADAPTERS = [
    from_tensors({"x": (a, b)}, name=f"adapter-{i}")
    for i, (a, b) in enumerate(zip(CASE.a, CASE.b, strict=True))
]

UNKNOWN = {
    "gama": "option 'gama': method 'do' has no such option; did you mean 'gamma'? use one of:",
    "orthogonalise": "did you mean 'orthogonalize'?",
    "zzz": "option 'zzz': method 'do' has no such option; use one of: orthogonalize, decouple,",
}

WRONG = {
    "penalty": [
        ("square", "option 'penalty': 'square' is not known; did you mean 'squared'?"),
        (1, "use one of: squared, frobenius"),
        (None, "use one of: squared, frobenius"),
    ],
    "sides": [
        ("booth", "did you mean 'both'? use one of: both, A, B"),
        (["A"], "['A'] is not known; use one of: both, A, B"),
    ],
    "gamma": [
        (-1, "option 'gamma': -1 is too small; use at least 0"),
        ("1", "'1' is not a finite number; give one"),
        (True, "True is not a finite number; give one"),
        (math.nan, "nan is not a finite number"),
        (math.inf, "inf is not a finite number"),
        (None, "None is not a finite number"),
    ],
    "steps": [
        (-1, "option 'steps': -1 is too small; use at least 0"),
        (2.5, "2.5 is not a whole number; give one"),
        (True, "True is not a whole number; give one"),
        (math.inf, "inf is not a whole number"),
        ("ten", "'ten' is not a whole number"),
    ],
    "tol": [(-1e-9, "option 'tol': -1e-09 is too small"), ("low", "is not a finite number")],
    "orthogonalize": [
        (1, "option 'orthogonalize': 1 is not True or False; use one of them"),
        ("yes", "'yes' is not True or False"),
    ],
    "decouple": [(0, "0 is not True or False"), (None, "None is not True or False")],
    "renormalize": [(1.0, "1.0 is not True or False")],
    "rank": [
        (0, "option 'rank': 0 is too small; use at least 1"),
        (-3, "-3 is too small"),
        (1.5, "1.5 is not a whole number"),
        (True, "True is not a whole number"),
        ("8", "'8' is not a whole number"),
    ],
    "energy": [
        (0, "option 'energy': 0.0 is not a share; give one in (0, 1]"),
        (1.01, "1.01 is not a share"),
        (-0.5, "-0.5 is not a share"),
        (99, "99.0 is not a share"),
        (True, "True is not a finite number"),
        ("90%", "'90%' is not a finite number"),
    ],
    "scale": [
        ("big", "option 'scale': 'big' is not a finite number"),
        (math.nan, "nan is not a finite number"),
        (False, "False is not a finite number"),
    ],
    "weights": [
        ([1, 2], "option 'weights': 2 weights for 3 adapters; give one number for each adapter"),
        ([], "0 weights for 3 adapters"),
        ([0, 0.0, 0], "all are zero; give at least one adapter a weight"),
        ([1, math.nan, 1], "nan is not a finite number"),
        ([1, "2", 1], "'2' is not a finite number"),
        ([True, 1, 1], "True is not a finite number"),
    ],
    "method": [
        ("fisher", "option 'method': 'fisher' is not known; use one of: auto, do, linear,"),
        ("lineer", "did you mean 'linear'?"),
        (None, "None is not known"),
    ],
    "backend": [
        ("tirch", "option 'backend': 'tirch' is not known; did you mean 'torch'?"),
        (None, "use one of: auto,"),
    ],
    "device": [("gpu9", "option 'device': torch cannot use 'gpu9' here; use 'cpu'")],
    "dtype": [
        ("float64", "option 'dtype': 'float64' is not known; did you mean"),
        ("fp16", "use one of: float32, bfloat16, float16"),
    ],
}


def refusal(**arguments) -> str:
    with pytest.raises(dm.OptionError) as error:
        dm.merge(ADAPTERS, **{"method": "do", **arguments})
    return str(error.value)


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_option_is_refused_with_a_suggestion(name):
    assert UNKNOWN[name] in refusal(**{name: 1})


@pytest.mark.parametrize(
    ("name", "value", "words"), [(name, *pair) for name, pairs in WRONG.items() for pair in pairs]
)
def test_a_wrong_value_is_refused_in_one_line(name, value, words):
    message = refusal(**{name: value})
    assert words in message
    assert message.startswith(f"option {name!r}: ")
    assert "\n" not in message


@pytest.mark.parametrize("method", ["iso_c", "pico"])
def test_a_method_without_options_says_so(method):
    expected = f"option 'gamma': method {method!r} has no such option; leave it out"
    assert refusal(method=method, gamma=1.0) == expected


@pytest.mark.parametrize("one", ["folder/", ADAPTERS[0]])
def test_one_adapter_outside_a_list_is_refused(one):
    for call in (dm.merge, dm.inspect):
        with pytest.raises(dm.OptionError, match=r"is one adapter, not a list; put it in a list"):
            call(one)


def test_no_adapters_are_refused():
    for call in (dm.merge, dm.inspect):
        with pytest.raises(dm.DomergeError, match="no adapters given; give at least one"):
            call([])


def test_numbers_are_taken_as_the_type_of_their_option():
    found = options.build(DoOptions, {"gamma": 2, "steps": 7.0, "tol": 0}, "method 'do'")
    assert found == DoOptions(gamma=2.0, steps=7, tol=0.0)
    assert [type(x) for x in (found.gamma, found.steps, found.tol)] == [float, int, float]


def test_every_option_accepts_its_own_default_and_has_a_help_text():
    for method in TABLE.values():
        defaults = method.options()
        assert options.build(method.options, dataclasses.asdict(defaults), "it") == defaults
        assert all(field.metadata["help"] for field in dataclasses.fields(defaults))


def test_the_methods_and_backends_are_listed():
    assert list(dm.list_methods()) == list(TABLE)
    assert {"do", "linear", "svd"} <= set(TABLE)
    assert all(dm.list_methods().values())
    assert {"cpu", "torch", "reference"} <= set(dm.list_backends())
    assert dm.list_backends()["torch"].available


def test_suggestions_name_what_there_is():
    assert options.suggest("lineer", ["do", "linear"]) == (
        "did you mean 'linear'? use one of: do, linear"
    )
    assert options.suggest("xyz", ["do", "linear"]) == "use one of: do, linear"


NAMES_ELSEWHERE = {
    "dare_linear": "it is 'dare' here; use one of: do,",
    "dare_linear_svd": "it is 'dare' here with a rank; use one of: do,",
    "ties_svd": "it is 'ties' here with a rank; use one of: do,",
    "task_arithmetic": "it is 'linear' here; use one of: do,",
    "TASK-ARITHMETIC": "it is 'linear' here; use one of: do,",
    "nuslerp": "it is 'slerp' here; use one of: do,",
    "model_stock": "nothing here chooses weights by angles; use one of: do,",
    "della_linear": "'della' here elects signs; use one of: do,",
    "breadcrumbs_ties": "'breadcrumbs' here elects no signs; use one of: do,",
    "dare_linaer": "did you mean 'dare_linear'? it is 'dare' here; use one of: do,",
    "DARE-TIES": "did you mean 'dare_ties'? use one of: do,",
}


@pytest.mark.parametrize("name", NAMES_ELSEWHERE)
def test_a_method_is_known_by_its_name_elsewhere(name):
    for option, given in (("method", {}), ("inner", {"method": "knots"})):
        message = refusal(**given, **{option: name})
        words = NAMES_ELSEWHERE[name]
        if option == "method":  # which alone may be chosen for a set of adapters
            words = words.replace("use one of: do,", "use one of: auto, do,")
        assert message.startswith(f"option {option!r}: {name!r} is not known; {words}")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"svd_rank": 4}, "method 'do' has no such option; it is 'rank' here; use one of: ortho"),
        ({"method": "linear", "svd_rank": 4}, "has no such option; it is 'rank' here"),
        ({"combination_type": "ties"}, "it is 'method' here"),
        ({"lambda_": 0.5}, "it is 'scale' here"),
        ({"out_path": "x"}, "it is 'output' here"),
        ({"normalize": True}, "it is 'weights' here as they are to be used: give some that add"),
        ({"method": "breadcrumbs", "gamma": 0.1}, "it is 'outliers' here; use one of: density,"),
        ({"method": "iso_c", "gamma": 1.0}, "method 'iso_c' has no such option; leave it out"),
        ({"int8_mask": True}, "nothing here needs it"),
        ({"dtype": "bf16"}, "'bf16' is not known; it is 'bfloat16' here; use one of: float32,"),
    ],
)
def test_an_option_is_known_by_its_name_elsewhere(given, words):
    assert words in refusal(**given)


def test_what_is_known_elsewhere_leads_to_names_there_are():
    arguments = set(inspect.signature(dm.merge).parameters)
    assert arguments >= aliases.ALWAYS
    names = {f.name for method in TABLE.values() for f in dataclasses.fields(method.options)}
    for words, known in (
        (aliases.METHODS, set(TABLE)),
        (aliases.OPTIONS, names | arguments),
        (aliases.DTYPES, {"float32", "bfloat16", "float16"}),
    ):
        for word, (name, remark) in words.items():
            assert word == aliases.plain(word)
            assert name is None or name in known
            assert name or remark
    assert not set(aliases.METHODS) & set(TABLE)
    for word in aliases.METHODS:  # the message has room for all of it
        with pytest.raises(dm.OptionError, match=r"; use one of: auto, do, .*, magnitude_prune$"):
            options.choose("combination_type", word, TABLE)


def test_errors_are_value_errors_of_one_line():
    error = dm.OptionError("x", "has\n  two lines", "join them")
    assert isinstance(error, dm.DomergeError)
    assert isinstance(error, ValueError)
    assert re.fullmatch(r"option 'x': has two lines; join them", str(error))
