"""A result for a pull request, a merge request or a job's summary, as Markdown.

The verdict stands in the first line; then a table of exactly what the gates judge, the smallest margin first; what
changed since the promoted version; and the rest, folded. A hidden marker in the last line says whose comment it is.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optimize.report.checks import Check, Outcome, checks, others
from optimize.report.escape import code, markdown
from optimize.report.table import Table, summary

GITHUB_LIMIT = 65_536
GITLAB_LIMIT = 1_000_000
MARKS: dict[Outcome, str] = {
    "pass": "✅ pass",
    "fail": "❌ **fail**",
    "inconclusive": "❔ **inconclusive**",
    "warned": "⚠️ inconclusive, which only warns",
    "acknowledged": "📌 acknowledged",
}
_TITLES = {"pass": "✅ PASS", "fail": "❌ FAIL", "inconclusive": "❔ INCONCLUSIVE", None: "➖ NO VERDICT"}
_FOLD = "<details>\n<summary>Scores, latency, environment, and how to run it again</summary>\n\n"
_UNFOLD = "</details>\n\n"
_CUT = "_{} more left out: the host shows no longer text. The job's artifacts have all._\n\n"


def comment(document: Mapping[str, Any], *, limit: int = GITHUB_LIMIT, size: Callable[[str], int] = len) -> str:
    """The Markdown of a run.json (or of the document of an error), of at most `limit` by the measure of `size`."""
    head, tail = f"{_headline(document)}\n\n", f"{marker(document)}\n"
    said = f"{markdown(summary(document), 1_500)}\n\n"
    if size(head + said + tail) > limit:
        return head + tail if size(head + tail) <= limit else ""
    head += said
    if document["error"]:
        parts = _error_parts(document)
    else:
        parts = [_gated(document), *_acknowledged(document), *_since_promoted(document)]
    return head + _fit(parts, _rest(document), limit - size(head) - size(tail), size) + tail


def marker(document: Mapping[str, Any]) -> str:
    """What a comment is found by, to be updated in place."""
    name = str(document.get("recipe") or "recipe")[:64]
    # Nothing of a name can end an HTML comment; two names never become one.
    safe = re.sub(r"[^A-Za-z0-9._-]|(?<=-)-", lambda found: f"%{ord(found[0]):02X}", name)
    return f"<!-- optimize:{safe} -->"


def _headline(document: Mapping[str, Any]) -> str:
    name = f" · {code(document['recipe'], 64)}" if document.get("recipe") else ""
    if error := document["error"]:
        stage = f" in stage {code(error['stage'], 64)}" if error.get("stage") else ""
        return f"### 💥 ERROR{stage}{name}"
    said = _TITLES[document["verdict"]]
    found = checks(document)
    passed = sum(check.outcome == "pass" for check in found)
    known = sum(check.outcome == "acknowledged" for check in found)
    counts = f" · {passed} of {len(found)} gate checks hold" if found else ""
    return f"### {said}{name}{counts}" + (f", {known} acknowledged" if known else "")


# --- the parts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A heading and rows of which the last may be left out."""

    opening: str
    rows: list[str] = field(default_factory=list)


def _table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: int = 0) -> Part:
    """`right`: from which column on numbers stand."""
    rule = ["---" if index < (right or len(headers)) else "--:" for index in range(len(headers))]
    opening = f"{title}\n\n" if title else ""
    return Part(opening + _row(headers) + _row(rule), [_row(row) for row in rows])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _gated(document: Mapping[str, Any]) -> Part:
    found = checks(document)
    if not found:
        return Part("")
    headers = ("", "gated", "value", "compared", "interval", "limit", "margin")
    return _table("", headers, map(_gated_row, found), right=2)


def _gated_row(check: Check) -> tuple[str, ...]:
    gate = check.gate
    over = f" over {code(gate['over'], 64)}" if gate["over"] else ""
    gated = f"{code(gate['metric'], 64)} of {code(gate['artifact'], 64)}{over}{markdown(check.where, 200)}"
    compared = " ".join(part for part in (check.estimate, check.claim) if part) if gate["over"] else ""
    cells = (check.value, compared, check.interval, check.limit, check.margin)
    return (MARKS[check.outcome], gated, *(markdown(cell, 100) for cell in cells))


