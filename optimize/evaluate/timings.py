"""What rounds of fresh processes measured, and what follows from it: a log ratio a round for each pair."""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from optimize.evaluate.signals import LIMITS
from optimize.evaluate.statistics import mean_interval
from optimize.evaluate.types import CONFIDENCE, Interval

CONTROL = "control"
"""The slot of the baseline's second process."""
P99_SAMPLES = 299
"""Fewer say nothing about the 99 % quantile: the largest of 299 exceeds it with 95 % certainty."""


class Setting(ABC):
    """What one timed call is, and at what."""

    metric: ClassVar[str]
    """The name by which gates ask for its time."""
    threads: int

    @property
    def label(self) -> str:
        return ",".join(f"{name}={value}" for name, value in vars(self).items())

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows, and tokens of the text, that calls read; no tokens of rows that have no length."""

    @abstractmethod
    def rate(self, seconds: float) -> dict[str, float]:
        """What gets done in a second of calls that take so long."""

    def to_json(self) -> dict[str, Any]:
        """As it stands in run.json; `phase` says which of a language model's two it is."""
        return {"phase": self.metric, **vars(self)}


@dataclass(frozen=True)
class Batch(Setting):
    """A call answers some rows."""

    metric: ClassVar[str] = "latency"
    batch_size: int
    sequence_length: int
    threads: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.batch_size, self.sequence_length

    def rate(self, seconds: float) -> dict[str, float]:
        return {"throughput": self.batch_size / seconds}

    def to_json(self) -> dict[str, Any]:
        return {**vars(self)}


@dataclass(frozen=True)
class Images(Setting):
    """A call answers some rows that are all of one size, and have no length."""

    metric: ClassVar[str] = "latency"
    batch_size: int
    threads: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.batch_size, 0

    def rate(self, seconds: float) -> dict[str, float]:
        return {"throughput": self.batch_size / seconds}

    def to_json(self) -> dict[str, Any]:
        return {**vars(self)}


@dataclass(frozen=True)
class Prefill(Setting):
    """A call reads a prompt and chooses the first token after it."""

    metric: ClassVar[str] = "prefill"
    prompt_length: int
    threads: int

    @property
    def shape(self) -> tuple[int, int]:
        return 1, self.prompt_length

    def rate(self, seconds: float) -> dict[str, float]:
        return {"tokens_per_second": self.prompt_length / seconds}


@dataclass(frozen=True)
class Decode(Setting):
    """A call reads one token, through the cache, and chooses the next: from the prompt's end on to the last of
    `new_tokens`, and again from the prompt's end. What is read is the text's own, whatever was chosen, so that every
    artifact does the same work."""

    metric: ClassVar[str] = "decode"
    prompt_length: int
    new_tokens: int
    threads: int

    @property
    def shape(self) -> tuple[int, int]:
        return 1, self.prompt_length + self.new_tokens

    def rate(self, seconds: float) -> dict[str, float]:
        return {"tokens_per_second": 1 / seconds}


@dataclass(frozen=True)
class Round:
    """What one round measured; JSON."""

    seconds: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
    """Setting -> slot -> turns -> calls, in seconds."""
    peaks: Mapping[str, int]
    """Slot -> the most memory its process held, in bytes, having answered at every setting."""
    signals: Mapping[str, float]
    disturbed: Sequence[str]
    """The signals that passed their limit."""
    cores: Sequence[int]
    denormals: bool
    """Whether every process computes with denormal numbers (False: one or more flush them to zero)."""
    kept: bool = True


