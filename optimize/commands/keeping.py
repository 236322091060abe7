"""The groups `optimize registry` and `optimize store`: what the work folder keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from optimize.commands.options import Json, Verb, WorkFolder, group
from optimize.commands.reporting import UNEXPECTED, emit, note, relative, say, show

registry = group("What was promoted: names, versions, aliases, and the log of who did what.")
store = group("Artifacts by content: what the work folder keeps.")


@registry.command("list", cls=Verb)
def registry_list(work: WorkFolder = None, as_json: Json = False) -> None:
    """Every version: its digest, verdict and the aliases that point at it."""
    from optimize.work import Work

    versions = Work().registry.list()
    if as_json:
        emit({"schema": 1, "versions": [asdict(version) for version in versions]})
        return
    from optimize.terminal import version_table

    show(version_table(versions)) if versions else say("Nothing is promoted yet.")


@registry.command("verify", cls=Verb)
def registry_verify(work: WorkFolder = None, as_json: Json = False) -> int:
    """Check the chain of the audit log, and every byte of the promoted artifacts."""
    from optimize.errors import OptimizeError
    from optimize.remote.log import REMEMBERED
    from optimize.work import Work

    place = Work()
    problems = list(place.registry.verify())
    shared = (place.registry.root / REMEMBERED).exists()
    absent = 0
    for digest in sorted(place.registry.digests()) if not problems else ():
        if shared and not place.store.has(digest):
            absent += 1  # what nobody pulled yet is no damage
            continue
        try:
            place.store.verify(place.store.open(digest))
        except OptimizeError as error:
            problems.append(f"{digest}: {error.message}")
    if absent:
        note(f"{absent} promoted artifacts are not here; `optimize pull NAME@VERSION` brings one")
    return _say_problems("registry", problems, as_json)


@registry.command("log", cls=Verb)
def registry_log(work: WorkFolder = None, as_json: Json = False) -> None:
    """Who promoted or rolled back what, when and on which verdict; the oldest first."""
    from optimize.work import Work

    entries = Work().registry.log.entries()
    if as_json:
        emit({"schema": 1, "entries": entries})
        return
    from optimize.terminal import log_table

    show(log_table(entries)) if entries else say("Nothing is promoted yet.")


@store.command("list", cls=Verb)
def store_list(work: WorkFolder = None, as_json: Json = False) -> None:
    """Every artifact, the last used first."""
    from optimize.work import Work

    stored = Work().store.list()
    if as_json:
        artifacts = [
            {
                "digest": one.artifact.digest,
                "format": one.artifact.format,
                "size_bytes": one.artifact.size_bytes,
                "path": str(one.artifact.path),
                "made_by": [{name: record.get(name) for name in ("recipe", "stage", "key")} for record in one.records],
            }
            for one in stored
        ]
        emit({"schema": 1, "artifacts": artifacts})
        return
    from optimize.terminal import store_table

    show(store_table(stored)) if stored else say("The store is empty.")


@store.command("verify", cls=Verb)
def store_verify(work: WorkFolder = None, as_json: Json = False) -> int:
    """Check every byte against the manifests."""
    from optimize.work import Work

    problems = Work().store.verify_all()
    return _say_problems("store", [f"{relative(one.path)}: {one.message}" for one in problems], as_json)


@store.command("gc", cls=Verb)
def store_gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Forget the newest run of each recipe too.")] = False,
    work: WorkFolder = None,
    as_json: Json = False,
) -> None:
    """Remove the artifacts that neither the registry, nor a running process, nor the newest run of a recipe needs."""
    from optimize.run import newest_digests
    from optimize.work import Work

    place = Work()

    def needed() -> set[str]:
        return place.registry.digests() | (set() if everything else newest_digests(place))

    collected = place.store.gc(keep=needed, dry_run=dry_run)
    if as_json:
        emit({"schema": 1, "dry_run": dry_run, **asdict(collected)})
        return
    from optimize.report.table import megabytes

    for digest in collected.removed:
        say(digest)
    done = "would go" if dry_run else "removed"
    note(f"{len(collected.removed)} artifacts {done}, {megabytes(collected.freed_bytes)}; {collected.kept} kept")


def _say_problems(where: str, problems: Sequence[str], as_json: bool) -> int:
    if as_json:
        emit({"schema": 1, "ok": not problems, "problems": list(problems)})
    else:
        for problem in problems:
            say(problem)
    note(f"problems in the {where}: {len(problems)}" if problems else f"the {where} is whole")
    return UNEXPECTED if problems else 0
