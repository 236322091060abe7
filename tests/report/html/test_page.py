from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made import made_run

from optimize.errors import RecipeError
from optimize.report.html import Result, render, write
from optimize.report.html.several import labels_of, past, report
from optimize.report.html.several import render as render_several
from optimize.report.html.words import clean
from optimize.work import Work

ERROR = {
    "type": "StageError", "message": "out of memory", "stage": "int8", "location": "recipe.yaml:3", "hint": "less"
}  # fmt: skip
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></script><svg onload=alert(1)>",
    "]]></text><a href='javascript:alert(1)'>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;&#60;",
    "a\u202eb\x1b[31m\x00",
    "--></title><!--",
]


class Seen(HTMLParser):
    """The elements with the names of their attributes, the text, and the values of attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.shape: list[tuple[str, tuple[str, ...]]] = []
        self.text: list[str] = []
        self.values: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.shape.append((tag, tuple(name for name, _ in attrs)))
        self.values += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def seen_of(folder: Path, **made: Any) -> Seen:
    return Seen(render(Result(made_run(folder, candidates=2, rows=4, **made), folder)))


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=st.one_of(st.sampled_from(HOSTILE), st.text(min_size=1, max_size=40)))
def test_text_from_outside_adds_no_markup_and_comes_back_as_text(text: str, tmp_path: Path) -> None:
    text = text.replace("\r", "\n").encode("utf-8", "replace").decode()  # what HTML and files do to every text
    said: dict[str, str] = {}

    def say(given: str) -> str:
        return said.setdefault(given, f"{given} {text} end")

    for error in (None, ERROR):
        told = None if error is None else {**error, "message": say(error["message"]), "hint": say(error["hint"])}
        plain, hostile = seen_of(tmp_path / "a", error=error), seen_of(tmp_path / "b", error=told, say=say)
        # As many elements of each sort: only ticks and labels depend on how long a text is.
        fixed = [[one for one in seen.shape if one[0] not in ("text", "line")] for seen in (plain, hostile)]
        assert fixed[0] == fixed[1]
        whole = "".join(hostile.text)
        if told:
            assert clean(told["message"]) in whole
            assert clean(told["hint"]) in whole
        else:  # long texts are cut
            missing = [value for value in said.values() if clean(value) not in whole and clean(value)[:8] not in whole]
            assert not missing


def test_nothing_of_the_page_calls_outside_or_runs_inline(tmp_path: Path) -> None:
    seen = seen_of(tmp_path, say=lambda text: text + HOSTILE[1])
    assert all(not name.startswith("on") and name != "style" for name, _ in seen.values)
    addresses = {value for name, value in seen.values if name in ("href", "src", "action", "xlink:href")}
    assert all(value.startswith("#") or value == "data:," for value in addresses)
    assert [tag for tag, _ in seen.shape if tag in ("script", "style", "iframe", "object", "link")] == [
        "link", "style", "script"
    ]  # fmt: skip
    ids = [value for name, value in seen.values if name == "id"]
    assert len(ids) == len(set(ids))
    labelled = {one for name, value in seen.values if name == "aria-labelledby" for one in value.split()}
    assert labelled <= set(ids)


def test_the_policy_holds_the_hashes_of_what_the_page_has(tmp_path: Path) -> None:
    page = render(Result(made_run(tmp_path), tmp_path))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert "default-src &#39;none&#39;" in policy
    for tag in ("style", "script"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src &#39;sha256-{digest}&#39;" in policy


def test_every_part_is_there_and_the_verdict_first(tmp_path: Path) -> None:
    page = render(Result(made_run(tmp_path), tmp_path))
    found = re.findall(r'<h2 id="(\w+)"', page)
    assert found == ["gates", "artifacts", "trade", "chain", "times", "rows", "tail", "layers", "lineage"]
    assert page.index("<h1>") < page.index('id="gates"')
    assert "optimize apply " in page
    assert "recipe.json" in page
    text = "".join(Seen(page).text)
    assert "PASS: 3 gate checks held" in text


@pytest.mark.parametrize("verdict", ["pass", "fail", "inconclusive", None])
def test_every_verdict_is_said_in_words(verdict: str | None, tmp_path: Path) -> None:
    page = render(Result(made_run(tmp_path, verdict=verdict), tmp_path))
    (heading,) = re.findall("<h1>(.*?)</h1>", page)
    assert {"pass": "✓", "fail": "✗", "inconclusive": "?", None: "–"}[verdict] in heading
    assert {"pass": "Pass", "fail": "Fail", "inconclusive": "Inconclusive", None: "No verdict"}[verdict] in heading


def test_an_error_is_said_with_what_to_try(tmp_path: Path) -> None:
    seen = seen_of(tmp_path, error=ERROR)
    text = " ".join("".join(seen.text).split())
    assert "Error" in text
    assert "out of memory" in text
    assert "What to try: less" in text


def test_a_run_without_sidecars_or_with_damaged_ones_is_drawn(tmp_path: Path) -> None:
    document = made_run(tmp_path)
    (tmp_path / "rows.json").write_text("{")
    (tmp_path / "samples.json").unlink()
    document["sidecars"]["layers"]["path"] = "../../layers.json"
    page = render(Result(document, tmp_path))
    assert "can't be read: samples, rows" in page
    assert '<h2 id="layers"' in page  # a path is a name in the run's own folder
    assert '<h2 id="trade"' in page
    assert render(Result(document))


def test_what_it_is_held_against_and_what_is_acknowledged_are_shown(tmp_path: Path) -> None:
    document = made_run(tmp_path)
    document["against"] = {
        "ref": "made@production",
        "version": 2,
        "promoted_at": None,
        "changed": {"recipe": [{"what": "stages.int8.bits", "before": 8, "after": 4}], "data": []},
        "since": [{"ref": "made@production~5", "version": 1}],
    }
    document["gates"][0]["acknowledged"] = {"reason": "a new tokenizer", "expires": "2027-01-31", "location": "a:1"}
    text = "".join(Seen(render(Result(document, tmp_path))).text)
    assert "Against made@production" in text
    assert "stages.int8.bits" in text
    assert "Also held against: made@production~5 (version 1)." in text
    assert "Acknowledged until 2027-01-31: a new tokenizer" in text


def test_a_large_run_stays_small(tmp_path: Path) -> None:
    made_run(tmp_path, candidates=11, rows=2000, run="large")
    path = write(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.stat().st_size < 3e6
    assert path.read_text(encoding="utf-8").count("<tr data-of=") == 2000


# --- several ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path: Path) -> Work:
    work = Work(tmp_path / "work")
    for number in range(3):
        run = f"2026112{number}-101010-000000-aaaa"
        made_run(work.runs / run, run=run, candidates=1 + number, verdict="fail" if number == 1 else "pass")
    return work


def test_runs_are_compared_side_by_side(runs: Work) -> None:
    path = report(runs, [f"2026112{number}-101010-000000-aaaa" for number in range(2)])
    assert path == runs.root / "report.html"
    text = " ".join(" ".join(Seen(path.read_text(encoding="utf-8")).text).split())
    assert "2 runs" in text
    assert "stages.int8.bits 1 2" in text
    assert "A candidate-0 ✓" in text
    assert "B candidate-1 ✗" in text


def test_a_history_is_of_one_name_and_the_oldest_comes_first(runs: Work, tmp_path: Path) -> None:
    document = made_run(runs.runs / "other", run="other")
    (runs.runs / "other" / "run.json").write_text(json.dumps({**document, "recipe": "other"}))
    assert [one.document["run"][7] for one in past(runs, "made")] == ["0", "1", "2"]
    assert [one.document["run"][7] for one in past(runs, "made@production")] == ["0", "2"]
    path = report(runs, [], history="made", output=tmp_path / "h.html")
    assert '<h2 id="history">' in path.read_text(encoding="utf-8")
    with pytest.raises(RecipeError, match="no run of"):
        past(runs, "nobody")


def test_one_run_is_drawn_again_in_its_place(runs: Work, tmp_path: Path) -> None:
    assert report(runs, ["latest"]).parent.parent == runs.runs
    assert report(runs, ["latest"], output=tmp_path / "a.html") == tmp_path / "a.html"
    with pytest.raises(RecipeError, match="no run is named"):
        report(runs, [])


def test_runs_of_different_rows_and_hosts_are_not_taken_for_the_same(tmp_path: Path) -> None:
    results = [Result(made_run(tmp_path / name, run=name), tmp_path / name) for name in "ab"]
    assert "different" not in render_several(results)
    results[1].document["host"]["os"] = "another"
    results[1].document["data"]["evaluation"]["digest"] = "sha256:c"
    page = render_several(results)
    assert "different evaluation rows" in page
    assert "different hosts" in page


def test_text_from_outside_adds_no_markup_to_a_comparison(tmp_path: Path) -> None:
    for text in HOSTILE:
        results = []
        for name in "ab":
            made_run(tmp_path / name, run=name, candidates=1, rows=2, say=lambda given: f"{given} {text}")  # noqa: B023
            results.append(Result(json.loads((tmp_path / name / "run.json").read_text()), tmp_path / name))
        seen = Seen(render_several(results, history="x" + text))
        assert not {tag for tag, _ in seen.shape} & {"img", "a", "b", "i", "iframe", "image", "foreignobject"}
        assert [tag for tag, _ in seen.shape].count("script") == 1
        assert clean("x" + text) in "".join(seen.text)


def test_labels_of_runs_are_unique() -> None:
    labels = labels_of([Result({})] * 60)
    assert labels[:2] + labels[25:27] == ["A", "B", "Z", "A2"]
    assert len(set(labels)) == 60