def _acknowledged(document: Mapping[str, Any]) -> list[Part]:
    rows = []
    for check in checks(document):
        if check.outcome == "acknowledged":
            told = check.gate["acknowledged"]
            where = f" ({code(told['location'], 200)})" if told.get("location") else ""
            reason, expires = markdown(told.get("reason", "")), markdown(told.get("expires", "?"), 20)
            rows.append(f"- 📌 {markdown(check.what)}, acknowledged until {expires}{where}: {reason}\n")
    return [Part("", rows)] if rows else []


def _since_promoted(document: Mapping[str, Any]) -> list[Part]:
    """What is another since the promoted version; `against` is there where `gate` was asked."""
    against = document.get("against")
    if not against:
        return []
    ref = code(against.get("ref", ""), 140)
    if against.get("version") is None:
        return [Part(f"Nothing is promoted as {ref} yet, so the recipe's own gates decided.\n\n")]
    said = f"Held against {ref}, version {markdown(against['version'], 20)}"
    if against.get("promoted_at"):
        said += f", promoted {markdown(str(against['promoted_at'])[:16])}"
    said += ", measured in this run on this machine."
    earlier = [
        f"{code(one['ref'], 140)} (version {markdown(one.get('version'), 20)})" for one in against.get("since") or ()
    ]
    if earlier:
        said += f" Also held against {', '.join(earlier[:20])}."
    changed = [
        (
            markdown(part),
            code(one.get("what", ""), 120),
            *(code(_brief(one.get(key)), 120) for key in ("before", "after")),
        )
        for part in ("recipe", "data", "environment", "host")
        for one in (against.get("changed") or {}).get(part) or ()
    ]
    if not changed:
        return [Part(f"{said} Recipe, data, environment and host are the same as then.\n\n")]
    return [_table(f"{said} What changed since then:", ("", "what", "before", "after"), changed)]


def _brief(value: object) -> str:
    return "nothing" if value is None else str(value)


def _error_parts(document: Mapping[str, Any]) -> list[Part]:
    error = document["error"]
    told = [
        f"- {name}: {shown}\n"
        for name, shown in (
            ("where", code(error["location"], 300) if error.get("location") else ""),
            ("try", markdown(error["hint"]) if error.get("hint") else ""),
        )
        if shown
    ]
    found = error.get("diagnostics") or ()
    rows = [
        (code(one.get("location", ""), 200), markdown(one.get("message", "")), markdown(one.get("hint") or ""))
        for one in found
    ]
    mistakes = _table("", ("where", "mistake", "try"), rows) if rows else Part("")
    return [mistakes, Part("", told)]


def _rest(document: Mapping[str, Any]) -> list[Part]:
    """What is folded."""
    if "run" not in document:
        return []
    found = [] if document["error"] else checks(document)
    # A mark stands first, since prose that begins a list's item could begin a rule or a list as well.
    reasons = [f"- {MARKS[check.outcome][0]} {markdown(check.gate['reason'], 800)}\n" for check in found]
    return [
        *([Part("**What each gate says**\n\n", reasons)] if reasons else []),
        *_scores(document),
        *_latency(document),
        *_not_selected(document),
        _environment(document),
        _again(document),
    ]


def _scores(document: Mapping[str, Any]) -> list[Part]:
    if not any(one.get("scores") for one in document["artifacts"]):
        return []
    table = Table(document)
    rows = [
        (
            code(name, 64),
            *(markdown(" ".join(part for part in (c.value, c.change, c.interval) if part), 120) for c in cells),
            markdown(verdict),
        )
        for name, cells, verdict in table.rows()
    ]
    return [_table("**Scores**, and how they compare with the baseline's", [markdown(h) for h in table.headers], rows)]


