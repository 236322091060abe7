"""Language models: the time to the first token of a prompt, and that of each further one through the cache."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimize.artifact import Artifact
from optimize.evaluate import Evaluation, latency
from optimize.evaluate.gates import judge
from optimize.evaluate.latency import Plan, measure
from optimize.evaluate.measured import _settings
from optimize.evaluate.timings import CONTROL, Batch, Decode, Prefill, Round, Setting, Timings
from optimize.evaluate.worker import Text
from optimize.recipe import Evaluate, Gate
from optimize.recipe.latency import Latency

SETTINGS: list[Setting] = [Prefill(4, 1), Prefill(12, 1), Decode(4, 6, 1)]
PREFILL, LONGER, DECODE = (setting.label for setting in SETTINGS)

RUNTIMES = '''
"""Formats of a third party: ONNX Runtime, and sequences whose every token takes a while."""

import time
from types import SimpleNamespace

import numpy as np

from optimize.runtimes import onnx


class Decoder:
    def __init__(self, max_length, seconds):
        self.length, self.max_length, self.seconds = 0, max_length, seconds

    def forward(self, input_ids):
        time.sleep(self.seconds * len(input_ids))
        self.length += len(input_ids)
        assert self.length <= self.max_length == 12
        return np.zeros(10, dtype=np.float32)

    def truncate(self, length):
        time.sleep(0.006)  # which is nobody's to wait for
        self.length = length


class Runner:
    def __init__(self, directory, seconds):
        self.run = lambda inputs: onnx.open(directory, 1).run(inputs)
        self.decoder = lambda max_length: Decoder(max_length, seconds)


def _runtime(seconds):
    def open(directory, threads, *, trust_remote_code=False):
        return Runner(directory, seconds)

    return SimpleNamespace(open=open, parameters=onnx.parameters)


quick, slow = _runtime(0.001), _runtime(0.003)
'''


@pytest.fixture
def writers_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The formats `quick` (a millisecond a token) and `slow` (three), here and in new processes."""
    information = tmp_path / "site" / "writers-1.0.dist-info"
    information.mkdir(parents=True)
    (information.parent / "writers.py").write_text(RUNTIMES)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: writers\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[optimize.runtimes]\nquick = writers:quick\nslow = writers:slow\n")
    site = str(information.parent)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([site, *filter(None, [os.environ.get("PYTHONPATH")])]))


# In a process


class Recorded:
    """A decoder that notes what it is asked."""

    def __init__(self) -> None:
        self.length = 0
        self.asked: list[tuple[str, Any]] = []

    def forward(self, input_ids: Any) -> Any:
        self.asked.append(("read", input_ids.tolist()))
        self.length += len(input_ids)
        return np.zeros(3, dtype=np.float32)

    def truncate(self, length: int) -> None:
        self.asked.append(("truncate", length))
        self.length = length


def test_decoding_goes_through_the_text_and_begins_again_after_the_prompt() -> None:
    decoder = Recorded()
    served, text = Text(decoder), np.arange(5)
    for _ in range(4):
        assert served.decode(text, 3) >= 0
    assert decoder.asked == [
        *(("truncate", 0), ("read", [0, 1, 2]), ("truncate", 3), ("read", [3]), ("read", [4])),
        *(("truncate", 3), ("read", [3]), ("read", [4])),
    ]


@pytest.mark.parametrize(
    ("before", "read_again"),
    [
        (np.arange(10), []),  # a longer prompt of the same text
        (np.arange(3), []),
        (np.arange(2), [[0, 1, 2]]),
        (np.arange(1, 11), [[0, 1, 2]]),
    ],
)
def test_a_prompt_is_read_again_where_the_sequence_does_not_begin_with_it(
    before: Any, read_again: list[list[int]]
) -> None:
    decoder = Recorded()
    served = Text(decoder)
    served.prefill(before)
    decoder.asked.clear()
    served.decode(np.arange(5), 3)
    assert [tokens for what, tokens in decoder.asked if what == "read"] == [*read_again, [3]]
    assert decoder.length == 4


# In rounds of processes


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs POSIX signals")
@pytest.mark.usefixtures("writers_installed")
def test_a_decoder_that_dawdles_is_found_slower(
    toy: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "BLOCK_SECONDS", 0.004)
    monkeypatch.setattr(latency, "LEAST_SECONDS", 0.1)
    paths = [tmp_path / f"{index}.npz" for index in range(len(SETTINGS))]
    for path, setting in zip(paths, SETTINGS, strict=True):
        np.savez(path, input_ids=np.ones(setting.shape, dtype=np.int64))
    plan = Plan(
        artifacts={name: (name, toy(name, format=name)) for name in ("quick", "slow")},
        inputs={"quick": paths, "slow": paths},
        pairs=[],
        half_width=10.0,
        budget_seconds=0.1,
        folder=tmp_path,
        on_round=lambda done, total, left: None,
    )
    timings = Timings(["quick", "slow"], "quick", SETTINGS, fewest=2)
    measure(timings, plan)
    for setting in SETTINGS:
        assert np.mean(timings.log_ratios("slow", "quick", setting.label)) > np.log(1.5)
        assert abs(np.mean(timings.log_ratios(CONTROL, "quick", setting.label))) < np.log(1.5)
    first, longer, decode = (timings.describe("quick", setting) for setting in SETTINGS)
    # A millisecond a token. To forget some takes 6, and reading the prompt again is no part of decoding.
    assert 1 <= decode["p50_ms"] < first["p50_ms"] / 2 < longer["p50_ms"] / 4
    assert first["p50_ms"] < 8
    # All are equally far in the text, however fast they are.
    assert len(set(timings.calls[DECODE].values())) == 1


