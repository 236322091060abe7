"""Several runs on one page: what differs between them, each one's candidates over its own baseline, and, as a history,
scores from run to run.

Times are compared within a run alone, where everything was measured side by side: between runs the page shows ratios,
and a history draws no line of times from one host to another.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import RecipeError
from optimize.report.html import lineage
from optimize.report.html.forest import Entry, draw
from optimize.report.html.history import charts
from optimize.report.html.page import FILE, render_template, verdict_words, write
from optimize.report.html.reading import Result
from optimize.report.html.words import clean, in_unit, interval, short, time_words
from optimize.report.table import summary
from optimize.run import find_run, run_documents, verdict_on

if TYPE_CHECKING:
    from optimize.work import Work

MOST_RUNS = 100
MOST_DIFFERENCES = 200


def report(work: Work, references: Sequence[str], *, history: str | None = None, output: Path | None = None) -> Path:
    """Draw one run (beside its run.json by default), several, or the history of a name; the page's path.

    `history` is a recipe's name, or `name@alias` for the runs that were promoted to it. Raises `RecipeError` where
    there is no such run.
    """
    if history is not None:
        results = past(work, history)
    elif not references:
        raise RecipeError("no run is named", hint="`optimize report latest`, several ids, or --history NAME")
    else:
        results = [Result(document, folder) for folder, document in (find_run(work, one) for one in references)]
    if history is None and len(results) == 1 and results[0].folder is not None:
        return write(results[0].folder, output)
    from optimize.atomic import write_bytes

    path = (output or work.root / FILE).absolute()
    write_bytes(path, render(results, history=history).encode("utf-8", "replace"))
    return path


def past(work: Work, reference: str) -> list[Result]:
    """The runs of a recipe's name, the oldest first; of `name@alias` those that were promoted to it."""
    name, _, alias = reference.partition("@")
    found = []
    for folder, document in run_documents(work):
        promoted = document["promoted"] or {}
        if document["recipe"] == name and "compared" not in document and (not alias or promoted.get("alias") == alias):
            found.append(Result(document, folder))
    if not found:
        raise RecipeError(
            f"no run of {reference!r} is in the work folder",
            location=str(work.runs),
            hint="see `optimize registry list`",
        )
    return found[:MOST_RUNS][::-1]


def render(results: Sequence[Result], *, history: str | None = None) -> str:
    """The page."""
    labels = labels_of(results)
    return render_template(
        "several.html",
        title=f"{history}: history" if history else f"{len(results)} runs compared",
        history=history,
        runs=[_run(result, label) for result, label in zip(results, labels, strict=True)],
        caveats=caveats(results),
        differences=differences(results),
        labels=labels,
        forests=forests(results, labels),
        charts=charts(results, labels) if history else [],
    )


