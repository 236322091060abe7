"""JUnit: what is a failure, an error, a skip; and that every reader takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import xmlschema
from ci_examples import EXAMPLES, failing, inconclusive, passing, recipe_error, selected, stage_error

from optimize.report.junit import junit

SCHEMA = xmlschema.XMLSchema(str(Path(__file__).with_name("junit.xsd")))


def cases(document: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The name of each case -> what lies in it: (tag, type)."""
    suite = ET.fromstring(junit(document))[0]
    found = suite.findall("testcase")
    assert len(found) == int(suite.attrib["tests"])
    for tag, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        assert len(suite.findall(f"testcase/{tag}")) == int(suite.attrib[attribute])
    return {case.attrib["name"]: [(part.tag, part.attrib["type"]) for part in case] for case in found}


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_is_valid(name: str) -> None:
    SCHEMA.validate(junit({"error": None, **EXAMPLES[name]()}))


def test_one_case_a_gate_and_setting() -> None:
    document = passing()
    found = cases(document)
    assert len(found) == len(document["gates"])
    assert not any(found.values())


def test_what_makes_the_exit_code_is_a_failure_and_what_does_not_is_skipped() -> None:
    assert sorted(part for parts in cases(failing()).values() for part in parts) == [
        ("failure", "fail"),
        ("skipped", "acknowledged"),
    ]
    assert sorted(part for parts in cases(inconclusive()).values() for part in parts) == [
        ("failure", "inconclusive"),
        ("skipped", "inconclusive"),
    ]


def test_a_leaf_that_was_not_chosen_fails_nothing() -> None:
    document = selected()
    assert [part for parts in cases(document).values() for part in parts] == [("skipped", "selection")]
    names = [
        (case.attrib["classname"], case.attrib["name"]) for case in ET.fromstring(junit(document)).iter("testcase")
    ]
    assert len(set(names)) == len(names)


def test_errors_are_errors() -> None:
    assert cases(stage_error()) == {"int8": [("error", "StageError")]}
    assert cases(recipe_error()) == {
        "stages[0].epoch": [("error", "RecipeError")],
        "gates[0].on": [("error", "RecipeError")],
    }
