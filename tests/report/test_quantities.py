"""Every score of a run.json, flat."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written_runs import SETTING, document

from optimize.report.quantities import quantities


def test_every_score_once() -> None:
    told = document(accuracy=0.79, p50_ms=4.0)
    found = {(one.metric, one.setting): one for one in quantities(told) if one.artifact == "int8"}
    accuracy = found["accuracy", None]
    assert (accuracy.value, accuracy.low, accuracy.high, accuracy.n) == (0.79, 0.78, 0.8, 1000)
    latency = found["latency", SETTING]
    assert (latency.value, latency.unit, latency.n, latency.host_bound) == (4.0, "ms", 32, True)
    assert found["latency.throughput", SETTING].value == 2000
    assert found["latency.p90_ms", SETTING].host_bound
    assert (found["size", None].value, found["size", None].unit) == (5e9, "bytes")
    assert (found["peak_memory", None].unit, found["peak_memory", None].host_bound) == ("bytes", True)
    assert found["fidelity.baseline.kl.p99", None].value == 0.2
    assert not [one for one in quantities(told) if one.metric == "f1"], "it has no value"


def test_a_language_models_phases_are_metrics_of_their_own() -> None:
    told = document()
    told["artifacts"][0]["scores"]["latency"] = [
        {"phase": "prefill", "prompt_length": 16, "threads": 1, "p50_ms": 2.0, "tokens_per_second": 8000.0},
        {"phase": "decode", "new_tokens": 8, "prompt_length": 16, "threads": 1, "p50_ms": 1.0},
    ]
    found = {(one.metric, one.setting): one.value for one in quantities(told) if one.artifact == "teacher"}
    assert found["prefill", "prompt_length=16,threads=1"] == 2.0
    assert found["prefill.tokens_per_second", "prompt_length=16,threads=1"] == 8000.0
    assert found["decode", "prompt_length=16,new_tokens=8,threads=1"] == 1.0


scores = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.text().filter(lambda name: name != "latency"), scores, max_size=4))
def test_whatever_a_score_is_only_numbers_come_out(found: dict[str, object]) -> None:
    told = document()
    for value in found.values():
        if isinstance(value, dict):
            value.pop("ci", None)
    told["artifacts"][0]["scores"] = found
    assert all(isinstance(one.value, int | float) for one in quantities(told))


@pytest.mark.parametrize("value", [True, None, "0.8"])
def test_what_is_no_number_is_left_out(value: object) -> None:
    told = document()
    told["artifacts"][0]["scores"] = {"mine": value}
    assert "mine" not in [one.metric for one in quantities(told)]
