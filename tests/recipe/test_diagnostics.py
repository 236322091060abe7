"""Mistakes as text."""

from __future__ import annotations

import json

import pytest

from optimize.errors import Diagnostic
from optimize.recipe.diagnostics import MAX_SHOWN, render

MISTAKE = Diagnostic(
    message="unknown key `epoch`",
    path="stages[0].epoch",
    hint="did you mean `epochs`?",
    file="recipe.yaml",
    line=12,
    column=5,
    source_line="    epoch: 1",
)


def test_full_shows_the_line_with_a_caret() -> None:
    assert render([MISTAKE], "full").splitlines() == [
        "error: unknown key `epoch`",
        "  --> recipe.yaml:12:5  (stages[0].epoch)",
        "   |",
        "12 |     epoch: 1",
        "   |     ^",
        "  help: did you mean `epochs`?",
    ]


def test_concise_is_one_line_with_file_line_and_column() -> None:
    assert render([MISTAKE], "concise") == (
        "recipe.yaml:12:5: unknown key `epoch` [stages[0].epoch] (did you mean `epochs`?)"
    )


def test_json_is_a_list_with_every_field() -> None:
    (found,) = json.loads(render([MISTAKE], "json"))
    assert found == {
        "message": "unknown key `epoch`",
        "path": "stages[0].epoch",
        "hint": "did you mean `epochs`?",
        "file": "recipe.yaml",
        "line": 12,
        "column": 5,
        "source_line": "    epoch: 1",
        "location": "recipe.yaml:12:5",
    }


def test_github_escapes_what_would_end_the_command() -> None:
    mistake = Diagnostic("100% bad\nline", file="a,b:c.yaml", line=3, column=1)
    assert render([mistake], "github") == "::error file=a%2Cb%3Ac.yaml,line=3,col=1::100%25 bad\\nline"
    elsewhere = Diagnostic("bad", file="--set a=%", line=0, column=0)
    assert render([elsewhere], "github") == "::error::--set a=%25: bad"


def test_a_mistake_that_stands_in_no_text_has_no_line() -> None:
    mistake = Diagnostic("no stage is named `x`", path="stages", file="--set stages.x.epochs=1", line=0, column=0)
    assert render([mistake], "full") == ("error: no stage is named `x`\n  --> --set stages.x.epochs=1  (stages)")
    assert render([mistake], "concise") == "--set stages.x.epochs=1: no stage is named `x` [stages]"


@pytest.mark.parametrize("format", ["full", "concise", "github"])
@pytest.mark.parametrize("evil", ["\x1b[2J", "\x9b31m", "\u202e", "\r", "\x00", "\u2028", "\udcff"])
def test_text_of_a_recipe_can_not_steer_a_terminal(format: str, evil: str) -> None:
    mistake = Diagnostic(f"m{evil}", f"p{evil}", f"h{evil}", f"f{evil}", 1, 2, f"s{evil}")
    shown = render([mistake], format)  # type: ignore[arg-type]
    assert evil not in shown
    shown.encode("utf-8")


def test_json_keeps_control_characters_escaped() -> None:
    shown = render([Diagnostic("\x1b[2J", file="f", source_line="\x1b[2J")], "json")
    assert "\x1b" not in shown
    assert json.loads(shown)[0]["message"] == "\x1b[2J"


@pytest.mark.parametrize(
    ("line", "column"),
    [("ключ: 1", 7), ("\tkey: 1", 2), ("名前: x", 5), ("e\u0301tat: 1", 7), ("x" * 5000 + "!", 5001)],
)
def test_the_caret_stands_below_its_column(line: str, column: int) -> None:
    import unicodedata

    _, _, _, shown, caret = render([Diagnostic("m", file="f", line=1, column=column, source_line=line)]).splitlines()
    wide = {"W": 2, "F": 2}
    cells, at = 0, caret.index("^")
    for character in shown:
        if unicodedata.combining(character):
            continue
        if cells == at:
            break
        cells += wide.get(unicodedata.east_asian_width(character), 1)
    assert cells == at
    assert character == line[column - 1]
    assert len(shown) < 130


def test_a_flood_is_counted_not_shown() -> None:
    shown = render([MISTAKE] * (MAX_SHOWN + 7), "concise").splitlines()
    assert len(shown) == MAX_SHOWN + 1
    assert shown[-1] == "and 7 more mistakes"
