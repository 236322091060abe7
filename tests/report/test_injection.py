"""Names, labels and sentences come from anywhere: nothing of them becomes markup, a command, a mention or a link.

The oracle for Markdown is a parser of GitHub's dialect (tables, raw HTML): a hostile document has the tokens of a tame
one, and all that differs is text.
"""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import xmlschema
from ci_examples import failing, recipe_error, selected, stage_error
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from optimize.report.escape import code, markdown
from optimize.report.github import annotate, outputs
from optimize.report.gitlab import code_quality
from optimize.report.junit import junit
from optimize.report.markdown import comment, marker

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
SCHEMA = xmlschema.XMLSchema(str(Path(__file__).with_name("junit.xsd")))
EVIL = [
    *("| a | b |", "`x`", "``", "**b**", "_i_", "~~s~~", "[a](http://x)", "![a](x)", "<script>alert(1)</script>"),
    *(
        "</details>",
        "<!--",
        "-->",
        "--",
        "]]>",
        "<![CDATA[",
        "\n\n# head",
        "\n\n---\n\n",
        "\n/close\n",
        "\r\n::error::x",
    ),
    *(
        "::error file=x::",
        "##[command]",
        "%0A::error::",
        "%25",
        "@octocat",
        "@org/team",
        "#123",
        "owner/repo#1",
        "GH-12",
    ),
    *("!45", "~bug", "%v1", "$9", "&7", ":tada:", "https://evil.example", "www.evil.example", "a@evil.example"),
    *("\x1b[2J", "\x9b31m", "\u202e", "\u2066", "\x00", "\x08", "\u2028", "\ud800", "\ufffe", "&lt;", "\\", "\\|", "|"),
    *("\t", "    code", "* x", "1. x", "> q", "=====", "$$x$$", "{{x}}", "[[_TOC_]]", "[x]: http://evil.example"),
]
hostile = st.lists(st.one_of(st.sampled_from(EVIL), st.text(max_size=8)), min_size=1, max_size=5).map("".join)
names = st.tuples(*[hostile] * 5)


def poisoned(document: dict[str, Any], words: tuple[str, ...]) -> dict[str, Any]:
    """Every text that a recipe, a model or a fork may choose is one of `words`."""
    document = copy.deepcopy(document)
    a, b, c, d, e = words
    document["recipe"], document["recipe_file"] = a, b
    for one in document.get("artifacts", ()):
        one["name"] = c if one["name"] == "int8" else one["name"]
        one["scores"] = {d if name == "accuracy" else name: score for name, score in one["scores"].items()}
    for one in [*document.get("gates", ()), *document.get("comparisons", ())]:
        one["artifact"] = c if one["artifact"] == "int8" else one["artifact"]
        one.update(metric=d if one["metric"] == "accuracy" else one["metric"], over=b)
        one.update(setting=f"batch_size={e}" if one["setting"] else None)
    for one in document.get("gates", ()):
        one.update(reason=e, location=f"{b}:3:5")
        if one["acknowledged"]:
            one["acknowledged"] = {"reason": a, "expires": b, "location": c}
    if against := document.get("against"):
        against.update(ref=a, promoted_at=b, since=[{"ref": c, "version": 3}])
        against["changed"] = {"recipe": [{"what": a, "before": b, "after": {c: d}}]}
    if host := document.get("host"):
        host.update(os=a, python=b, libraries={c: d})
        host["cpu"]["model"] = e
    if error := document["error"]:
        error.update(message=a, hint=b, location=f"{c}:1:2", stage=d, type=e)
        for one in error.get("diagnostics", ()):
            one.update(message=a, hint=b, location=f"{c}:1:2", path=d)
    return document


