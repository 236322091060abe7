"""Pages about the recipes that come along, and about every key of a recipe, as Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pages import OURS, RECIPES, code, fields, page_of, prose, stage_blocks, table

from optimize import recipe, runtimes, tasks
from optimize.config import Block
from optimize.data import DataConfig
from optimize.recipe.checks import Document
from optimize.recipe.limits import MEASURED
from optimize.recipe.reader import read
from optimize.track import TRACKERS

BLOCKS: dict[str, type[Block]] = {
    key: getattr(recipe, name)
    for key in Document.model_fields
    if isinstance(getattr(recipe, name := {"gates": "Gate"}.get(key, key.title()), None), type)
}
"""Top-level keys of a recipe -> what may stand below them; `data`, `stages` and `track` are others in every recipe."""


def examples() -> dict[str, str]:
    """A page for each file of recipes/, and one that lists them."""
    paths = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    paths = {"quickstart": paths.pop("quickstart"), **paths}
    rows = []
    for name, path in paths.items():
        written, text = read(path).value, path.read_text(encoding="utf-8")
        first = re.split(r"(?<=\.)\s", " ".join(_head(text).split("\n\n")[0].split()))[0]
        chain = ", ".join(dict.fromkeys(f"`{verb}: {method}`" for verb, method, _ in stage_blocks(written)))
        rows.append((f"[{name}]({name}.md)", prose(first), written["model"]["task"], chain))
    index = (
        "# Recipes that come along\n\n"
        "Each runs as it is, on real models and data of a package index: `optimize apply recipes/NAME.yaml`, or "
        "`optimize init --from NAME` for a copy to change. [Recipes](../recipes.md) says what their keys mean.\n\n"
        + table(("recipe", "what it shows", "task", "stages"), rows)
        + "\n"
    )
    return {"examples/index.md": index, **{f"examples/{name}.md": _example(path) for name, path in paths.items()}}


def _head(text: str) -> str:
    """The comment that a recipe begins with; commands in it are indented."""
    lines = re.match(r"(?:#.*\n)*", text)[0].splitlines()  # type: ignore[index]  # it matches nothing at least
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)


def _example(path: Path) -> str:
    written, text = read(path).value, path.read_text(encoding="utf-8")
    head, body = _head(text), re.sub(r"\A(?:#.*\n)*", "", text)
    said = re.sub(
        r"(?m)(?:^ {2,}.+\n?)+", lambda found: f"```sh\n{textwrap.dedent(found[0]).strip()}\n```\n", f"{head}\n"
    )
    parent, rows = "the source model", []
    for verb, method, rest in stage_blocks(written):
        called = rest.pop("name", method)
        origin = {"source": "the source model"}.get(rest.get("from"), rest.pop("from", parent))
        rest.pop("from", None)
        settings = ", ".join(f"`{key}: {_flow(value)}`" for key, value in rest.items())
        rows.append((called, f"[`{verb}: {method}`](../stages/{page_of(verb, method)})", origin, settings))
        parent = called
    gates = [_gate(gate, written.get("baseline", "source")) for gate in written.get("gates") or ()]
    parts = [
        f"# {path.stem}",
        said.strip(),
        f"Task: `{written['model']['task']}`. Baseline: `{written.get('baseline', 'source')}`.",
        "## Its stages",
        table(("name", "stage", "takes what came of", "settings"), rows),
        "## What the result has to show",
        "\n".join(f"- {gate}" for gate in gates) or "Nothing: it has no gates.",
        f"## recipes/{path.name}",
        f"```yaml\n{body.strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _gate(gate: Mapping[str, Any], baseline: str) -> str:
    limit = {key: value for key, value in gate.items() if key.startswith(("min", "max"))}
    on = gate.get("on", "every leaf")
    judged = ", ".join(on) if isinstance(on, list) else on
    absolute = {"min", "max", "max_ms"} & set(limit)
    over = "" if absolute else f", over {gate.get('over', baseline)}"
    said = ", ".join(f"`{key}: {value}`" for key, value in limit.items())
    return f"`{gate['metric']}`: {said} (judged: {judged}{over})"


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


# --- the keys of a recipe ---------------------------------------------------------------------------------------------


def recipe_keys() -> str:
    """Every key that a recipe may have, but those of stages."""
    parts = [
        "# Every key of a recipe",
        "[Recipes](recipes.md) explains them; this is the whole list. Stages have [their own pages](stages/index.md). "
        "`optimize schema` prints the same as a JSON Schema, for an editor.",
        "## Top level",
        fields(Document),
    ]
    for key in Document.model_fields:
        if key == "data":
            parts += ["## data", "Keys that every task has:", fields(DataConfig)]
            parts += [part for name in tasks.TASKS for part in _data_of(name)]
        elif key == "track":
            parts += [f"## track\n\n{Document.model_fields[key].description}"]
            parts += [f"### track, to: {one.name}\n\n{fields(one.load().Config)}" for one in TRACKERS.values()]
        elif key in BLOCKS:
            parts += [f"## {key}", fields(BLOCKS[key])]
    parts += [f"Gates may also ask for what is measured of every task: {', '.join(map(code, MEASURED))}."]
    parts += ["## Formats", _formats()]
    return "\n\n".join(parts) + "\n"


def _data_of(name: str) -> Iterator[str]:
    """What a task's rows have besides, and its metrics."""
    task = tasks.get(name)
    yield f"### data, of {name}"
    yield _metrics(task)
    yield fields(task.Data, but=DataConfig.model_fields)


def _metrics(task: Any) -> str:
    named = [
        f"`{name}`{'' if metric.higher_is_better else ' (less is better)'}" for name, metric in task.metrics.items()
    ]
    return f"Metrics: {', '.join(named)}. Scored unless the recipe says otherwise: {', '.join(task.default_metrics)}."


def _formats() -> str:
    rows = []
    for name in runtimes.RUNTIMES:
        made = ", ".join(dict.fromkeys(f"`{entry.verb}: {entry.method}`" for entry in OURS if entry.gives == name))
        taken = ", ".join(dict.fromkeys(f"`{entry.verb}: {entry.method}`" for entry in OURS if name in entry.takes))
        rows.append((f"`{name}`", made, taken))
    return table(("format", "given by", "taken by"), rows)
