"""A result from outside: taken when every value that is drawn is of its kind, else refused with a reason."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from ci_examples import EXAMPLES, passing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimize.errors import RecipeError
from optimize.report.github import annotate, outputs, step_summary
from optimize.report.gitlab import code_quality
from optimize.report.intake import MAX_BYTES, read_result
from optimize.report.junit import junit
from optimize.report.markdown import comment


def taken(folder: Path, raw: str | bytes) -> dict[str, Any]:
    file = folder / "result.json"
    file.write_bytes(raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw)
    return read_result(file)


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_runs_write_is_taken(name: str, tmp_path: Path) -> None:
    document = EXAMPLES[name]()
    assert taken(tmp_path, json.dumps(document)) == document


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("", "no result"),
        ("[]", "`schema` is not 1"),
        ("{}", "`schema` is not 1"),
        ('{"schema": 1}', "error: Field required"),
        ('{"schema": 1, "error": {"type": "x", "message": NaN}}', "NaN is no number"),
        ('{"schema": 1, "error": null}', "error: "),
        ('{"schema":1,"x":' + "[" * 5_000 + "]" * 5_000 + "}", "nested"),
        ('{"schema": 1, "x": ' + "9" * 5_000 + "}", "no result"),
        ('{"a":' * 100_000, "nested"),
        (b"\xff\xfe", "no result"),
        (b" " * (MAX_BYTES + 1), "larger than 8 MiB"),
    ],
)
def test_what_is_none_is_refused(raw: str | bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        taken(tmp_path, raw)


def places(value: Any, trail: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [trail, *(place for key, item in items for place in places(item, (*trail, key)))]


RUN = EXAMPLES["selected"]() | {"against": EXAMPLES["fail"]()["against"]}
PLACES = [place for place in places(RUN) if place]
values = st.sampled_from(
    [None, True, -1, 10**400, 1e308, "x", "", [], {}, [None], {"value": {}}, {"x": 1}, [[1, 2]], 0.5]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.sampled_from(PLACES), st.one_of(values, st.just("DELETE"))), min_size=1, max_size=3)
)
def test_what_is_taken_can_be_drawn(changes: list[tuple[tuple[Any, ...], Any]], tmp_path: Path) -> None:
    document = copy.deepcopy(RUN)
    for trail, value in changes:
        held: Any = document
        try:
            for key in trail[:-1]:
                held = held[key]
            if value == "DELETE":
                del held[trail[-1]]
            else:
                held[trail[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue
    try:
        read = taken(tmp_path, json.dumps(document))
    except RecipeError:
        return
    for draw in (comment, junit, annotate, step_summary, code_quality, lambda one: outputs(one, None)):
        draw(read)


def test_a_message_of_what_is_wrong_quotes_nothing_of_it(tmp_path: Path) -> None:
    document = {**passing(), "verdict": "\x1b[2J::error::evil"}
    with pytest.raises(RecipeError, match="verdict") as raised:
        taken(tmp_path, json.dumps(document))
    assert "evil" not in str(raised.value)
