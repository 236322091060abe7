"""Which model is in production, since when, on whose word, and which verdict allowed it.

The state is a fold over the audit log and nothing else: `promote` and `rollback` append an entry, all the rest reads. A
version is a digest under a name, counted from 1; an alias points at a version and remembers those it pointed at before.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optimize.errors import PromotionRefused, RegistryError
from optimize.registry.audit import AuditLog, Entry, follow
from optimize.registry.state import State, Version, Waiver, fold

__all__ = ["AuditLog", "Entry", "Registry", "Version", "Waiver"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Registry:
    """Versions and aliases of the models of a work folder."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).absolute()
        self.log = AuditLog(self.root / "audit")

    def promote(
        self,
        name: str,
        alias: str,
        digest: str,
        *,
        verdict: str | None,
        run: str,
        recipe_digest: str,
        gates: Sequence[Mapping[str, Any]] = (),
        waiver: Waiver | None = None,
    ) -> Version:
        """Point `alias` at `digest`, which becomes a version of `name` if it isn't one.

        `verdict` is that of the run on this very digest. Anything but "pass" raises `PromotionRefused`, unless a waiver
        gives a reason and ends in the future; the log then says so. A digest has one version number in a name, and its
        last promotion's verdict counts. Where nothing would change, nothing is logged.
        """
        _check_name(name, "model name")
        _check_alias(alias)
        if not _DIGEST.fullmatch(digest):
            raise RegistryError(f"not an artifact's digest: {digest!r}")
        if verdict == "pass":
            waiver = None
        else:
            _check_waiver(waiver, f"{name}: the verdict on {digest[:19]} is {verdict or 'missing'}, not pass")

        def make(entries: Sequence[Entry]) -> dict[str, Any] | None:
            versions = fold(entries).list(name)
            known = next((version for version in versions if version.digest == digest), None)
            if known and alias in known.aliases and (known.verdict, known.waiver) == (verdict, waiver):
                return None
            return {
                "action": "promote",
                "name": name,
                "alias": alias,
                "version": known.version if known else len(versions) + 1,
                "digest": digest,
                "verdict": verdict,
                "waiver": asdict(waiver) if waiver else None,
                "run": run,
                "recipe_digest": recipe_digest,
                "gates": [dict(gate) for gate in gates],
            }

        state = fold(self.log.append(make))
        return next(version for version in state.list(name) if version.digest == digest)

    def rollback(self, name: str, alias: str, to: int | None = None) -> Version:
        """Point `alias` at the version it pointed at before, or at version `to`, which it must have pointed at once.

        Raises `RegistryError` where there is none, and `PromotionRefused` where that version's waiver has run out.
        """

        def make(entries: Sequence[Entry]) -> dict[str, Any]:
            state = fold(entries)
            pointer = state.aliases.get((name, alias))
            if pointer is None:
                raise self._unknown(state, f"{name}@{alias}")
            number = pointer.before if to is None else to
            if number is None:
                raise RegistryError(f"{name}@{alias} pointed at no version before {pointer.version}")
            if number not in pointer.ever:
                raise RegistryError(f"{name}@{alias} never pointed at version {number}", hint="promote it instead")
            version = state.version(name, number)
            if version.waiver and version.waiver.expired:
                raise PromotionRefused(
                    f"version {number} of {name} was promoted under a waiver that ended {version.waiver.expires}",
                    hint="name another version with --to, or promote it again",
                )
            return {
                "action": "rollback",
                "name": name,
                "alias": alias,
                "version": number,
                "from": pointer.version,
                "digest": version.digest,
                "verdict": version.verdict,
            }

        entries = self.log.append(make)
        return fold(entries).version(name, entries[-1]["version"])

    def list(self) -> Sequence[Version]:
        """Every version, by name and number, with the aliases that point at it."""
        return self._state().list()

    def foretell(self, files: Sequence[bytes], *, instead: bool = False) -> Registry:
        """The registry as it would be with these entries of a remote behind its own, or instead; it can only be read.

        Raises `RegistryError` where they do not follow, or say what no entry can say.
        """
        return _Foretold(self.root, [*(() if instead else self.log.files()), *files])

    def resolve(self, reference: str) -> Version:
        """`name@alias`, `name@3`, or `name` (its newest version). Raises `RegistryError` where that names nothing.

        `name@alias~2` is where the alias would point after rolling back twice.
        """
        state = self._state()
        name, at, which = reference.partition("@")
        if "~" in which:
            return self._before(state, reference)
        for version in reversed(state.list(name)):
            if not at or which in (str(version.version), *version.aliases):
                return version
        raise self._unknown(state, reference)

    def history(self, name: str, alias: str) -> Sequence[Version]:
        """The versions that an alias would roll back through, where it points now first. Empty where there is none."""
        state = self._state()
        pointer = state.aliases.get((name, alias))
        return [state.version(name, number) for number in reversed(pointer.trail)] if pointer else []

    def _before(self, state: State, reference: str) -> Version:
        target, _, steps = reference.rpartition("~")
        name, _, alias = target.partition("@")
        pointer = state.aliases.get((name, alias))
        if pointer is None:
            raise self._unknown(state, target)
        if not re.fullmatch("[0-9]{1,6}", steps):
            raise RegistryError(f"not a number of versions to go back: {reference!r}", hint=f"such as {target}~1")
        if int(steps) >= len(pointer.trail):
            raise RegistryError(
                f"{target} goes back by {len(pointer.trail) - 1} versions, not {int(steps)}",
                hint=f"{target}~{len(pointer.trail) - 1} is the first",
            )
        return state.version(name, pointer.trail[-1 - int(steps)])

    def digests(self) -> set[str]:
        """Of every version: what must stay in the store."""
        return {version.digest for version in self.list()}

    def verify(self) -> Sequence[str]:
        """Everything that is wrong with the log; empty where it is whole."""
        problems = self.log.problems()
        if not problems:
            try:
                self._state()
            except RegistryError as error:
                problems.append(error.message)
        return problems

    def _state(self) -> State:
        return fold(self.log.entries())

    def _unknown(self, state: State, reference: str) -> RegistryError:
        known = ", ".join(sorted(f"{name}@{alias}" for name, alias in state.aliases))
        hint = f"there is {known}" if known else "promote a model first"
        return RegistryError(f"nothing is promoted as {reference!r}", location=str(self.root), hint=hint)


