"""`promote` after the fact: from a run on disk to a version in the registry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import PromotionRefused, RecipeError
from optimize.planning import as_work
from optimize.run import find_run

if TYPE_CHECKING:
    from optimize.registry import Version
    from optimize.work import Work


def promote(
    run: str,
    *,
    alias: str,
    artifact: str | None = None,
    waive: str | None = None,
    expires: str | None = None,
    work: Work | str | Path | None = None,
) -> Version:
    """Give an artifact of a run (its id, `latest`, or a `run.json`) a version and an alias.

    `artifact` is a stage's name; without it, the artifact that the run selected. Its verdict in that run must be
    `pass`, unless `waive` gives a reason and `expires` a date; then the audit log says so. Raises `PromotionRefused`
    (nothing changes), `RecipeError` for a run or name that there is not, `StoreError` for damaged bytes.
    """
    from optimize.registry import Waiver

    work = as_work(work)
    _, document = find_run(work, run)
    described = _artifact(document, artifact)
    stored = work.store.open(described["digest"])
    work.store.verify(stored)
    if (waive is None) != (expires is None):
        raise PromotionRefused("a waiver needs a reason and an expiry", hint='--waive "why" --expires 2026-12-31')
    return work.registry.promote(
        document["recipe"],
        alias,
        stored.digest,
        verdict=_verdict(document, described["name"]),
        run=document["run"],
        recipe_digest=document["recipe_digest"],
        waiver=Waiver(waive, expires) if waive is not None and expires is not None else None,
    )


def _artifact(document: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    listed: list[Mapping[str, Any]] = document["artifacts"]
    if name is None:
        wanted = [one for one in listed if one["digest"] == document["selected"]]
    else:
        wanted = [one for one in listed if one["name"] == name]
    if not wanted:
        what = f"artifact {name!r}" if name else "single artifact that it selected"
        names = ", ".join(one["name"] for one in listed) or "nothing"
        raise RecipeError(f"run {document['run']} has no {what}", hint=f"name one with --artifact; it has {names}")
    return wanted[-1]


def _verdict(document: Mapping[str, Any], name: str) -> str | None:
    """The worst verdict of the gates on one artifact; None where none was asked or the run ended in an error."""
    verdicts = [] if document["error"] else [gate["verdict"] for gate in document["gates"] if gate["artifact"] == name]
    return next((verdict for verdict in ("fail", "inconclusive", "pass") if verdict in verdicts), None)