def labels_of(results: Sequence[Result]) -> list[str]:
    """A letter each, which the page uses for the run: A, B, ..., Z, A2, ..."""
    return [chr(65 + i % 26) + (str(i // 26 + 1) if i >= 26 else "") for i in range(len(results))]


def _run(result: Result, label: str) -> dict[str, Any]:
    document = result.document
    kind, glyph, word = verdict_words(result)
    return {
        "label": label,
        "recipe": document["recipe"],
        "run": document["run"],
        "when": lineage.when(document["run"]),
        "kind": kind,
        "glyph": glyph,
        "word": word,
        "summary": summary(document),
        "promoted": document["promoted"],
        "baseline": result.baseline,
    }


def caveats(results: Sequence[Result]) -> list[str]:
    """What keeps these runs from being compared number by number."""
    found = []
    rows = {(result.document["data"].get("evaluation") or {}).get("digest") for result in results}
    if len(rows - {None}) > 1:
        found.append("They were scored on different evaluation rows.")
    if len({host_of(result) for result in results}) > 1:
        found.append("They ran on different hosts or libraries: compare speed-ups, not milliseconds.")
    if any(result.document["error"] for result in results):
        found.append("Not all of them came to an end.")
    return found


def host_of(result: Result) -> str:
    """What times depend on."""
    host = {key: value for key, value in result.document["host"].items() if key != "memory_bytes"}
    return json.dumps(host, sort_keys=True)


def differences(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of the recipes' settings that are not the same in all."""
    recipes = [_recipe(result) for result in results]
    flat = [flatten(_shared_stages(one, recipes)) for one in recipes]
    paths = list(dict.fromkeys(path for one in flat for path in one))
    found = []
    for path in paths:
        values = [one.get(path, "") for one in flat]
        if len(set(values)) > 1:
            found.append((path, [short(value, 60) for value in values]))
    return found[:MOST_DIFFERENCES]


def _shared_stages(recipe: Mapping[str, Any], recipes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The recipe with the settings of stages that all have; of another stage only what it is."""
    everywhere = set.intersection(*({stage.get("name") for stage in one.get("stages", ())} for one in recipes))

    def shown(stage: Mapping[str, Any]) -> Mapping[str, Any]:
        if stage.get("name") in everywhere:
            return stage
        verb, method = next(iter(stage.items()))
        return {"name": stage.get("name"), verb: method, "from": stage.get("from")}

    return {**recipe, "stages": [shown(stage) for stage in recipe.get("stages", ())]}


def flatten(value: Any, path: str = "") -> dict[str, str]:
    """`stages.int8.mode` -> `"dynamic"`; entries of a list by their `name`, else by their number."""
    if isinstance(value, Mapping):
        fields = {key: item for key, item in value.items() if key != "name" or not path}
        return {p: v for key, item in fields.items() for p, v in flatten(item, f"{path}.{key}".strip(".")).items()}
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return {
            p: v
            for index, item in enumerate(value)
            for p, v in flatten(item, f"{path}.{item.get('name', index)}").items()
        }
    return {path: json.dumps(value, ensure_ascii=False)}


def _recipe(result: Result) -> Any:
    if result.folder is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return json.loads((result.folder / "recipe.json").read_bytes())["recipe"]
    return {}


def forests(results: Sequence[Result], labels: Sequence[str]) -> list[dict[str, Any]]:
    """For each quantity that any run has: its artifacts over its own baseline, with intervals."""
    keys: dict[tuple[str, str | None], str] = {}
    for result in results:
        keys |= {(metric, None): metric for metric in result.qualities}
        keys |= {(phase, at): time_words(phase, at) for phase, at in result.times}
    keys[("size", None)] = "size"
    drawn = []
    for index, ((metric, at), title) in enumerate(keys.items()):
        entries, unit = [], ""
        for result, label in zip(results, labels, strict=True):
            for name in candidates(result):
                one = result.compared(name, result.baseline, metric, at)
                if one is not None and one["estimate"] is not None:
                    unit = one["unit"]
                    mark = verdict_on(result.document, name) or ""
                    entries.append(Entry(f"{label} {clean(name)}", one["estimate"], one["ci"], mark))
        if entries:
            nothing = 0.0 if unit == "difference" else 1.0
            rows = [[e.name, in_unit(e.estimate, unit), interval(e.ci, unit), e.verdict] for e in entries]
            drawn.append(
                {
                    "title": title,
                    "unit": {
                        "difference": "difference from the baseline",
                        "speedup": "times as fast as the baseline",
                    }.get(unit, "share of the baseline's"),
                    "picture": draw(f"forest-{index}", title, entries, nothing, unit),
                    "rows": rows,
                }
            )
    return drawn


def candidates(result: Result) -> list[str]:
    """What a run was for: the artifacts that gates judged, else those nobody built on."""
    judged = [name for name in result.names if name != result.baseline and verdict_on(result.document, name)]
    parents = {result.parent(name) for name in result.names}
    return judged or [name for name in result.names if name != result.baseline and name not in parents]