def skeleton(text: str) -> list[Any]:
    """The tokens without their text."""

    def shape(token: Token) -> Any:
        raw = token.content if token.type.startswith("html") else ""
        inner = [shape(child) for child in token.children or () if child.type != "text"]
        return (token.type, token.tag, token.attrs, re.sub(r"<!-- optimize:[\w.%-]* -->", "<!-- -->", raw), inner)

    # A name with a backtick or a pipe is an element, and others are a span: both are code.
    text = re.sub(r"<code>([^<>`]*)</code>", "`x`", text)
    return [shape(token) for token in PARSER.parse(text)]


def plain_text(text: str) -> str:
    """What a reader sees outside of code, where hosts look for references."""
    text = re.sub(r"<code>([^<>`]*)</code>", "`x`", text)
    leaves = [child for token in PARSER.parse(text) for child in token.children or ()]
    return "\n".join(child.content for child in leaves if child.type == "text")


@cache
def tame_skeleton(make: Any) -> list[Any]:
    return skeleton(comment(poisoned({"error": None, **make()}, TAME)))


TAME = ("one", "two", "three", "four", "five")


@pytest.mark.parametrize("make", [failing, selected, stage_error, recipe_error])
@settings(max_examples=20, deadline=None)
@given(words=names)
def test_markdown_keeps_its_shape(make: Any, words: tuple[str, ...]) -> None:
    document = {"error": None, **make()}
    # An empty text leaves a line out, as it would of a tame document.
    words = tuple(word if word.strip() else "x" for word in words)
    text = comment(poisoned(document, words))
    assert skeleton(text) == tame_skeleton(make)
    assert text.splitlines()[0].startswith("### ")
    assert text.count("<!--") == text.count("-->") == 1
    assert text.rstrip().endswith(marker(poisoned(document, words)))
    assert not re.search(r"(?m)^\s*/", text), "a quick action of GitLab"
    seen = plain_text(text)
    for reference in (r"[@#!$~%&^][\w\"]", r"\bGH-\d", r"://", r"www\.\w", r":[\w+-]+:"):
        assert not re.search(reference, re.sub(r"\d%|\+?[\d.]+%", "", seen)), (reference, seen)


@settings(max_examples=60, deadline=None)
@given(text=hostile)
def test_prose_and_code_are_one_line_without_markup(text: str) -> None:
    for made in (f"x {markdown(text)} y", f"| {markdown(text)} | {code(text)} |", f"- {code(text)}"):
        assert "\n" not in made
        made.encode()
        assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", made)
    (_, inline, _) = PARSER.parse(f"x {markdown(text)} y")
    assert {child.type for child in inline.children or ()} == {"text"}


@pytest.mark.parametrize("make", [failing, stage_error, recipe_error])
@settings(max_examples=20, deadline=None)
@given(words=names)
def test_other_outputs_hold(make: Any, words: tuple[str, ...]) -> None:
    document = {"error": None, **make()}
    words = tuple(word if word.strip() else "x" for word in words)
    evil, tame = poisoned(document, words), poisoned(document, TAME)
    text = junit(evil)
    SCHEMA.validate(text)
    assert [part.tag for part in ET.fromstring(text).iter()] == [part.tag for part in ET.fromstring(junit(tame)).iter()]
    lines = annotate(evil).split("\n")
    assert len(lines) == len(annotate(tame).split("\n"))
    for line in filter(None, lines):
        assert re.fullmatch(r"::(error|notice|warning) (\w+=[^:,\r\n]*,?)*::[^\r\n]*", line), line
        assert not re.search("[\x00-\x1f\x7f-\x9f\u2028\u202a-\u202e]", line)
    assert len(json.loads(code_quality(evil))) == len(json.loads(code_quality(tame)))
    keys = [line.partition("=")[0] for line in outputs(evil, None).splitlines()]
    assert keys == ["verdict", "run", "promoted", "summary"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab-.>%!", min_size=1, max_size=6), min_size=2, max_size=2, unique=True))
def test_markers_are_comments_and_differ(two: list[str]) -> None:
    one, other = (marker({"recipe": name}) for name in two)
    assert one != other
    assert re.fullmatch(r"<!-- optimize:(?:(?!--)[\w.%-])* -->", one)