# From a recipe to gates


def test_what_is_called_follows_from_the_task(writer: Any) -> None:
    artifact = Artifact(Path(), "quick", {"max_length": 8}, {})
    asked = Latency(prefill=(4, 12, 4), decode={"prompt_length": 4, "new_tokens": 6}, batch_sizes=(1, 2))  # type: ignore[arg-type]
    assert _settings(Evaluate(latency=asked), writer, artifact) == SETTINGS
    assert _settings(Evaluate(latency=Latency(prefill=(4,), decode=None)), writer, artifact) == [Prefill(4, 1)]
    # Memory alone is that of the same calls.
    assert _settings(Evaluate(latency=None), writer, artifact) == [Prefill(128, 1), Decode(128, 64, 1)]
    writer.generates = False
    assert _settings(Evaluate(latency=asked), writer, artifact) == [Batch(1, 128, 1), Batch(2, 128, 1)]
    assert _settings(Evaluate(latency=None), writer, artifact) == [Batch(32, 8, 1)]


@pytest.fixture
def writer(toy_task: Any) -> Any:
    """The toy task, as one whose models write on."""
    toy_task.generates = True
    return toy_task


def _rounds(milliseconds: dict[str, Sequence[float]]) -> Callable[[Timings, Plan, float], Round]:
    """Rounds in which a format's calls take so long, a number for each setting."""

    def one(timings: Timings, plan: Plan, deadline: float) -> Round:
        formats = {slot: artifact.format for slot, (_, artifact) in plan.artifacts.items()}
        formats[CONTROL] = formats[timings.baseline]
        seconds = {
            setting.label: {slot: [[milliseconds[name][index] / 1e3]] for slot, name in formats.items()}
            for index, setting in enumerate(timings.settings)
        }
        return Round(seconds, dict.fromkeys(formats, 1), {}, [], (0,), True)

    return one


@pytest.fixture
def evaluation(
    measured: Callable[..., Evaluation],
    writer: Any,
    toy: Callable[..., Artifact],
    writers_installed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Evaluation:
    monkeypatch.setattr(latency, "_round", _rounds({"quick": (4, 12, 1), "slow": (8, 18, 4)}))
    settings = {"prefill": (4, 12), "decode": {"prompt_length": 4, "new_tokens": 6}}
    subjects = {name: toy(name, format=name) for name in ("quick", "slow")}
    return measured(subjects, task=writer, settings={"latency": settings, "fidelity": False})


def test_prefill_and_decode_are_compared_each_at_its_settings(evaluation: Evaluation) -> None:
    assert {"prefill", "decode"} < set(evaluation.metrics)
    assert "latency" not in evaluation.metrics
    told = [(one.setting, one.unit, one.estimate) for one in evaluation.compare("slow", "quick", "prefill")]
    assert told == [(PREFILL, "speedup", pytest.approx(1 / 2)), (LONGER, "speedup", pytest.approx(2 / 3))]
    (decode,) = evaluation.compare("slow", "quick", "decode")
    assert (decode.setting, decode.estimate) == (DECODE, pytest.approx(1 / 4))
    (own,) = evaluation.absolute("slow", "decode")
    assert own.estimate == pytest.approx(4)
    scores = evaluation.scores["slow"]["latency"]
    assert [one["tokens_per_second"] for one in scores] == pytest.approx([500, 12 / 0.018, 250])
    assert scores[2] == {
        **{"phase": "decode", "prompt_length": 4, "new_tokens": 6, "threads": 1},
        **{name: pytest.approx(4) for name in ("p50_ms", "p90_ms", "mean_ms")},
        **{"tokens_per_second": pytest.approx(250), "samples": 6},
    }


@pytest.mark.parametrize(
    ("metric", "limit", "verdicts"),
    [
        ("decode", {"min_speedup": 0.2}, ["pass"]),
        ("decode", {"min_speedup": 0.3}, ["fail"]),
        ("decode", {"max_ms": 3.5}, ["fail"]),
        ("prefill", {"min_speedup": 0.6}, ["fail", "pass"]),
        ("prefill", {"max_ms": 20}, ["pass", "pass"]),
    ],
)
def test_gates_on_prefill_and_decode(
    evaluation: Evaluation, metric: str, limit: dict[str, float], verdicts: list[str]
) -> None:
    results = judge([Gate(metric=metric, **limit)], evaluation, leaves=["slow"], baseline="quick")  # type: ignore[arg-type]
    assert [one.verdict for one in results] == verdicts
    assert results[0].reason.startswith(f"{metric} of slow is ")


def test_a_gate_waits_for_a_baseline_that_agrees_with_itself(evaluation: Evaluation) -> None:
    evaluation.measurement["control"][DECODE]["ci"] = [-0.5, 0.5]
    (result,) = judge([Gate(metric="decode", min_speedup=0.2)], evaluation, leaves=["slow"], baseline="quick")
    assert result.verdict == "inconclusive"
    assert "can't tell" in result.reason
