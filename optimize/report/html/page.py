"""From runs to one self-contained page: templates, styles, script, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.report.html import distributions, gates, heatmap, lineage, pareto, rows, tail, waterfall
from optimize.report.html.reading import Result
from optimize.report.html.words import clean, in_unit, interval, setting_words, time_words
from optimize.report.table import Table, megabytes, summary
from optimize.run import verdict_on

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
FILE = "report.html"
VERDICTS = {
    "pass": ("✓", "Pass"),
    "fail": ("✗", "Fail"),
    "inconclusive": ("?", "Inconclusive"),
    "error": ("!", "Error"),
    "none": ("–", "No verdict"),
}


def write(folder: Path, output: Path | None = None) -> Path:
    """Draw the page of the run in a folder, from run.json and its sidecars; by default beside them."""
    from optimize.atomic import write_bytes

    document = json.loads((folder / "run.json").read_bytes())
    path = output or folder / FILE
    write_bytes(path, render(Result(document, folder)).encode("utf-8", "replace"))
    return path


def render(result: Result) -> str:
    """The page of one run."""
    table = Table(result.document)
    sections = {
        "gates": gates.gate_rows(result),
        "headers": table.headers,
        "artifacts": list(zip(result.artifacts, table.rows(), strict=True)),
        "notes": table.notes,
        "pareto": pareto.pareto(result),
        "waterfalls": waterfall.waterfalls(result),
        "distributions": distributions.distributions(result),
        "changed": rows.changed_rows(result),
        "tails": tail.tails(result),
        "heatmaps": heatmap.heatmaps(result),
        "lineage": lineage.lineage(result),
        "environment": lineage.environment(result),
        "data": lineage.data(result),
        "measurement": lineage.measurement(result),
        "command": lineage.command(result),
    }
    return render_template(
        "run.html",
        title=f"{result.document['recipe']}: {verdict_words(result)[2]}",
        run=result.document,
        when=lineage.when(result.document["run"]),
        took=lineage.seconds(result.document["seconds"]),
        verdict=verdict_words(result),
        summary=summary(result.document),
        headlines=headlines(result),
        baseline=result.baseline,
        against=result.document.get("against"),
        **sections,
        unreadable=result.unreadable,
    )


def render_template(name: str, **values: Any) -> str:
    """A template as a whole page, with the hashes of its style and script in its policy."""
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    script = (TEMPLATES / "script.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return _environment().get_template(name).render(style=style, script=script, policy=policy, **values)


def verdict_words(result: Result) -> tuple[str, str, str]:
    """(class, glyph, word)."""
    kind = "error" if result.document["error"] else result.document["verdict"] or "none"
    glyph, word = VERDICTS.get(kind, VERDICTS["none"])
    return kind, glyph, word


def headlines(result: Result) -> dict[str, Any] | None:
    """The artifact that the run is about, and what it is worth beside the baseline."""
    chosen = [one["name"] for one in result.artifacts if one["digest"] == result.document.get("selected")]
    judged = [name for name in result.names if verdict_on(result.document, name)]
    name = next(iter([*chosen[-1:], *judged[-1:], *result.names[-1:]]), None)
    if name is None or name == result.baseline:
        return None
    wanted: list[tuple[str, str, str | None]] = [
        *((metric, metric, None) for metric in result.qualities[:1]),
        *((time_words(phase, at), phase, at) for phase, at in result.times[:2]),
        ("size", "size", None),
    ]
    facts = []
    for title, metric, at in wanted:
        if (found := result.compared(name, result.baseline, metric, at)) and found["estimate"] is not None:
            exact = found["ci"][0] == found["ci"][1]
            speed = "as fast" if found["unit"] == "speedup" else ""
            size = megabytes(result.artifact(name)["size_bytes"]) if metric == "size" else ""
            facts.append(
                {
                    "title": title.replace(" of a call", ""),
                    "value": in_unit(found["estimate"], found["unit"]),
                    "unit": speed,
                    "interval": size if exact else interval(found["ci"], found["unit"]),
                }
            )
    return {"name": name, "over": result.baseline, "facts": facts} if facts else None


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["setting"] = setting_words
    return environment


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
