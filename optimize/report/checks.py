"""What the gates of a run.json say, one check a gate and setting, as everything that CI shows draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

from optimize.evaluate.gates import IN_ROUNDS, RULES
from optimize.evaluate.types import CONFIDENCE, TIMES
from optimize.report.table import deciding_gates, megabytes

Outcome = Literal["fail", "inconclusive", "warned", "acknowledged", "pass"]
ORDER: tuple[Outcome, ...] = ("fail", "inconclusive", "warned", "acknowledged", "pass")
"""From the worst: `warned` is inconclusive under `on_inconclusive: warn`."""
BETTER, WORSE = "\N{BLACK UP-POINTING TRIANGLE} better", "\N{BLACK DOWN-POINTING TRIANGLE} worse"
WRONG_CLAIMS = 0.05
"""How often, at most, a comment on a candidate that differs in nothing says that something is better or worse."""


@dataclass(frozen=True)
class Check:
    """A gate on one artifact at one setting, as text. All of it is hostile still: escape it where it is shown."""

    gate: Mapping[str, Any]
    outcome: Outcome
    value: str
    """The artifact's own measurement, such as `7.98 ms`."""
    estimate: str
    """What the limit is held against: a difference, a share, a speed-up, or the value."""
    interval: str
    limit: str
    margin: str
    claim: str
    """`BETTER`, `WORSE`, or nothing where the interval can't tell either from no change."""

    @property
    def what(self) -> str:
        """`latency of int8 over onnx at batch_size=1, threads=1`."""
        over = f" over {self.gate['over']}" if self.gate["over"] else ""
        return f"{self.gate['metric']} of {self.gate['artifact']}{over}{self.where}"

    @property
    def where(self) -> str:
        return f" at {self.gate['setting'].replace(',', ', ')}" if self.gate["setting"] else ""

    @property
    def place(self) -> tuple[str, int, int] | None:
        """File, line and column of the gate in its recipe."""
        return place_of(self.gate.get("location"))


def checks(document: Mapping[str, Any]) -> list[Check]:
    """The checks that the run's verdict is of, the smallest margin first (as a share of the limit)."""
    again = document.get("confirmation")
    return _shown(document, deciding_gates(document), again or {})


def others(document: Mapping[str, Any]) -> list[Check]:
    """The checks that only chose among leaves: one of those was measured again, and that decided."""
    among = set((document.get("confirmation") or {}).get("among") or ())
    return _shown(document, [gate for gate in document["gates"] if gate["artifact"] in among], {})


def worst_first(found: Sequence[Check]) -> list[Check]:
    """By outcome, then by margin."""
    return sorted(found, key=lambda check: (ORDER.index(check.outcome), _share(check.gate)))


def count_claims(document: Mapping[str, Any]) -> int:
    """How many gated quantities the comment calls better or worse."""
    return 0 if document.get("error") else sum(bool(check.claim) for check in checks(document))


def place_of(location: object) -> tuple[str, int, int] | None:
    """`recipe.yaml:12:5` as file, line and column; None for anything else."""
    file, line, column = ["", "", "", *str(location or "").rsplit(":", 2)][-3:]
    if not (file and line.isdecimal() and column.isdecimal() and len(line) < 9 > len(column)):
        return None
    return file, int(line), int(column)


def _shown(document: Mapping[str, Any], gates: Sequence[Mapping[str, Any]], again: Mapping[str, Any]) -> list[Check]:
    """`again` is the confirmation where the gates on a selected leaf are that one's."""
    evidence = _Evidence(
        artifacts={one["name"]: one for one in document["artifacts"]},
        samples={_pair(one): one["n"] for one in document["comparisons"]},
        control=_control(document),
        control_again={name: _control(again) for name in again.get("among") or ()},
        together=len(gates),
    )
    return sorted((_check(gate, evidence) for gate in gates), key=lambda check: _share(check.gate))


@dataclass(frozen=True)
class _Evidence:
    """What of a run bears on its gates."""

    artifacts: Mapping[str, Mapping[str, Any]]
    samples: Mapping[tuple[Any, ...], int]
    """Rows or rounds of each comparison."""
    control: Mapping[str, Any]
    """The baseline against itself, by setting."""
    control_again: Mapping[str, Mapping[str, Any]]
    """The same of artifacts that were measured again."""
    together: int
    """Gated quantities that are shown together."""

    def digest(self, name: str) -> object:
        return self.artifacts.get(name, {}).get("digest")


def _control(measured: Mapping[str, Any]) -> Mapping[str, Any]:
    return (measured.get("measurement") or {}).get("control") or {}


def _pair(one: Mapping[str, Any]) -> tuple[Any, ...]:
    return (one["artifact"], one["over"], one["metric"], one["setting"])


def _check(gate: Mapping[str, Any], evidence: _Evidence) -> Check:
    ((name, limit),) = gate["limit"].items()
    show = _form(gate["metric"], name)
    low, high = gate["ci"]
    exact = low is not None and low == high
    return Check(
        gate=gate,
        outcome=_outcome(gate),
        value=_value(evidence.artifacts.get(gate["artifact"]), gate),
        estimate=_number(gate["estimate"], show),
        interval="exact" if exact else f"{_number(low, show)} to {_number(high, show)}",
        limit=f"{name} {_number(limit, _form(gate['metric'], name, signed=False))}",
        margin=_number(gate["margin"], _form(gate["metric"], name, sign="+")),
        claim=_claim(gate, evidence),
    )


