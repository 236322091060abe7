"""What a candidate is held against: the promoted artifact and older versions, brought where the store lacks them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from optimize.errors import RecipeError, StoreError
from optimize.recipe import SOURCE

if TYPE_CHECKING:
    from optimize.artifact import Artifact
    from optimize.progress import Progress
    from optimize.recipe import Recipe
    from optimize.registry import Version
    from optimize.remote.places import Place
    from optimize.work import Work

_REFERENCE = re.compile(r"(?P<name>[^@~]+)@(?P<which>[^@~]+)(~(?P<steps>[0-9]{1,6}))?")


@dataclass(frozen=True)
class Rival:
    """A version that a candidate is measured beside."""

    reference: str
    """`minilm-sentiment@production~5`."""
    name: str
    """What it is called in this run, such as `production~5`."""
    version: Version


@dataclass
class Found:
    """What the registry says of `--against` and `--since`."""

    rivals: list[Rival] = field(default_factory=list)
    """The promoted version first, then the older ones; empty where nothing is promoted yet."""
    notes: list[str] = field(default_factory=list)
    """What people have to know of it."""


def find(work: Work, against: str, since: Sequence[str], recipe: Recipe) -> Found:
    """Raises `RecipeError` for what is no reference, `RegistryError` for a version that there is not."""
    name, which, _ = _split(against)
    found = Found()
    taken = {SOURCE, *(stage.name for stage in recipe.stages)}

    def add(reference: str, version: Version) -> None:
        short = reference.partition("@")[2]
        found.rivals.append(Rival(reference, reference if short in taken else short, version))

    # A version by its number must be there; an alias need not point anywhere yet.
    if not which.isdigit() and not work.registry.history(name, which):
        found.notes.append(_nothing_yet(work, name, which, against))
        return found
    add(against, work.registry.resolve(against))
    for asked in since:
        reference = asked if "@" in asked else f"{name}@{asked}"
        of, alias, back = _split(reference)
        if back is not None and (trail := work.registry.history(of, alias)) and back >= len(trail):
            oldest = f"{of}@{alias}~{len(trail) - 1}"
            found.notes.append(f"{reference} is before the first version: held against {oldest} instead")
            reference = oldest
        version = work.registry.resolve(reference)
        if version.version in {rival.version.version for rival in found.rivals if rival.version.name == of}:
            found.notes.append(f"{reference} is version {version.version}, which the candidate is held against anyway")
        else:
            add(reference, version)
    return found


def bring(rival: Rival, work: Work, place: Place | None, *, trusted: bool, progress: Progress) -> Artifact:
    """The artifact of a version with its bytes checked. Raises `StoreError`, and as `optimize.pull`."""
    digest = rival.version.digest
    if not work.store.has(digest):
        if place is None:
            raise StoreError(
                f"the artifact of {rival.reference} ({digest[:19]}) is not in the store",
                location=str(work.store.root),
                hint="name the remote that has it: --remote URL, or OPTIMIZE_REMOTE",
            )
        from optimize.remote.fetching import Pulled, fetch

        return fetch(digest, place, work, Pulled(place.url), trusted=trusted, progress=progress)
    artifact = work.store.open(digest)
    work.store.verify(artifact)
    return artifact


def describe(against: str, found: Found) -> dict[str, Any]:
    """`against` of run.json, `changed` left empty."""
    told: dict[str, Any] = {
        "ref": against,
        "name": against.partition("@")[2],
        "version": None,
        "digest": None,
        "run": None,
    }
    told |= {"promoted_at": None, "changed": {}, "since": [], "notes": found.notes}
    if found.rivals:
        promoted, *older = found.rivals
        version = promoted.version
        told |= {"name": promoted.name, "version": version.version, "digest": version.digest}
        told |= {"run": version.run, "promoted_at": version.when}
        told["since"] = [
            {"ref": one.reference, "name": one.name, "version": one.version.version, "digest": one.version.digest}
            for one in older
        ]
    return told


def check_reference(reference: str) -> None:
    """Raises `RecipeError` for what can't be one."""
    _split(reference)


def _split(reference: str) -> tuple[str, str, int | None]:
    match = _REFERENCE.fullmatch(reference)
    if match is None or (match["steps"] and match["which"].isdigit()):
        raise RecipeError(
            f"{reference!r} names no version", hint="NAME@ALIAS, NAME@3 or NAME@ALIAS~1, such as my-model@production"
        )
    return match["name"], match["which"], int(match["steps"]) if match["steps"] else None


def _nothing_yet(work: Work, name: str, which: str, against: str) -> str:
    from optimize.recipe.blocks import did_you_mean

    known = {f"{version.name}@{alias}" for version in work.registry.list() for alias in version.aliases}
    near = did_you_mean(f"{name}@{which}", known)
    told = f"nothing is promoted as {against} yet: the recipe's own gates decide"
    return f"{told} ({near})" if near else told
