"""`optimize history`: the runs, or one metric over them, for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.commands.reporting import note
from optimize.errors import RecipeError
from optimize.report.table import megabytes
from optimize.terminal import duration, plain_table, safe

if TYPE_CHECKING:
    from rich.console import RenderableType

_AGO = re.compile(r"(\d{1,6})\s*([hdw])")
_HOURS = {"h": 1, "d": 24, "w": 168}
_STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow", "ERROR": "bold red"}


def look(
    database: str | None,
    rebuild: bool,
    folders: Sequence[Path],
    *,
    recipe: str | None,
    artifact: str | None,
    metric: str | None,
    since: str | None,
    limit: int,
) -> dict[str, Any]:
    """`runs`, or with a metric its `series`, as JSON; before that, what `--rebuild` and `--import` ask for.

    Raises `RecipeError` for a filter that is misspelt, and `HistoryError`.
    """
    from optimize.history import catch_up, import_runs, open_history
    from optimize.history.query import Filters, known, runs, trend
    from optimize.work import Work

    filters = Filters(recipe, artifact, moment(since), limit)
    work = Work()
    with open_history(work, database, tell=lambda message: note(f"warning: {message}")) as history:
        if rebuild:
            history.renew()
            catch_up(history, work, everything=True)
            note(f"the history holds {_count(len(history.known()))}")
        for folder in folders:
            note(f"{_count(import_runs(history, folder))} added from {folder}")
        if metric is None:
            found: dict[str, Any] = {"runs": history.read(lambda session: runs(session, filters))}
        else:
            found = {"metric": metric, "series": history.read(lambda session: trend(session, filters, metric))}
        if not found.get("runs") and not found.get("series"):
            _refuse_misspelt(history.read(known), recipe=recipe, metric=metric)
    return found


def _refuse_misspelt(known: Mapping[str, Sequence[str]], **asked: str | None) -> None:
    """Nothing was found: because there is nothing of that name?"""
    from optimize.recipe.blocks import did_you_mean

    for name, word in asked.items():
        if word is not None and known[name] and word not in known[name]:
            raise RecipeError(f"no run has a {name} {word!r}", hint=did_you_mean(word, known[name]))


def drawn(found: Mapping[str, Any]) -> RenderableType:
    if not (found.get("runs") or found.get("series")):
        return "No run that fits."
    return trend_tables(found["series"]) if "series" in found else run_table(found["runs"])


def _count(number: int) -> str:
    return f"{number} run" if number == 1 else f"{number} runs"


def moment(text: str | None) -> datetime | None:
    """`7d`, `12h`, `2w`, or a date or time of ISO 8601 (UTC where it names no zone). Raises `RecipeError`."""
    if text is None:
        return None
    if ago := _AGO.fullmatch(text.strip()):
        return datetime.now(timezone.utc) - timedelta(hours=int(ago[1]) * _HOURS[ago[2]])
    try:
        found = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError:
        raise RecipeError(f"`--since {text}` is no time", hint="such as 7d, 12h, 2w, 2026-11-20") from None
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


def run_table(runs: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = plain_table()
    for title in ("run", "recipe", "verdict"):
        table.add_column(title, no_wrap=title == "run", overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("promoted", overflow="fold")
    table.add_column("why", overflow="fold")
    for one in runs:
        verdict = "ERROR" if one["error"] else one["verdict"] or "none"
        promoted = "" if one["promoted"] is None else "{alias} {version}".format(**one["promoted"])
        recipe = one["recipe"] if one["kind"] == "apply" else f"{one['recipe']} ({one['kind']})"
        table.add_row(
            safe(one["run"]),
            safe(recipe),
            safe(verdict, _STYLES.get(verdict, "")),
            duration(one["seconds"]),
            safe(promoted),
            safe(_shortened(one["summary"]) if verdict != "none" else ""),
        )
    return table


def trend_tables(series: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A head line and a table for each series; nobody can mistake two hosts' times for one series."""
    from rich.console import Group
    from rich.text import Text

    from optimize.history.query import spark

    parts: list[RenderableType] = []
    for one in series:
        where = [one["setting"], f"on {one['host_name']} ({one['host']})" if one["host"] else None]
        said = ", ".join(str(part) for part in (one["metric"], *where) if part)
        head = Text.assemble(safe(f"{one['recipe']}/{one['artifact']}", "bold"), safe(f"  {said}  "))
        bars = safe(spark(point["value"] for point in one["points"]), "cyan")
        table = plain_table("run", "verdict")
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("90 % interval" if any(point["ci"] for point in one["points"]) else "", no_wrap=True)
        for point in one["points"]:
            verdict = point["verdict"] or "none"
            value, ci = _value(point["value"], one["unit"]), point["ci"]
            interval = "" if ci is None else f"[{_value(ci[0], one['unit'])}, {_value(ci[1], one['unit'])}]"
            table.add_row(safe(point["run"]), safe(verdict, _STYLES.get(verdict, "")), value, interval)
        parts += [Text.assemble(head, bars), table, Text()]
    return Group(*parts[:-1])


def _value(value: float, unit: str) -> str:
    if unit == "bytes":
        return megabytes(value)
    return f"{value:.3f} ms" if unit == "ms" else f"{value:,.1f}/s" if unit == "1/s" else f"{value:.4g}"


def _shortened(text: str, width: int = 120) -> str:
    """A summary without the verdict, which has a column of its own."""
    line = re.sub(r"^(PASS: .* closest|FAIL|INCONCLUSIVE|ERROR): ", "", " ".join(text.split()))
    return line if len(line) <= width else f"{line[: width - 4]} ..."
