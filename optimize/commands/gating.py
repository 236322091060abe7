"""What `gate`, `push` and `pull` tell people, in lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optimize.report.table import megabytes

if TYPE_CHECKING:
    from optimize.remote import Pulled, Pushed

MOST = 8
"""Differences shown of one kind; run.json has them all."""


def said(document: Mapping[str, Any]) -> str:
    """Against what a gate's run was held, what changed since, and what each gate said, the worst first."""
    against = document["against"]
    lines = []
    if against["version"] is not None:
        since = "".join(f", and {one['ref']} (version {one['version']})" for one in against["since"])
        lines.append(
            f"Against {against['ref']}: version {against['version']}, promoted {against['promoted_at'][:10]}{since}."
        )
        lines += _changes(against["changed"])
    lines += [note[:1].upper() + note[1:] + "." for note in against["notes"]]
    ranks = ("fail", "inconclusive", "pass")
    for gate in sorted(
        document["gates"], key=lambda one: (ranks.index(one["verdict"]), one["acknowledged"] is not None)
    ):
        mark = {"fail": "FAIL"}.get(gate["verdict"], gate["verdict"])
        lines.append(f"{mark}: {gate['artifact']}: {gate['reason']}")
        if told := gate["acknowledged"]:
            lines.append(f"  let pass until {told['expires']} ({told['location']}): {told['reason']}")
    for one in document.get("acknowledgements", ()):
        if one["state"] != "used":
            lines.append(f"{one['location']}: {_STATES[one['state']].format(**one)}")
    return "\n".join(lines) + "\n"


_STATES = {
    "expired": "this acknowledgement of {metric} expired on {expires}, and lets nothing pass",
    "exceeded": "{metric} got worse than this acknowledgement allows, or can't be shown not to",
    "unneeded": "nothing needs this acknowledgement of {metric}; take it out",
}


def said_of_push(pushed: Pushed) -> str:
    told = (
        f"{pushed.remote}: {len(pushed.digests)} artifacts are there ({pushed.files} files, {megabytes(pushed.bytes)}"
        f" sent), {pushed.entries} new entries in its registry"
    )
    if pushed.behind:
        told += f"; it has {pushed.behind} that lack here (`optimize pull`)"
    return told


def said_of_pull(pulled: Pulled) -> str:
    told = (
        f"{pulled.remote}: {len(pulled.digests)} artifacts are here ({pulled.files} files, {megabytes(pulled.bytes)}"
        f" fetched), {pulled.entries} new entries in the registry"
    )
    if pulled.set_aside:
        told += f"; the log that was here is in {pulled.set_aside}"
    return told


def _changes(changed: Mapping[str, Any]) -> list[str]:
    lines = []
    for kind, differences in changed.items():
        shown = [f"{one['what']}: {_value(one['before'])} -> {_value(one['after'])}" for one in differences[:MOST]]
        if len(differences) > MOST:
            shown.append(f"and {len(differences) - MOST} more")
        if shown:
            lines.append(f"  changed in {kind}: {'; '.join(shown)}")
    return lines


def _value(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:56] + " ..."
