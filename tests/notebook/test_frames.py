"""run.json as frames: every number at its place, whatever was measured or not."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from optimize.errors import OptimizeError
from optimize.notebook import frames

pd = pytest.importorskip("pandas")


def test_one_row_an_artifact(document: dict[str, Any]) -> None:
    frame = frames.artifacts(document)
    assert list(frame.index) == [one["name"] for one in document["artifacts"]]
    teacher = frame.loc["teacher"]
    assert (teacher.accuracy, teacher.accuracy_low, teacher.accuracy_high) == pytest.approx((0.8, 0.78, 0.82))
    assert (teacher.p50_ms_batch_1, teacher.p50_ms_batch_8, teacher.p90_ms_batch_1) == pytest.approx((20, 100, 22))
    assert teacher.size_bytes == 90_000_000
    assert list(frame.verdict.dropna()) == ["inconclusive"]
    assert "fidelity" not in frame


def test_settings_that_differ_in_length_have_columns_of_their_own(document: dict[str, Any]) -> None:
    for one in document["artifacts"]:
        one["scores"]["latency"].append({**one["scores"]["latency"][0], "sequence_length": 16, "p50_ms": 3.0})
    frame = frames.artifacts(document)
    assert frame.p50_ms_batch_1_length_16["teacher"] == 3.0
    assert frame.p50_ms_batch_1_length_128["teacher"] == 20.0


def test_of_a_language_model_the_two_times(document: dict[str, Any]) -> None:
    document["artifacts"][0]["scores"]["latency"] = [
        {"phase": "prefill", "prompt_length": 128, "threads": 1, "p50_ms": 412.0, "p90_ms": 415.0},
        {"phase": "decode", "prompt_length": 128, "new_tokens": 64, "p50_ms": 54.9, "tokens_per_second": 18.2},
    ]
    found = frames.artifacts(document).loc["teacher"]
    assert (found.prefill_ms_prompt_128, found.decode_ms, found.decode_tokens_per_second) == (412.0, 54.9, 18.2)


def test_a_run_without_times_has_none(document: dict[str, Any]) -> None:
    for one in document["artifacts"]:
        one["scores"] = {"accuracy": one["scores"]["accuracy"]}
    assert not [column for column in frames.artifacts(document) if "_ms" in column]


def test_comparisons_and_gates(document: dict[str, Any]) -> None:
    compared = frames.comparisons(document)
    assert len(compared) == len(document["comparisons"])
    assert (compared.low[0], compared.high[0]) == (-0.12, -0.08)
    assert compared.low.isna().sum() == 1  # an end that nothing bounds
    judged = frames.gates(document)
    assert list(judged.limit) == ["max_drop", "min_speedup"]
    assert list(judged.value) == [0.02, 1.6]
    assert list(judged.verdict) == ["inconclusive", "pass"]


def test_a_run_that_compared_nothing_has_empty_frames(document: dict[str, Any]) -> None:
    empty = {**document, "comparisons": [], "gates": []}
    assert len(frames.comparisons(empty)) == len(frames.gates(empty)) == 0
    assert "estimate" in frames.comparisons(empty)


def test_without_pandas_the_extra_is_named(document: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(OptimizeError, match=r"run\.artifacts needs pandas") as caught:
        frames.artifacts(document)
    assert "optimize-workbench[notebook]" in str(caught.value.hint)
