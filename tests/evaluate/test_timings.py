from __future__ import annotations

import json
import math

import pytest

from optimize.evaluate.statistics import mean_interval
from optimize.evaluate.timings import CONTROL, P99_SAMPLES, Batch, Decode, Prefill, Round, Timings

SETTING = Batch(8, 128, 1)
LABEL = "batch_size=8,sequence_length=128,threads=1"


def a_round(factor: float = 1.0, kept: bool = True, disturbed: tuple[str, ...] = ()) -> Round:
    """Three turns of two calls; the machine slows down from turn to turn, and b takes half as long as a."""
    turns = [[0.01 * factor, 0.012 * factor], [0.02, 0.024], [0.04, 0.048]]
    halved = [[call / 2 for call in calls] for calls in turns]
    seconds = {LABEL: {"a#0": turns, "b#0": halved, CONTROL: turns}}
    peaks = {"a#0": 100, "b#0": 50, CONTROL: 101}
    return Round(seconds, peaks, {"waited": 0.001}, list(disturbed), (1,), True, kept)


def timings(*rounds: Round) -> Timings:
    return Timings(["a#0", "b#0"], "a#0", [SETTING], fewest=2, rounds=list(rounds), attempts=1)


def test_a_round_gives_one_ratio_by_turns() -> None:
    measured = timings(a_round(), a_round(0.9))
    assert SETTING.label == LABEL
    assert measured.log_ratios("b#0", "a#0", LABEL) == pytest.approx([-math.log(2)] * 2)
    assert measured.log_ratios(CONTROL, "a#0", LABEL) == pytest.approx([0, 0])
    assert measured.log_seconds("a#0", LABEL) == pytest.approx([math.log(0.022)] * 2)
    assert measured.log_peaks("b#0") == pytest.approx([math.log(50)] * 2)


def test_dropped_rounds_count_for_nothing() -> None:
    measured = timings(a_round(), a_round(100.0, kept=False, disturbed=("waited",)), a_round())
    assert len(measured.samples("a#0", LABEL)) == 12
    assert max(measured.samples("a#0", LABEL)) < 0.1
    told = measured.measurement()
    assert (told["rounds"], told["dropped"], told["noisy"], told["attempts"]) == (2, 1, False, 1)
    assert told["disturbed"] == [[], ["waited"], []]
    assert told["control"][LABEL]["estimate"] == pytest.approx(0)
    assert told["signals"]["waited"]["max"] == 0.001


def test_a_disturbed_round_that_was_kept_is_said() -> None:
    assert timings(a_round(disturbed=("waited",)), a_round()).measurement()["noisy"]


def test_the_interval_knows_when_measuring_could_first_end() -> None:
    values = [0.1, 0.2, 0.4, 0.2, 0.3]
    assert timings().interval(values, 0.9) == mean_interval(values, 0.9, fewest=2)


def test_scores_hold_quantiles_and_throughput() -> None:
    told = timings(a_round(), a_round()).describe("a#0", SETTING)
    assert told["p50_ms"] == pytest.approx(22)
    assert told["throughput"] == pytest.approx(8 / 0.0256666, rel=1e-4)
    assert told["samples"] == 12
    assert "p99_ms" not in told
    many = timings(*[a_round()] * (P99_SAMPLES // 6 + 1)).describe("a#0", SETTING)
    assert many["samples"] >= P99_SAMPLES
    assert many["p99_ms"] == pytest.approx(48)


def test_fewer_artifacts_keep_their_rounds_and_the_control() -> None:
    fewer = timings(a_round(), a_round()).only(["a#0"])
    assert fewer.slots == ["a#0"]
    assert set(fewer.rounds[0].seconds[LABEL]) == {"a#0", CONTROL} == set(fewer.rounds[0].peaks)


def test_a_language_model_is_told_of_in_tokens() -> None:
    assert Prefill(128, 1).rate(0.5) == {"tokens_per_second": 256}
    assert Decode(128, 64, 1).rate(0.05) == {"tokens_per_second": 20}
    assert Decode(128, 64, 2).label == "prompt_length=128,new_tokens=64,threads=2"


def test_every_setting_goes_to_json_and_back() -> None:
    settings = [Batch(1, 8, 1), Prefill(16, 2), Decode(16, 4, 1)]
    measured = Timings(["a#0"], "a#0", [*settings], fewest=2)
    told = json.loads(json.dumps(measured.to_json()))
    assert [one.get("phase") for one in told["settings"]] == [None, "prefill", "decode"]
    assert Timings.from_json(told).settings == settings
    # As a batch was written before there was anything else.
    assert Timings.from_json({**told, "settings": [[8, 128, 1]]}).settings == [SETTING]


def test_json_and_back() -> None:
    measured = timings(a_round(), a_round(kept=False))
    back = Timings.from_json(json.loads(json.dumps(measured.to_json())))
    assert json.dumps(back.to_json()) == json.dumps(measured.to_json())
    assert back.settings == [SETTING]
    assert back.measurement() == measured.measurement()
