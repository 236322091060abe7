"""Known regressions that were looked at and let pass for a while: lines of a file that lies beside the recipe.

    # acknowledged.yaml
    version: 1
    acknowledged:
      - metric: latency
        on: int8
        up_to: 0.9                    # as far as min_speedup 0.9, and no further
        reason: the new tokenizer costs a tenth; faster kernels come with the next release
        expires: 2026-12-31

A line turns a gate that failed into one that does not count; the gate keeps its verdict, and every output says so. It
never hides an error, nor, unless it says `inconclusive: true`, a gate that could not be decided. A line that has
expired, or that nothing needs any more, is told of, so that the file does not grow old.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from optimize.config import Block
from optimize.registry import Waiver

if TYPE_CHECKING:
    from optimize.evaluate.types import GateResult
    from optimize.recipe import Gate, Recipe
    from optimize.recipe.text import Text
    from optimize.scoring import Judging

FILE = "acknowledged.yaml"
MAX_LINES = 200


def _check_date(text: str) -> str:
    import re
    from datetime import date

    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        raise ValueError(f"expected a date such as 2026-12-31, got {text[:40]!r}")
    date.fromisoformat(text)
    return text


def _check_reason(text: str) -> str:
    if not text.strip():
        raise ValueError("a reason says why this is let pass")
    return text.strip()


class Line(Block):
    """One regression that is let pass."""

    metric: str
    """The gate's metric."""
    on: str | None = None
    """The stage whose artifact got worse; without it, any."""
    over: str | None = None
    """What it got worse than: a stage, or the promoted artifact's name (`production`, `production~5`); else any."""
    setting: str | None = None
    """What it was measured at, such as `batch_size=8,sequence_length=128,threads=1`; without it, every setting."""
    limit: str | None = None
    """The kind of limit, such as `max_drop`, where a metric has several gates."""
    up_to: float | None = None
    """How far it may go: a value for the gate's own kind of limit. It has to be shown that it goes no further."""
    inconclusive: bool = False
    """Let a gate pass as well that could not be decided."""
    reason: Annotated[str, AfterValidator(_check_reason)]
    """Why this is let pass."""
    expires: Annotated[str, AfterValidator(_check_date)]
    """The last day (in UTC) on which it is."""


class Document(Block):
    """`acknowledged.yaml`."""

    version: Literal[1]
    """The version of this schema."""
    acknowledged: list[dict[str, Any]] = Field(max_length=MAX_LINES)
    """What is let pass, a line each."""


@dataclass(frozen=True)
class Acknowledgement:
    """A line, where it stands, and whether it still holds."""

    line: Line
    location: str

    @property
    def expired(self) -> bool:
        return Waiver(self.line.reason, self.line.expires).expired

    def concerns(self, result: GateResult) -> bool:
        line, (limit,) = self.line, result.limit
        wanted = ((line.on, result.artifact), (line.over, result.over), (line.setting, result.setting))
        return line.metric == result.metric and all(
            asked in (None, found) for asked, found in (*wanted, (line.limit, limit))
        )

    def to_json(self) -> dict[str, str]:
        return {"reason": self.line.reason, "expires": self.line.expires, "location": self.location}


@dataclass
class Acknowledgements:
    """The lines of a file, and what became of each."""

    items: Sequence[Acknowledgement] = ()
    used: set[int] = field(default_factory=set)
    exceeded: set[int] = field(default_factory=set)

    def apply(self, judging: Judging, results: list[GateResult]) -> list[GateResult]:
        """The results, those marked that a line lets pass. `judging` holds other limits against the same evidence."""
        return [self._mark(judging, result) for result in results]

    def _mark(self, judging: Judging, result: GateResult) -> GateResult:
        if result.verdict == "pass":
            return result
        for index, item in enumerate(self.items):
            if item.expired or not item.concerns(result):
                continue
            if result.verdict == "inconclusive" and not item.line.inconclusive:
                continue
            if item.line.up_to is not None and not _holds(judging, result, item.line.up_to):
                self.exceeded.add(index)
                continue
            self.used.add(index)
            return replace(result, acknowledged=item.to_json())
        return result

    def states(self) -> list[dict[str, str]]:
        """`acknowledgements` of run.json: each line, and whether it was `used`, `exceeded`, `expired` or `unneeded`."""
        return [
            {"metric": item.line.metric, **item.to_json(), "state": self._state(index, item)}
            for index, item in enumerate(self.items)
        ]

    def _state(self, index: int, item: Acknowledgement) -> str:
        if item.expired:
            return "expired"
        if index in self.exceeded:
            return "exceeded"
        return "used" if index in self.used else "unneeded"

    def waiver(self) -> Waiver | None:
        """What the registry's log has to say where something was let pass: the reasons, until the first one ends."""
        used = [self.items[index].line for index in sorted(self.used)]
        if not used:
            return None
        return Waiver("; ".join(dict.fromkeys(line.reason for line in used)), min(line.expires for line in used))