@dataclass
class Timings:
    """Rounds of the same artifacts, settings and host. A slot is an artifact's place: one artifact can have two."""

    slots: list[str]
    baseline: str
    settings: list[Setting]
    fewest: int
    """The number of kept rounds at which measuring could first end."""
    timed: bool = True
    """Without it the rounds measure memory alone."""
    turns: dict[str, int] = field(default_factory=dict)
    """Setting -> turns in a round."""
    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    """Setting -> slot -> calls in a block."""
    rounds: list[Round] = field(default_factory=list)
    attempts: int = 0

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Timings:
        settings = [_setting(setting) for setting in value["settings"]]
        return cls(**{**value, "settings": settings, "rounds": [Round(**one) for one in value["rounds"]]})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "settings": [setting.to_json() for setting in self.settings]}

    def only(self, slots: Sequence[str]) -> Timings:
        """The same rounds, of these slots (and the control) alone: more rounds of fewer artifacts join them."""
        wanted = {*slots, CONTROL}

        def of(by_slot: Mapping[str, Any]) -> dict[str, Any]:
            return {slot: value for slot, value in by_slot.items() if slot in wanted}

        return replace(
            self,
            slots=list(slots),
            calls={label: of(calls) for label, calls in self.calls.items()},
            rounds=[
                replace(one, seconds={label: of(turns) for label, turns in one.seconds.items()}, peaks=of(one.peaks))
                for one in self.rounds
            ],
        )

    @property
    def kept(self) -> list[Round]:
        return [one for one in self.rounds if one.kept]

    def log_ratios(self, candidate: str, over: str, label: str) -> list[float]:
        """log(time of candidate / time of over) of each kept round: the median over its turns."""
        return [
            statistics.median(
                math.log(statistics.median(ours) / statistics.median(theirs))
                for ours, theirs in zip(one.seconds[label][candidate], one.seconds[label][over], strict=True)
            )
            for one in self.kept
        ]

    def log_seconds(self, slot: str, label: str) -> list[float]:
        """log(time of a call) of each kept round."""
        return [
            statistics.median(math.log(statistics.median(calls)) for calls in one.seconds[label][slot])
            for one in self.kept
        ]

    def log_peaks(self, slot: str) -> list[float]:
        """log(peak memory in bytes) of each kept round."""
        return [math.log(one.peaks[slot]) for one in self.kept]

    def samples(self, slot: str, label: str) -> list[float]:
        """Every timed call of the kept rounds, in seconds."""
        return [call for one in self.kept for calls in one.seconds[label][slot] for call in calls]

    def interval(self, log_values: Sequence[float], confidence: float) -> Interval:
        """Of the mean of one value a round."""
        return mean_interval(log_values, confidence, fewest=self.fewest)

    def describe(self, slot: str, setting: Setting) -> dict[str, Any]:
        """An entry of `scores.latency` in run.json."""
        import numpy as np

        samples = np.array(self.samples(slot, setting.label))
        p50, p90, p99 = (float(value) for value in np.quantile(samples, (0.5, 0.9, 0.99)) * 1e3)
        return {
            **setting.to_json(),
            "p50_ms": p50,
            "p90_ms": p90,
            **({"p99_ms": p99} if samples.size >= P99_SAMPLES else {}),
            "mean_ms": float(samples.mean()) * 1e3,
            **setting.rate(float(samples.mean())),
            "samples": int(samples.size),
        }

    def measurement(self) -> dict[str, Any]:
        """How well it went: `measurement` in run.json. `control` holds log ratios of the baseline over itself."""
        found: dict[str, Any] = {
            "rounds": len(self.kept),
            "dropped": len(self.rounds) - len(self.kept),
            "noisy": any(one.disturbed for one in self.kept),
            "signals": {
                name: {"limit": limit, "median": statistics.median(values), "max": max(values)}
                for name, limit in LIMITS.items()
                if (values := [one.signals[name] for one in self.kept if name in one.signals])
            },
            "disturbed": [list(one.disturbed) for one in self.rounds],
            "denormals": all(one.denormals for one in self.kept),
            "attempts": self.attempts,
        }
        if self.timed:
            found["control"] = {}
            for setting in self.settings:
                ratios = self.log_ratios(CONTROL, self.baseline, setting.label)
                low, high = self.interval(ratios, CONFIDENCE)
                found["control"][setting.label] = {"estimate": statistics.fmean(ratios), "ci": [low, high]}
        return found


def _setting(value: Mapping[str, Any] | Sequence[int]) -> Setting:
    """From `Setting.to_json`, or from the three numbers of a batch that were all there was to a setting before."""
    if not isinstance(value, Mapping):
        return Batch(*value)
    if "phase" not in value:
        return (Batch if "sequence_length" in value else Images)(**value)
    kinds: dict[str, type[Setting]] = {kind.metric: kind for kind in (Prefill, Decode)}
    return kinds[value["phase"]](**{name: at for name, at in value.items() if name != "phase"})
