"""The shipped suites: apart from each other, and what their datasheet says they are."""

import collections
import itertools
import json
import pathlib
import re

import numpy as np
import pytest

import sqjax
from sqjax import fingerprints
from sqjax.run import InputError
from sqjax.sources import open_texts

SUITES = pathlib.Path(sqjax.__file__).parent / "suites"
NAMES = ("calib360", "convergence60", "heldout120")
SHEET = (SUITES / "DATASHEET.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows():
    lines = {name: (SUITES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in NAMES}
    return {name: [json.loads(line) for line in found] for name, found in lines.items()}


def test_suites_and_the_demonstrations_text_are_disjoint():
    documents = {name: list(open_texts(name)) for name in NAMES} | {"demo": list(open_texts(SUITES / "demo.txt"))}
    pieces = {name: [fingerprints.piece_of(document) for document in found] for name, found in documents.items()}
    prints = {name: fingerprints.prints_of(found) for name, found in pieces.items()}
    assert {name: len(found) for name, found in documents.items()} == dict(zip((*NAMES, "demo"), (360, 60, 120, 1)))
    for first, second in itertools.combinations(documents, 2):
        shared = np.intersect1d(prints[first], prints[second])
        assert not len(shared), f"{first} and {second} share a document or a run of sixteen words"
    # Each suite is itself found in itself: the comparison above could have failed.
    found = fingerprints.overlap(prints["heldout120"], fingerprints.sample(pieces["heldout120"]))
    assert found.share == 1.0 and found.pieces > 110 and found.is_grave


def normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def test_no_first_prompt_occurs_twice(rows):
    prompts = [
        normal(next(message["content"] for message in row["messages"] if message["role"] == "user"))
        for found in rows.values()
        for row in found
    ]
    assert len(prompts) == len(set(prompts)) == 540


def test_the_datasheet_counts_what_is_there(rows):
    table = re.findall(r"^\| (\w+)[^|]*\| (\d+) \| (\d+) \| (\d+) \|$", SHEET, re.MULTILINE)
    stated = {kind: tuple(map(int, numbers)) for kind, *numbers in table}
    assert len(stated) == 9
    for index, name in enumerate(NAMES):
        counted = collections.Counter(row["category"] for row in rows[name])
        assert counted == {kind: numbers[index] for kind, numbers in stated.items()}, name
        # Other languages: "de 4, es 4, ..., nl, pl", one each unless a number is given.
        listed = re.search(rf"^- `{name}`: ((?:.|\n(?!-|\n))+)", SHEET, re.MULTILINE).group(1)
        pairs = [item.split() for item in listed.replace("\n", " ").split(",")]
        languages = collections.Counter(row["language"] for row in rows[name] if row["language"] != "en")
        assert languages == {pair[0]: int(pair[1]) if len(pair) > 1 else 1 for pair in pairs}, name


def test_conversations_are_as_the_datasheet_describes(rows):
    roles = {"system", "user", "assistant", "tool"}
    for name in NAMES:
        for row in rows[name]:
            assert {message["role"] for message in row["messages"]} <= roles
            assert name == "calib360" or row["messages"][-1]["role"] == "assistant"
            if row["category"] == "tools":
                assert any("<tool_call>" in message["content"] for message in row["messages"])
    answers = [
        len(message["content"].split())
        for name in NAMES[1:]
        for row in rows[name]
        for message in row["messages"]
        if message["role"] == "assistant"
    ]
    assert 110 <= np.mean(answers) <= 130 and max(answers) < 400


def test_a_suite_that_is_not_there_is_an_error():
    with pytest.raises(InputError):
        list(open_texts("calib361/none.txt"))
