"""Annotations, read back as GitHub's runner reads them."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from ci_examples import failing, inconclusive, passing, stage_error

from optimize.report.escape import command
from optimize.report.github import A_STEP, annotate, below, outputs


def read(line: str) -> tuple[str, dict[str, str], str]:
    """Level, properties and message, by the runner's rules."""
    found = re.fullmatch(r"::(\w+)(?: ([^\r\n]*?))?::([^\r\n]*)", line)
    assert found, line

    def value(text: str) -> str:
        for code, character in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
            text = text.replace(code, character)
        return text

    pairs = (pair.partition("=") for pair in (found[2] or "").split(",") if pair)
    return found[1], {name: value(text) for name, _, text in pairs}, value(found[3])


def test_properties_and_message_come_back() -> None:
    line = command("error", "100% of a::b, c", file="a,b:c.yaml", line=3, col=None, title="x=1, 5%: y::z")
    assert read(line) == (
        *("error", {"file": "a,b:c.yaml", "line": "3", "title": "x=1, 5%: y::z"}),
        "100% of a::b, c",
    )


def test_a_gate_is_annotated_where_it_stands() -> None:
    first, second = map(read, annotate(failing()).splitlines())
    assert first[0] == "error"
    assert first[1] == {
        **{"file": "recipes/sentiment.yaml", "line": "31", "col": "5"},
        "title": "fail: accuracy of int8 over production",
    }
    assert first[2] == failing()["gates"][0]["reason"]
    assert (second[0], second[1]["line"]) == ("notice", "34")
    assert [read(line)[0] for line in annotate(inconclusive()).splitlines()] == ["error", "warning"]
    ((level, properties, message),) = map(read, annotate(stage_error()).splitlines())
    assert (level, properties["line"], properties["title"]) == ("error", "22", "optimize: int8")
    assert message.endswith("(try: on a processor without VNNI, 8-bit sums can overflow: set reduce_range: true)")


def test_a_pass_is_one_notice() -> None:
    ((level, properties, message),) = map(read, annotate(passing()).splitlines())
    assert (level, properties["file"]) == ("notice", "recipes/sentiment.yaml")
    assert message.startswith("PASS: 4 gate checks held")


def crowd(number: int) -> dict[str, Any]:
    document = failing()
    template = document["gates"][0]
    document["gates"] = []
    for index in range(number):
        one = {**copy.deepcopy(template), "setting": f"batch_size={index}"}
        # Half of them can't tell, and are listed first; every margin is another.
        one.update(margin=-0.001 * ((index * 7) % number), verdict="inconclusive" if index % 2 else "fail")
        document["gates"].insert(0, one)
    return document


def test_the_host_shows_ten_so_the_worst_come_first_and_the_last_counts_the_others() -> None:
    assert len(annotate(crowd(A_STEP)).splitlines()) == A_STEP
    document = crowd(30)
    *shown, last = map(read, annotate(document).splitlines())
    assert len(shown) == A_STEP - 1
    assert last[2].startswith("and 21 more")
    worst = sorted((one for one in document["gates"] if one["verdict"] == "fail"), key=lambda one: one["margin"])
    wanted = [f"fail: accuracy of int8 over production at {one['setting']}" for one in worst[:9]]
    assert [properties["title"] for _, properties, _ in shown] == wanted


def test_paths_are_from_the_root_of_the_checkout(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert below("recipes/a.yaml", tmp_path) == "sub/recipes/a.yaml"
    assert below(str(tmp_path / "a.yaml"), tmp_path) == "a.yaml"
    assert below("../../x.yaml", tmp_path) == "../../x.yaml"
    assert below("a.yaml", None) == "a.yaml"


def test_outputs_name_the_run(tmp_path: Path) -> None:
    lines = dict(line.split("=", 1) for line in outputs(failing(), tmp_path).splitlines())
    assert (lines["verdict"], lines["run"], lines["promoted"]) == ("fail", str(tmp_path / "run.json"), "")
    assert outputs(passing(), None).splitlines()[2] == "promoted=sentiment@1"
