from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from optimize.artifact import Artifact
from optimize.evaluate.timings import CONTROL, Batch, Round, Timings
from optimize.report import sidecars

SETTING = Batch(1, 8, 1)


def flip(row: int, *, label: int = 1, text: str = "a film", now: str = "bad") -> dict[str, Any]:
    then = {"label": "good", "score": 0.9}
    return {
        "row": row,
        "text": text,
        "label": label,
        "baseline": then,
        "candidate": {"label": now, "score": 0.51234567},
    }


def test_a_row_stands_once_with_the_answer_of_each_that_changed_it() -> None:
    found = sidecars.rows({"a": [flip(3), flip(7)], "b": [flip(7, now="good?")], "c": []}, "base", ["bad", "good"])
    assert found["counts"] == {"a": 2, "b": 1, "c": 0}
    assert [one["row"] for one in found["rows"]] == [7, 3]  # what most artifacts changed comes first
    first = found["rows"][0]
    assert first["answers"] == {"a": {"label": "bad", "score": 0.5123}, "b": {"label": "good?", "score": 0.5123}}
    assert (first["label"], first["baseline"]["label"], first["columns"]) == ("good", "good", {"text": "a film"})
    assert found["left_out"] == 0


def test_windows_of_a_language_model_are_rows_too() -> None:
    one = {"window": 14, "text": "In 2006", "baseline": {"perplexity": 141.2}, "candidate": {"perplexity": math.inf}}
    (row,) = sidecars.rows({"gptq": [one]}, "source")["rows"]
    assert (row["row"], row["label"], row["answers"]) == (14, None, {"gptq": {"perplexity": None}})


def test_rows_are_bounded_and_say_how_many_are_left_out() -> None:
    found = sidecars.rows({"a": [flip(i, text="x" * 10_000) for i in range(sidecars.MOST_ROWS + 5)]}, "base")
    assert len(found["rows"]) == sidecars.MOST_ROWS
    assert found["left_out"] == 5
    assert {len(row["columns"]["text"]) for row in found["rows"]} == {sidecars.MOST_CHARACTERS}


def test_a_number_that_is_no_label_stays_a_number() -> None:
    found = sidecars.rows({"a": [flip(1, label=9)]}, "base", ["bad", "good"])
    assert found["rows"][0]["label"] == 9


def test_samples_keep_the_shape_of_the_times_and_the_control() -> None:
    calls = [[0.001 * (1 + i / 100) for i in range(100)]]
    again = [[0.002] * 100]
    rounds = [Round({SETTING.label: {"slot": calls, CONTROL: again}}, {}, {}, [], [], True) for _ in range(6)]
    timings = Timings(["slot"], "slot", [SETTING], 6, rounds=rounds)
    found = sidecars.samples(timings, {"name": "slot"})
    assert found["settings"] == [{"metric": "latency", "setting": SETTING.label}]
    series = found["artifacts"]["name"][SETTING.label]
    assert series["samples"] == 600
    assert (series["quantiles_ms"][0], series["quantiles_ms"][-1]) == (1.0, 1.99)
    assert series["quantiles_ms"] == sorted(series["quantiles_ms"])
    assert series["quantiles_ms"][sidecars.QUANTILES // 2] == pytest.approx(1.495, rel=1e-3)
    assert series["rounds_ms"] == [1.495] * 6
    assert found["control"][SETTING.label]["rounds_ms"] == [2.0] * 6


@pytest.mark.parametrize(
    ("details", "title", "layers"),
    [
        (
            {"layers": [{"name": "q", "bits": 4, "error": 0.01, "rtn_error": 0.03, "ratio": 0.33}]},
            "errors of the layers",
            {"q": {"share of the output's energy that changed": 0.01, "the same, rounded to nearest": 0.03}},
        ),
        (
            {"sensitivity": {"distance": "kl", "layers": {"a": 0.5, "b": None}}, "kept": ["a"]},
            "sensitivity of the layers",
            {"a": {"kl": 0.5}},
        ),
        (
            {"relative_error": {"mean": 0.1, "layers": {"a": 0.1}}},
            "relative error",
            {"a": {"relative_error": 0.1}},
        ),
        (
            {"sensitivity": {"distance": "kl", "layers": {"a": {"4 bits": 0.5, "8 bits": math.inf}}}},
            "sensitivity of the layers",
            {"a": {"4 bits": 0.5, "8 bits": None}},
        ),
    ],
)
def test_whatever_a_stage_left_of_its_layers_becomes_one_form(details: Any, title: str, layers: Any) -> None:
    found = sidecars.layers(details)
    assert found is not None
    assert (found["title"], found["layers"]) == (title, layers)


@pytest.mark.parametrize("details", [{}, {"layers": {"before": 6, "after": 3}}, {"layers": [0, 2]}, {"layers": []}])
def test_details_of_another_kind_are_no_table(details: Any) -> None:
    assert sidecars.layers(details) is None


def test_what_is_kept_in_float_is_said() -> None:
    found = sidecars.layers({"sensitivity": {"distance": "kl", "layers": {"a": 0.5}}, "kept": ["a"]})
    assert found is not None
    assert found["kept"] == ["a"]


def test_files_are_written_where_there_is_anything_to_hold(tmp_path: Path) -> None:
    flips = tmp_path / "flips.jsonl"
    flips.write_text(json.dumps(flip(1, text="line\u2028end")) + "\n", encoding="utf-8")
    artifact = Artifact(tmp_path, "onnx", {"labels": ["bad", "good"]}, {})
    subjects = {"base": artifact, "a": artifact}
    assert sidecars.write(subjects, "base", {}, tmp_path / "out") == {}
    found = sidecars.write(subjects, "base", {"flips.a": flips}, tmp_path / "out")
    assert list(found) == ["rows"]
    (row,) = json.loads(found["rows"].read_bytes())["rows"]
    assert (row["columns"]["text"], row["label"]) == ("line\u2028end", "good")
    assert sidecars.write(subjects, "base", {"flips.a": flips}, tmp_path / "out") == found