def _holds(judging: Judging, result: GateResult, up_to: float) -> bool:
    """Whether the same measurement passes with the limit moved to `up_to`."""
    from optimize.recipe import Gate

    (limit,) = result.limit
    gate = Gate.model_validate({"metric": result.metric, "on": result.artifact, "over": result.over, limit: up_to})
    return all(one.verdict == "pass" for one in judging([gate]) if one.setting == result.setting)


def read(recipe: Recipe, gates: Sequence[Gate], rivals: Sequence[str], file: Path | None = None) -> Acknowledgements:
    """The lines of `file`, or of `acknowledged.yaml` beside the recipe where there is one.

    Raises `RecipeError` with every mistake: an unknown key, a metric that no gate judges, a stage that there is not.
    """
    from optimize.recipe import reader
    from optimize.recipe.blocks import read_block

    path = file if file is not None else _beside(recipe)
    if path is None:
        return Acknowledgements()
    text = reader.read(path)
    if text.value is not None:
        read_block(text, Document, text.value, ())
    blocks = text.value.get("acknowledged") if isinstance(text.value, Mapping) else None
    items = []
    for index, block in enumerate(blocks[:MAX_LINES] if isinstance(blocks, list) else ()):
        trail = ("acknowledged", index)
        if line := read_block(text, Line, block, trail):
            _check(text, trail, line, recipe, gates, rivals)
            row, column = text.places.get(trail, (1, 1))
            items.append(Acknowledgement(line, f"{path}:{row}:{column}"))
    text.raise_mistakes()
    return Acknowledgements(items)


def _beside(recipe: Recipe) -> Path | None:
    if recipe.file is None:
        return None
    path = recipe.file.parent / FILE
    return path if path.is_file() else None


def _check(
    text: Text,
    trail: tuple[str | int, ...],
    line: Line,
    recipe: Recipe,
    gates: Sequence[Gate],
    rivals: Sequence[str],
) -> None:
    from optimize.evaluate.gates import RULES
    from optimize.recipe import SOURCE
    from optimize.recipe.blocks import did_you_mean

    metrics = {gate.metric for gate in gates}
    stages = {SOURCE, *(stage.name for stage in recipe.stages)}
    if line.metric not in metrics:
        text.report((*trail, "metric"), f"no gate judges `{line.metric}`", did_you_mean(line.metric, metrics))
        return
    if line.on is not None and line.on not in stages:
        text.report((*trail, "on"), f"no stage is named `{line.on}`", did_you_mean(line.on, stages))
    if line.limit is not None and line.limit not in RULES:
        text.report((*trail, "limit"), f"there is no limit `{line.limit}`", did_you_mean(line.limit, RULES))
        return
    # What older versions are called changes from one promotion to the next: those names can't be wrong.
    if line.over is not None and line.over not in stages and "~" not in line.over and line.over not in rivals:
        text.report((*trail, "over"), f"nothing is called `{line.over}`", did_you_mean(line.over, {*stages, *rivals}))
    limits = [gate.limit for gate in gates if gate.metric == line.metric and line.limit in (None, gate.limit[0])]
    if not limits:
        kinds = {gate.limit[0] for gate in gates if gate.metric == line.metric}
        message = f"no gate holds {line.metric} to `{line.limit}`"
        text.report((*trail, "limit"), message, did_you_mean(line.limit, kinds))
    elif line.up_to is not None:
        _check_bound(text, trail, line.up_to, limits)


def _check_bound(text: Text, trail: tuple[str | int, ...], up_to: float, limits: Sequence[tuple[str, float]]) -> None:
    kinds = {name for name, _ in limits}
    if len(kinds) > 1:
        message = f"`up_to` is a value of which limit? This metric has gates with {' and '.join(sorted(kinds))}"
        text.report((*trail, "up_to"), message, "say which: `limit: max_drop`")
        return
    (name,) = kinds
    if name not in ("min", "max") and (up_to < 0 or (up_to == 0 and name not in ("max_drop", "max_increase"))):
        text.report((*trail, "up_to"), f"{up_to} is no value for `{name}`")
        return
    values = [value for _, value in limits]
    strictest = min(values) if name.startswith("max") else max(values)
    looser = up_to > strictest if name.startswith("max") else up_to < strictest
    if not looser:
        text.report(
            (*trail, "up_to"),
            f"`up_to: {up_to}` lets nothing pass that `{name}: {strictest}` would not",
            "leave it out",
        )
