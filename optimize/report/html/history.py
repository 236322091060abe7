"""An artifact's scores from run to run: the candidate's and the baseline's own values, with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimize.report.html.reading import Result
from optimize.report.html.svg import WIDTH, Scale, join, line, mark, picture, scale_of, words, y_axis
from optimize.report.html.words import bytes_words, milliseconds, number, round_milliseconds, time_words
from optimize.run import verdict_on

if TYPE_CHECKING:
    from markupsafe import Markup

HEIGHT = 190.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 14.0, 14.0, 40.0
SHAPES = {"pass": "circle", "fail": "diamond", "inconclusive": "triangle", "": "square"}


@dataclass(frozen=True)
class Moment:
    """One run in a chart. `joins`: a line leads to it from the moment before (same rows, or same host)."""

    label: str
    version: str
    value: float
    ci: tuple[float | None, float | None] | None
    baseline: float | None
    verdict: str
    joins: bool


def charts(results: Sequence[Result], labels: Sequence[str]) -> list[dict[str, Any]]:
    """A picture and its table for each quantity that two runs or more have."""
    keys: dict[tuple[str, str | None], tuple[str, Callable[[float | None], str]]] = {}
    for result in results:
        keys |= {(metric, None): (metric, number) for metric in result.qualities[:1]}
        keys |= {(phase, at): (time_words(phase, at), milliseconds) for phase, at in result.times}
    keys[("size", None)] = ("size", bytes_words)
    drawn = []
    for index, ((metric, at), (title, show)) in enumerate(keys.items()):
        moments = find_moments(results, labels, metric, at)
        if not moments:
            continue
        rows = [
            [f"{m.label}{m.version}", show(m.value), show(m.baseline) if m.baseline is not None else "", m.verdict]
            for m in moments
        ]
        drawn.append({"title": title, "picture": draw(f"history-{index}", title, moments, show), "rows": rows})
    return drawn


def candidate(result: Result) -> str | None:
    """The artifact that a run selected, else the last one that its gates judged, else its last."""
    selected = [one["name"] for one in result.artifacts if one["digest"] == result.document.get("selected")]
    judged = [name for name in result.names if verdict_on(result.document, name)]
    return next(iter([*selected[-1:], *judged[-1:], *result.names[-1:]]), None)


def find_moments(results: Sequence[Result], labels: Sequence[str], metric: str, at: str | None) -> list[Moment]:
    found: list[Moment] = []
    before: Any = None
    for result, label in zip(results, labels, strict=True):
        name = candidate(result)
        if name is None or result.document["error"]:
            continue
        value = _value(result, name, metric, at)
        if value is None:
            continue
        score = result.artifact(name)["scores"].get(metric) if at is None and metric != "size" else None
        promoted = result.document["promoted"]
        same = _conditions(result, at)
        found.append(
            Moment(
                label=label,
                version=f" v{promoted['version']}" if promoted else "",
                value=value,
                ci=(score["ci"][0], score["ci"][1]) if score and score.get("ci") else None,
                baseline=_value(result, result.baseline, metric, at) if result.baseline else None,
                verdict=verdict_on(result.document, name) or "",
                joins=metric == "size" or same == before,
            )
        )
        before = same
    return found


def _conditions(result: Result, at: str | None) -> Any:
    """What has to be the same for two values to be of one line: the host of times, the rows of a quality."""
    if at is not None:
        return {key: value for key, value in result.document["host"].items() if key != "memory_bytes"}
    return (result.document["data"].get("evaluation") or {}).get("digest")


def _value(result: Result, name: str, metric: str, at: str | None) -> float | None:
    if metric == "size":
        return float(result.artifact(name)["size_bytes"])
    return result.quality(name, metric) if at is None else result.milliseconds(name, metric, at)


def draw(name: str, title: str, moments: Sequence[Moment], show: Callable[[float | None], str]) -> Markup:
    """Runs from left to right, evenly; the baseline's values as short bars."""
    values = [value for m in moments for value in (m.value, m.baseline, *(m.ci or ()))]
    up = scale_of(values, HEIGHT - BOTTOM, TOP, pad=0.1)
    across = Scale(-0.5, len(moments) - 0.5, LEFT, WIDTH - RIGHT)
    ticks: Callable[[float], str] = round_milliseconds if show is milliseconds else show
    parts = [y_axis(up, LEFT, WIDTH - RIGHT, ticks, most=4)]
    every = -(-len(moments) // 12)
    for index, moment in enumerate(moments):
        x, y = across(index), up(moment.value)
        if moment.joins and index:
            parts.append(line(across(index - 1), up(moments[index - 1].value), x, y, "bar candidate"))
        if moment.baseline is not None:
            base = up(moment.baseline)
            parts.append(line(x - 7, base, x + 7, base, "to"))
        if moment.ci:
            low, high = (
                up(end) if end is not None else edge for end, edge in zip(moment.ci, (up.start, up.end), strict=True)
            )
            parts.append(line(x, low, x, high, f"interval thin {moment.verdict}"))
        if index % every == 0:
            parts.append(words(x, HEIGHT - BOTTOM + 14, moment.label, "tick", anchor="middle"))
            parts.append(words(x, HEIGHT - BOTTOM + 28, moment.version.strip(), "tick", anchor="middle"))
    parts += [
        mark(SHAPES.get(m.verdict, "square"), across(index), up(m.value), 4.5, f"estimate {m.verdict}")
        for index, m in enumerate(moments)
    ]
    described = "; ".join(f"{m.label}{m.version}: {show(m.value)} {m.verdict}".strip() for m in moments)
    return picture(name, HEIGHT, f"{title} from run to run", described, join(parts))
