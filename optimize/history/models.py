"""The tables of the history, as SQLAlchemy's typed models.

`optimize_runs` holds every `run.json` as it stands, and the other tables are drawn from it, so that a newer schema can
be filled from an older one. `None` in a number is what `run.json` has as null.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, ForeignKey, Index, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, datetime: DateTime(timezone=True)}


class Schema(Base):
    """One row: which schema the tables have. It is written last, so a database without it was cut short."""

    __tablename__ = "optimize_schema"

    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int]


class Run(Base):
    """A run, whatever became of it."""

    __tablename__ = "optimize_runs"

    run: Mapped[str] = mapped_column(primary_key=True)
    started: Mapped[datetime | None] = mapped_column(index=True)
    """UTC; SQLite has no time zones and gives it without one."""
    kind: Mapped[str]
    """`apply`, `compare` or `gate`."""
    recipe: Mapped[str] = mapped_column(index=True)
    recipe_digest: Mapped[str]
    verdict: Mapped[str | None]
    exit_code: Mapped[int]
    error: Mapped[str | None]
    error_stage: Mapped[str | None]
    seconds: Mapped[float]
    host: Mapped[str] = mapped_column(String(12))
    """The fingerprint: times of two runs are comparable where it is the same."""
    host_name: Mapped[str]
    baseline: Mapped[str | None]
    alias: Mapped[str | None]
    """What it promoted, and as which version."""
    version: Mapped[int | None]
    document: Mapped[dict[str, Any]]
    """`run.json`."""


def _of_run() -> Any:
    return mapped_column(ForeignKey("optimize_runs.run", ondelete="CASCADE"), primary_key=True)


class Artifact(Base):
    """An artifact as a run made or reused it."""

    __tablename__ = "optimize_artifacts"

    run: Mapped[str] = _of_run()
    number: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    stage: Mapped[str]
    """What made it, such as `quantize.int8`."""
    digest: Mapped[str] = mapped_column(index=True)
    key: Mapped[str | None]
    parent: Mapped[str | None]
    format: Mapped[str]
    cached: Mapped[bool]
    seconds: Mapped[float]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    bits_per_weight: Mapped[float]


class Score(Base):
    """One number about one artifact."""

    __tablename__ = "optimize_scores"
    __table_args__ = (Index("optimize_scores_metric", "metric", "artifact"),)

    run: Mapped[str] = _of_run()
    number: Mapped[int] = mapped_column(primary_key=True)
    artifact: Mapped[str]
    stage: Mapped[str]
    metric: Mapped[str]
    setting: Mapped[str | None]
    value: Mapped[float]
    low: Mapped[float | None]
    high: Mapped[float | None]
    unit: Mapped[str]
    n: Mapped[int | None]


class Comparison(Base):
    """One artifact held against another."""

    __tablename__ = "optimize_comparisons"

    run: Mapped[str] = _of_run()
    number: Mapped[int] = mapped_column(primary_key=True)
    artifact: Mapped[str]
    over: Mapped[str | None]
    metric: Mapped[str]
    setting: Mapped[str | None]
    unit: Mapped[str]
    estimate: Mapped[float | None]
    low: Mapped[float | None]
    high: Mapped[float | None]
    n: Mapped[int | None]


class Gate(Base):
    """What a gate said about one artifact at one setting."""

    __tablename__ = "optimize_gates"

    run: Mapped[str] = _of_run()
    number: Mapped[int] = mapped_column(primary_key=True)
    artifact: Mapped[str]
    over: Mapped[str | None]
    metric: Mapped[str]
    setting: Mapped[str | None]
    limit_name: Mapped[str]
    limit_value: Mapped[float]
    estimate: Mapped[float | None]
    low: Mapped[float | None]
    high: Mapped[float | None]
    margin: Mapped[float | None]
    verdict: Mapped[str]
    reason: Mapped[str]
    acknowledged: Mapped[bool]
    confirmation: Mapped[bool]
    """Whether it judged a selected artifact that was measured once more."""