def _latency(document: Mapping[str, Any]) -> list[Part]:
    settings = ("phase", "batch_size", "sequence_length", "prompt_length", "new_tokens", "threads")
    rows = []
    for one in document["artifacts"]:
        for score in one.get("scores", {}).get("latency") or ():
            at = ", ".join(f"{name}={score[name]}" for name in settings if name in score)
            times = (
                f"{score[name]:.4g} ms" if score.get(name) is not None else ""
                for name in ("p50_ms", "p90_ms", "mean_ms")
            )
            rows.append((code(one["name"], 64), markdown(at), *times, markdown(score.get("samples", ""), 20)))
    headers = ("artifact", "at", "p50", "p90", "mean", "samples")
    return [_table("**Latency**", headers, rows, right=2)] if rows else []


def _not_selected(document: Mapping[str, Any]) -> list[Part]:
    rows = [_gated_row(check) for check in others(document)]
    headers = ("", "gated", "value", "compared", "interval", "limit", "margin")
    title = "**Gates that chose among the leaves**; the one chosen was measured again, and that decided"
    return [_table(title, headers, rows, right=2)] if rows else []


def _environment(document: Mapping[str, Any]) -> Part:
    host = document.get("host") or {}
    cpu = host.get("cpu") or {}
    libraries = ", ".join(f"{name} {version}" for name, version in (host.get("libraries") or {}).items())
    data = ", ".join(f"{split} {one['rows']} ({one['digest'][:19]})" for split, one in document["data"].items())
    measured = document.get("measurement") or {}
    rounds = f"{measured['rounds']} rounds, {measured.get('dropped', 0)} dropped" if "rounds" in measured else ""
    control = ", ".join(
        f"{one['estimate']:+.2%} at {setting}"
        for setting, one in (measured.get("control") or {}).items()
        if one.get("estimate") is not None
    )
    facts = {
        "processor": f"{cpu.get('model', '?')}, {cpu.get('cores', '?')} cores",
        "system": f"{host.get('os', '?')}, Python {host.get('python', '?')}",
        "libraries": libraries,
        "rows": data,
        "latency": rounds,
        "baseline against itself": control,
        "took": f"{document['seconds']:.0f} s",
    }
    return Part("**Environment**\n\n", [f"- {name}: {markdown(fact, 600)}\n" for name, fact in facts.items() if fact])


def _again(document: Mapping[str, Any]) -> Part:
    told = [f"- {code(replay(document), 600)}\n", f"- run {code(document['run'], 80)}\n"]
    if document.get("recipe_digest"):
        told.append(
            f"- recipe digest {code(document['recipe_digest'], 80)}, of what the file and the overrides say together\n"
        )
    return Part("**Again**\n\n", told)


def replay(document: Mapping[str, Any]) -> str:
    """The command line that does the same again."""
    if compared := document.get("compared"):
        return shlex.join(["optimize", "compare", *map(str, list(compared.values())[:2])])
    file = str(document.get("recipe_file") or "recipe.yaml")
    against = document.get("against")
    if not against:
        return shlex.join(["optimize", "apply", file])
    return shlex.join(["optimize", "gate", file, "--against", str(against.get("ref", ""))])


# --- fitting ----------------------------------------------------------------------------------------------------------


def _fit(parts: Sequence[Part], folded: Sequence[Part], room: int, size: Callable[[str], int]) -> str:
    """As much as there is room for: what stands above the fold first, and of a part whole rows."""
    text = _take(parts, room, size)
    inside = _take(folded, room - size(text) - size(_FOLD + _UNFOLD), size)
    return f"{text}{_FOLD}{inside}{_UNFOLD}" if inside else text


def _take(parts: Sequence[Part], room: int, size: Callable[[str], int]) -> str:
    text = ""
    for part in parts:
        note = size("\n" + _CUT.format("000,000"))
        left = room - size(text) - size(part.opening) - 1
        if left < note or not (part.opening or part.rows):
            continue
        kept: list[str] = []
        for row in part.rows:
            left -= size(row)
            if left < note:
                break
            kept.append(row)
        hidden = len(part.rows) - len(kept)
        if hidden and not kept:
            continue
        text += part.opening + "".join(kept) + ("\n" if kept else "")
        text += _CUT.format(f"{hidden:,}") if hidden else ""
    return text
