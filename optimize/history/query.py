"""What is asked of the history: runs, and how a metric went on from run to run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from sqlalchemy import Select, or_, select
from sqlalchemy.orm import Session, defer

from optimize.history.models import Artifact, Run, Score
from optimize.report.quantities import HOST_BOUND
from optimize.report.table import summary


@dataclass(frozen=True)
class Filters:
    """Which runs and artifacts; None means every."""

    recipe: str | None = None
    artifact: str | None = None
    """A stage's name (`int8`) or what made it (`quantize.int8`)."""
    since: datetime | None = None
    """With a time zone."""
    limit: int | None = None
    """The newest so many runs."""


def runs(session: Session, filters: Filters) -> list[dict[str, Any]]:
    """The runs as JSON, the newest first."""
    return [_described(one) for one in session.scalars(_chosen(filters))]


def trend(session: Session, filters: Filters, metric: str) -> list[dict[str, Any]]:
    """A metric's values as JSON: series of points, the oldest first.

    A series is one artifact of one recipe at one setting, and of times and memory also on one host, since those of two
    hosts can't be compared.
    """
    asked_for = _chosen(filters, metric)
    chosen = {one.run: one for one in session.scalars(asked_for.options(defer(Run.document)))}
    asked = select(Score).where(Score.metric == metric, Score.run.in_(asked_for.with_only_columns(Run.run)))
    if filters.artifact is not None:
        asked = asked.where(or_(Score.artifact == filters.artifact, Score.stage == filters.artifact))
    series: dict[tuple[Any, ...], dict[str, Any]] = {}
    for score in sorted(session.scalars(asked), key=lambda score: (score.run, score.number)):
        run = chosen[score.run]
        host = run.host if metric.partition(".")[0] in HOST_BOUND else None
        named = {"recipe": run.recipe, "artifact": score.artifact, "stage": score.stage}
        head = {**named, "metric": metric, "setting": score.setting, "unit": score.unit, "host": host}
        one = series.setdefault(
            tuple(head.values()), {**head, "host_name": run.host_name if host else None, "points": []}
        )
        ci = None if score.low is None or score.high is None else [score.low, score.high]
        named = {"run": run.run, "started": _iso(run.started), "host": run.host, "verdict": run.verdict}
        one["points"].append({**named, "value": score.value, "ci": ci, "n": score.n})
    return list(series.values())


def known(session: Session) -> dict[str, list[str]]:
    """Every recipe and metric that some run has."""
    found = {"recipe": select(Run.recipe).distinct(), "metric": select(Score.metric).distinct()}
    return {name: sorted(session.scalars(asked)) for name, asked in found.items()}


def _chosen(filters: Filters, metric: str | None = None) -> Select[Any]:
    asked = select(Run)
    if filters.recipe is not None:
        asked = asked.where(Run.recipe == filters.recipe)
    if filters.since is not None:
        asked = asked.where(Run.started >= filters.since.astimezone(timezone.utc))
    if metric is not None:
        found = select(Score.run).where(Score.metric == metric)
        if filters.artifact is not None:
            found = found.where(or_(Score.artifact == filters.artifact, Score.stage == filters.artifact))
        asked = asked.where(Run.run.in_(found))
    elif filters.artifact is not None:
        named = or_(Artifact.name == filters.artifact, Artifact.stage == filters.artifact)
        asked = asked.where(Run.run.in_(select(Artifact.run).where(named)))
    # An id is in the order of time.
    asked = asked.order_by(Run.run.desc())
    return asked if filters.limit is None else asked.limit(filters.limit)


def _described(run: Run) -> dict[str, Any]:
    promoted = None if run.alias is None else {"alias": run.alias, "version": run.version}
    return {
        "run": run.run,
        "started": _iso(run.started),
        "kind": run.kind,
        "recipe": run.recipe,
        "recipe_digest": run.recipe_digest,
        "verdict": run.verdict,
        "exit_code": run.exit_code,
        "error": run.error,
        "seconds": run.seconds,
        "host": run.host,
        "host_name": run.host_name,
        "promoted": promoted,
        "summary": _summary(run.document),
    }


def _summary(document: Mapping[str, Any]) -> str:
    try:
        return summary(document)
    except (KeyError, TypeError, ValueError):  # a document from elsewhere
        return ""


def _iso(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).astimezone(timezone.utc).isoformat()


def spark(values: Iterable[float]) -> str:
    """Values as a row of bars, the lowest and the highest at the ends of the scale."""
    found = list(values)
    low, high = min(found, default=0.0), max(found, default=0.0)
    if low == high:
        return "▄" * len(found)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low))] for value in found)
