"""`promote` after the fact: from a run on disk to a version in the registry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimize.errors import PromotionRefused, RecipeError
from optimize.planning import as_work
from optimize.run import find_run, gates_on, verdict_on

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
    if "compared" in document:
        raise PromotionRefused(
            f"{document['run']} is a comparison, and no recipe's gates were judged in it",
            hint="name a run of `optimize apply`",
        )
    if (document.get("against") or {}).get("version") is not None:
        raise PromotionRefused(
            f"{document['run']} held a candidate against what is promoted, not against all of its recipe's own gates",
            hint="`optimize gate --promote` does both; or name a run of `optimize apply`",
        )
    described = _artifact(document, artifact)
    stored = work.store.open(described["digest"])
    work.store.verify(stored)
    if (waive is None) != (expires is None):
        raise PromotionRefused("a waiver needs a reason and an expiry", hint='--waive "why" --expires 2026-12-31')
    name = described["name"]
    return work.registry.promote(
        document["recipe"],
        alias,
        stored.digest,
        verdict=None if document["error"] else verdict_on(document, name),
        run=document["run"],
        recipe_digest=document["recipe_digest"],
        gates=gates_on(document, name),
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