def _outcome(gate: Mapping[str, Any]) -> Outcome:
    if gate["verdict"] != "pass" and gate.get("acknowledged"):
        return "acknowledged"
    if gate["verdict"] == "inconclusive" and gate.get("on_inconclusive") == "warn":
        return "warned"
    return gate["verdict"]  # type: ignore[no-any-return]


def _share(gate: Mapping[str, Any]) -> float:
    """The margin as a share of the limit: what makes gates of different units comparable."""
    if gate["margin"] is None:
        return math.inf if gate["verdict"] == "pass" else -math.inf
    return float(gate["margin"] / max(abs(next(iter(gate["limit"].values()))), 1e-9))


# --- numbers ----------------------------------------------------------------------------------------------------------


def _form(metric: str, limit: str, *, signed: bool = True, sign: str = "") -> Any:
    """How a number in the unit of a limit is written."""
    unit = RULES[limit].unit
    if unit == "difference":
        return f"{{:{'+' if signed else ''}.4g}}".format
    if unit in ("ratio", "speedup"):
        return f"{{:{sign}.4g}}\N{MULTIPLICATION SIGN}".format
    if metric in TIMES:
        return f"{{:{sign}.4g}} ms".format
    if metric in ("size", "peak_memory"):
        return lambda size: ("-" if size < 0 else sign) + megabytes(abs(size))
    return f"{{:{sign}.4g}}".format


def _number(value: float | None, show: Any) -> str:
    """Too few rounds bound no interval, and its end is null in run.json."""
    return "?" if value is None else str(show(value))


def _value(described: Mapping[str, Any] | None, gate: Mapping[str, Any]) -> str:
    """What was measured of the judged artifact itself."""
    metric = gate["metric"]
    if described is None:
        return ""
    scores = described.get("scores", {})
    if metric == "size":
        return megabytes(described["size_bytes"])
    if metric == "peak_memory":
        return megabytes(scores[key]) if (key := "peak_memory_bytes") in scores else ""
    if metric in TIMES:
        wanted = set((gate["setting"] or "").split(","))
        for one in scores.get("latency") or ():
            phase = one.get("phase", "latency")
            if phase == metric and wanted <= {f"{name}={value}" for name, value in one.items()}:
                return f"{one['p50_ms']:.4g} ms"
        return ""
    score = scores.get(metric)
    return _number(score.get("value"), "{:.4g}".format) if isinstance(score, Mapping) else ""


# --- better or worse --------------------------------------------------------------------------------------------------


def _claim(gate: Mapping[str, Any], evidence: _Evidence) -> str:
    """Whether the interval excludes no change, once it is widened for all the quantities that are shown together.

    Of one quantity, a 90 % interval errs once in ten; a comment on several would say nearly every time that something
    is better or worse. Times must also differ by more than the baseline did from itself. Equal bytes differ in nothing.
    """
    rule = RULES[next(iter(gate["limit"]))]
    low, high = gate["ci"]
    if rule.unit == "absolute" or gate["over"] is None or None in (low, high, gate["estimate"]):
        return ""
    if (mine := evidence.digest(gate["artifact"])) is not None and mine == evidence.digest(gate["over"]):
        return ""
    estimate, none = float(gate["estimate"]), 0.0
    if rule.unit != "difference":
        if min(low, estimate, high) <= 0:
            return ""
        low, estimate, high = math.log(low), math.log(estimate), math.log(high)
    if low < high:
        wider = _widening(evidence.together, _freedom(gate, evidence))
        low, high = estimate - wider * (estimate - low), estimate + wider * (high - estimate)
    if gate["metric"] in TIMES and abs(estimate) < _own_difference(gate, evidence):
        return ""
    if low <= none <= high:
        return ""
    return BETTER if (low > none) == (rule.side > 0) else WORSE


def _widening(together: int, freedom: float) -> float:
    """From half of a 90 % interval to half of one that, over all of them, errs in `WRONG_CLAIMS` (Bonferroni)."""
    return _quantile(1 - WRONG_CLAIMS / together / 2, freedom) / _quantile((1 + CONFIDENCE) / 2, freedom)


def _quantile(share: float, freedom: float) -> float:
    """Of Student's t, by the expansion in 1 / freedom around the normal's. Abramowitz and Stegun, 26.7.5."""
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def _freedom(gate: Mapping[str, Any], evidence: _Evidence) -> float:
    """Degrees of freedom: of rounds there are few, of rows many."""
    if gate["metric"] not in IN_ROUNDS:
        return math.inf
    return max(evidence.samples.get(_pair(gate), 6) - 1, 3)


def _own_difference(gate: Mapping[str, Any], evidence: _Evidence) -> float:
    """How far, as a log ratio, the baseline may be from itself at that setting: the far end of the A/A control."""
    control = evidence.control_again.get(gate["artifact"], evidence.control)
    ends = (control.get(gate["setting"]) or {}).get("ci") or ()
    return max((math.inf if end is None else abs(end) for end in ends), default=0.0)