class _Foretold(Registry):
    def __init__(self, root: Path, files: Sequence[bytes]) -> None:
        super().__init__(root)
        entries = follow(files, 0, None)
        for entry in entries:
            _check_entry(entry)
        self._foretold = fold(entries)

    def _state(self) -> State:
        return self._foretold


def _check_entry(entry: Entry) -> None:
    """What `promote` and `rollback` would not have written is refused: names, digests and runs serve as paths."""
    try:
        _check_name(entry["name"], "model name")
        _check_alias(entry["alias"])
        if not _DIGEST.fullmatch(entry["digest"]):
            raise RegistryError(f"not an artifact's digest: {entry['digest']!r}")
        if not isinstance(entry["version"], int) or entry["version"] < 1:
            raise RegistryError(f"not a version's number: {entry['version']!r}")
        said = ["who", "host", "when", *(("run", "recipe_digest") if entry["action"] == "promote" else ())]
        if strange := [key for key in said if not isinstance(entry[key], str)]:
            raise RegistryError(f"`{strange[0]}` is no text")
    except (KeyError, TypeError) as error:
        raise RegistryError(f"entry {entry['number']} of the log makes no sense: {error!r}") from error


def _check_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name) or ".." in name:
        hint = "use letters, digits and . _ - (no two dots together), a letter or digit first, at most 64 in all"
        raise RegistryError(f"not a {what}: {name!r}", hint=hint)


def _check_alias(alias: str) -> None:
    _check_name(alias, "alias")
    if alias.isdigit():
        raise RegistryError(f"an alias can't be a number: {alias!r}", hint="numbers name versions")


def _check_waiver(waiver: Waiver | None, refusal: str) -> None:
    if waiver is None:
        raise PromotionRefused(refusal, hint="mend the model, or give a waiver with a reason and an expiry")
    if not waiver.reason.strip():
        raise PromotionRefused(f"{refusal}, and the waiver gives no reason", hint="say why")
    try:
        expired = waiver.expired
    except ValueError as error:
        raise PromotionRefused(
            f"{refusal}, and the waiver's expiry {waiver.expires!r} is no date", hint="such as 2030-01-31"
        ) from error
    if expired:
        raise PromotionRefused(f"{refusal}, and the waiver ended {waiver.expires}", hint="give a later expiry")
